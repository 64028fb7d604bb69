"""LoRA adapters: low-rank updates with exact arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastlora.core.data import BaseInfo, Extra
from fastlora.core.dtypes import widest
from fastlora.core.sums import Weighted, combine_extras, combine_updates, common_base, require_one_device
from fastlora.core.updates import Update, distinct, replaced
from fastlora.core.vector_space import Operators, expression
from fastlora.engine.buffers import moved, origin, remember
from fastlora.errors import InputError
from fastlora.runtime.devices import memory_told


class Adapter(Operators):
    """A low-rank adapter: one :class:`Update` per module of the base model, named by its path in it.

    Arithmetic is exact on ``ΔW``: ``0.7 * a + 0.3 * b - c`` concatenates factors (MATH section 4, *exact*) and
    computes nothing until the result is saved or looked at.
    """

    kind = "a LoRA adapter"

    def __init__(
        self,
        name: str,
        updates: Mapping[str, Update],
        *,
        extras: Mapping[str, Extra] | None = None,
        base: BaseInfo | None = None,
        dtype: torch.dtype = torch.float32,
        provenance: Mapping[str, object] | None = None,
        notes: Iterable[str] = (),
    ) -> None:
        self.name = name
        self.updates = dict(updates)
        self.extras = dict(extras or {})
        self.base = base or BaseInfo()
        self.dtype = dtype
        self.provenance: dict[str, object] = dict(provenance or {"adapter": name})
        self.notes = list(notes)
        self.details: dict[str, object] = {}

    @property
    def modules(self) -> list[str]:
        """Module paths, in the order of the file."""
        return list(self.updates)

    @property
    def device(self) -> torch.device:
        """Where the matrices are: those of an adapter are together. An adapter without matrices is on the CPU."""
        terms = (t for u in self.updates.values() for t in (*u.B.terms, *u.A.terms))
        first = next(terms, None)
        return torch.device("cpu") if first is None else first.source.device

    def to(self, device: torch.device | str) -> Adapter:
        """The adapter on a device (``"cpu"``, ``"cuda"``, ``"cuda:1"``), by one copy; itself where it is there."""
        from fastlora.runtime import devices

        return to(self, devices.parse(device) or self.device)

    def __contains__(self, module: str) -> bool:
        return module in self.updates

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __repr__(self) -> str:
        ranks = sorted({u.rank for u in self.updates.values()})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}" if ranks else "–"
        return f"Adapter({self.name!r}, {len(self.updates)} modules, rank {span}, {str(self.dtype)[6:]})"

    def update(self, module: str) -> Update:
        try:
            return self.updates[module]
        except KeyError:
            close = [m for m in self.updates if m.endswith(module.rsplit(".", 1)[-1])][:3]
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise InputError(
                f"adapter {self.name!r} has no module {module!r}{hint} (`.modules` lists all {len(self.updates)})"
            ) from None

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """``(B [out, r], A [r, in])`` of one module in float32, the scaling inside ``B``."""
        from fastlora.engine.materialise import materialise

        return materialise([self.update(module).baked()], torch.float32)[0]

    def delta(self, module: str) -> Tensor:
        """Dense ``ΔW [out, in]`` of one module, float32, scaling included. For tests and small models."""
        left, right = self.factors(module)
        return (left.double() @ right.double()).float()

    def compress(self, rank: int | None = None, *, energy: float | None = None) -> Adapter:
        """The best approximation of every ``ΔW`` at a rank or a share of its energy: see :func:`fastlora.compress`."""
        from fastlora.merging.compress import compress

        return compress(self, rank=rank, energy=energy)

    def save(self, path: str | Path, *, dtype: torch.dtype | str | None = None, overwrite: bool = False) -> Path:
        """Writes a PEFT directory, atomically. ``dtype=None`` keeps the widest dtype of the inputs."""
        from fastlora.formats import save_adapter

        return save_adapter(self, Path(path), dtype=dtype, overwrite=overwrite)

    def without_extras(self) -> Adapter:
        """The adapter's low-rank updates alone, without biases and replaced modules."""
        return Adapter(
            self.name,
            self.updates,
            base=replace(self.base, modules_to_save=(), bias="none"),
            dtype=self.dtype,
            provenance={"without_extras": self.provenance},
            notes=self.notes,
        )

    @classmethod
    def weighted_sum(cls, terms: Sequence[tuple[float, Adapter]], name: str | None = None) -> Adapter:
        """``ΔW = Σ w_i ΔW_i``, exactly."""
        from fastlora.adapters.lora import combination

        return combination(terms, name)


def to(adapter: Adapter, device: torch.device) -> Adapter:
    """The adapter with its matrices and coefficients on a device: one buffer, one copy. Extras stay on the host.

    A matrix that came from the host is not copied back: its original is taken.
    """
    if adapter.device == device:
        return adapter
    by_key = distinct(adapter.updates.values())
    home = {key: origin(t) for key, t in by_key.items()} if device.type == "cpu" else {}
    wanted = [key for key in by_key if home.get(key) is None]
    with memory_told(f"moving adapter {adapter.name!r} to {device}"):
        found = dict(zip(wanted, moved([by_key[k] for k in wanted], device), strict=True)) if wanted else {}
    if device.type != "cpu":
        for key, tensor in found.items():
            remember(tensor, by_key[key])
    places = found | {key: own for key, own in home.items() if own is not None}
    result = Adapter(
        adapter.name,
        {m: replaced(u, places) for m, u in adapter.updates.items()},
        extras=adapter.extras,
        base=adapter.base,
        dtype=adapter.dtype,
        provenance=adapter.provenance,
        notes=adapter.notes,
    )
    result.details = dict(adapter.details)
    return result


def combination(terms: Weighted, name: str | None = None) -> Adapter:
    """The adapter with ``ΔW = Σ_i w_i ΔW_i`` in every module, exactly: ranks add up, scalings go into ``B``.

    A module that an adapter lacks counts as zero. Nothing is computed until the result is used.
    """
    require_one_device([a for _, a in terms])
    base = common_base([a for _, a in terms])
    modules = list(dict.fromkeys(m for _, a in terms for m in a.updates))
    updates = {m: combine_updates([(w, a.updates[m]) for w, a in terms if m in a.updates], m) for m in modules}
    return Adapter(
        name or expression([(w, a.name) for w, a in terms]),
        updates,
        extras=combine_extras(terms),
        base=base,
        dtype=widest(a.dtype for _, a in terms),
        provenance={"sum": [{"weight": w, "of": a.provenance} for w, a in terms], "semantics": "exact"},
        notes=list(dict.fromkeys(n for _, a in terms for n in a.notes)),
    )
