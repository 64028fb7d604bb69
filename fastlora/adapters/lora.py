"""LoRA adapters: low-rank updates with exact arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastlora import formats
from fastlora.core.data import LoraData
from fastlora.core.dtypes import widest
from fastlora.core.sums import combine_extras, combine_updates, common_base, require_one_device
from fastlora.core.updates import Update, distinct, replaced
from fastlora.core.vector_space import VectorSpace, expression
from fastlora.engine.buffers import moved_once
from fastlora.engine.materialise import materialise
from fastlora.engine.spectrum import check_cut, cut, singular_forms
from fastlora.errors import InputError
from fastlora.runtime import devices
from fastlora.runtime.devices import memory_told


class Adapter(LoraData, VectorSpace):
    """A low-rank adapter: one :class:`Update` per module of the base model, named by its path in it.

    Arithmetic is exact on ``ΔW``: ``0.7 * a + 0.3 * b - c`` concatenates factors (MATH section 4, *exact*) and
    computes nothing until the result is saved or looked at.
    """

    kind = "a LoRA adapter"

    def to(self, device: torch.device | str) -> Adapter:
        """The adapter on a device (``"cpu"``, ``"cuda"``, ``"cuda:1"``), by one copy; itself where it is there.

        Extras stay on the host. A matrix that came from the host is not copied back: its original is taken.
        """
        target = devices.parse(device) or self.device
        if self.device == target:
            return self
        with memory_told(f"moving adapter {self.name!r} to {target}"):
            places = moved_once(distinct(self.updates.values()), target)
        return replace(self, updates={m: replaced(u, places) for m, u in self.updates.items()})

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
        return materialise([self.update(module).baked()], torch.float32)[0]

    def delta(self, module: str) -> Tensor:
        """Dense ``ΔW [out, in]`` of one module, float32, scaling included. For tests and small models."""
        left, right = self.factors(module)
        return (left.double() @ right.double()).float()

    def compress(self, rank: int | None = None, *, energy: float | None = None) -> Adapter:
        """The best approximation of every ``ΔW`` at a rank or a share of its energy: see :func:`fastlora.compress`."""
        check_cut(rank, energy)
        forms = singular_forms(self.name, self.updates, rank=rank, energy=energy)
        total = sum(f.norm**2 for f in forms.values())
        kept = sum(f.retained * f.norm**2 for f in forms.values())
        return replace(
            self,
            updates={m: cut(u, forms[m]) for m, u in self.updates.items()},
            provenance={
                "compress": self.provenance,
                "rank": rank,
                "energy": energy,
                "retained_energy": kept / total if total > 0 else 1.0,
            },
            details={"retained_energy": {m: f.retained for m, f in forms.items()}},
        )

    def save(self, path: str | Path, *, dtype: torch.dtype | str | None = None, overwrite: bool = False) -> Path:
        """Writes a PEFT directory, atomically. ``dtype=None`` keeps the widest dtype of the inputs."""
        return formats.save(self, Path(path), dtype=dtype, overwrite=overwrite)

    def without_extras(self) -> Adapter:
        """The adapter's low-rank updates alone, without biases and replaced modules."""
        base = replace(self.base, modules_to_save=(), bias="none")
        return replace(self, extras={}, base=base, provenance={"without_extras": self.provenance}, details={})

    @classmethod
    def weighted_sum(cls, terms: Sequence[tuple[float, Adapter]], name: str | None = None) -> Adapter:
        """``ΔW = Σ w_i ΔW_i`` in every module, exactly: ranks add up, scalings go into ``B``.

        A module that an adapter lacks counts as zero. Nothing is computed until the result is used.
        """
        adapters = [a for _, a in terms]
        require_one_device(adapters)
        modules = list(dict.fromkeys(m for a in adapters for m in a.updates))
        return cls(
            name or expression([(w, a.name) for w, a in terms]),
            {m: combine_updates([(w, a.updates[m]) for w, a in terms if m in a.updates], m) for m in modules},
            extras=combine_extras(terms),
            base=common_base(adapters),
            dtype=widest(a.dtype for a in adapters),
            provenance={"sum": [{"weight": w, "of": a.provenance} for w, a in terms], "semantics": "exact"},
            notes=tuple(dict.fromkeys(n for a in adapters for n in a.notes)),
        )
