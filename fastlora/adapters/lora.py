"""LoRA adapters: low-rank updates with exact arithmetic."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastlora import formats
from fastlora.adapters.tensors import tensors_of, updates_of
from fastlora.core.data import BaseInfo, LoraData
from fastlora.core.dtypes import parse_dtype, widest
from fastlora.core.float64 import of_float64
from fastlora.core.inert import NO_CHANGE, note_on_zeros
from fastlora.core.names import check_name
from fastlora.core.sums import combine_extras, combine_updates, common_base, require_one_device
from fastlora.core.updates import Update, distinct, replaced
from fastlora.core.vector_space import VectorSpace, expression
from fastlora.engine.buffers import moved_once
from fastlora.engine.checks import require_finite
from fastlora.engine.materialise import materialise
from fastlora.engine.spectrum import check_cut, cut_updates
from fastlora.errors import InputError
from fastlora.files.earlier import Overwrite
from fastlora.runtime import devices
from fastlora.runtime.devices import memory_told


class Adapter(LoraData, VectorSpace):
    """A LoRA adapter: one update ``ΔW = s B A`` for every adapted module of the base model.

    ``B [n, r]``, ``A [r, m]`` and the scaling ``s`` belong to a module, which is named by its path in the model. The
    rank ``r`` may differ between modules. :func:`fastlora.load` makes adapters from files.

    Arithmetic is exact on ``ΔW`` (MATH section 4): ``0.7 * a + 0.3 * b - c / 2`` puts the factors side by side, so that
    ranks add up. It computes nothing until the result is saved or looked at; :meth:`compress` cuts the rank again.
    The operators raise :class:`InputError` for different kinds, shapes, layouts or devices, for weights that are not
    finite, and for biases or replaced modules that cannot be summed.

    Args:
        name: what messages and expressions call it.
        updates: ``{module: update}``, in the order of the file.
        extras: ``{parameter: extra}``: biases and replaced modules, which are no ``[n, m]`` update.
        base: what the adapter says about its base model.
        dtype: what the adapter is saved in by default: float16, bfloat16 or float32. Factors keep their own dtypes.
        provenance: how the adapter came about, as plain data; it is saved with the adapter.
        notes: what a user should know about the result, in sentences.
        details: what was measured while it was made, by name; it is not saved.
    """

    kind = "a LoRA adapter"

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, tuple[Tensor, Tensor] | tuple[Tensor, Tensor, float]],
        *,
        name: str = "adapter",
        base: str | None = None,
        embeddings: Collection[str] = (),
    ) -> Adapter:
        """An adapter on tensors in memory: ``ΔW = s B A`` for every module. Tensors are not copied.

        Args:
            tensors: ``{module: (B, A)}`` or ``{module: (B, A, s)}``; ``s`` is 1 where it is left out (LoRA's
                ``lora_alpha / r``). ``B [n, r]`` and ``A [r, m]`` are float16, bfloat16, float32 or float64, on any
                device. A convolution has ``B [n, r, 1, …]`` and ``A [r, channels, *kernel]``. Modules are named by
                their paths in the model, without prefixes of a file format.
            name: what messages, expressions and outputs call it.
            base: what it names as its base model: a Hub id or a path.
            embeddings: the modules that are embeddings, whose weight is ``[vocabulary, dim]``. They have
                ``B [dim, r]`` and ``A [r, vocabulary]``, and PEFT keeps them under other names.

        Returns:
            The adapter. It holds views of the tensors, which must not be changed while it is in use; only a tensor
            whose rows are not contiguous is copied. NaN and Inf are found when it is computed with or saved.

        Raises:
            InputError: no module, shapes that do not fit, other dtypes, a scaling that is not finite, tensors on
                different devices, a name that cannot be a folder.

        Cost: of factors on the CPU, a row of one is looked at: ``notes`` tell of an adapter that changes nothing.
        """
        check_name(name)
        updates = updates_of(tensors, embeddings)
        dtype = widest(d for u in updates.values() for d in u.dtypes())
        adapter = cls(name, updates, base=BaseInfo(model=base), dtype=dtype)
        on_host = adapter.device.type == "cpu"  # looking at a device's tensors would wait for it
        return replace(adapter, notes=tuple(note_on_zeros(name, updates.values()))) if on_host else adapter

    def tensors(
        self, dtype: torch.dtype | str | None = None, uniform_rank: int | bool | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """``{module: (B, A)}`` with ``ΔW = B A``: the scaling is inside ``B``. All modules are computed in one pass.

        Args:
            dtype: of the result, as when saving; by default ``.dtype`` of the adapter, float32 for float64.
            uniform_rank: ``True`` fills every module with zeros up to the largest rank, a number up to that rank, for
                readers that take one rank only. By default ranks are what they are, 0 among them.

        Returns:
            ``B [n, r]`` and ``A [r, m]``, for convolutions with their kernel as :meth:`from_tensors` takes them, where
            the adapter is. A factor that is stored in that dtype, and not scaled, is the stored tensor itself. What the
            adapter holds beside its factors is in ``.extras``.

        Raises:
            InputError: an unknown dtype; a ``uniform_rank`` below the adapter's own.

        Cost: one read of all factors and one write of the results.
        """
        return tensors_of(self.updates, parse_dtype(dtype, self.dtype), uniform_rank)

    def to(self, device: torch.device | str) -> Adapter:
        """The adapter with all factors on a device; the adapter itself when it is there already.

        Args:
            device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or a :class:`torch.device`.

        Raises:
            InputError: a device that cannot be used, with the reason.
            DeviceMemoryError: the factors do not fit there.

        Cost: one buffer and one copy. Factors that came from the host are not copied back.
        """
        target = devices.parse(device) or self.device
        if self.place in (None, target):
            return self
        with memory_told(f"moving adapter {self.name!r} to {target}"):
            moved_tensors = moved_once(distinct(self.updates.values()), target)
        return replace(self, updates={m: replaced(u, moved_tensors) for m, u in self.updates.items()})

    def __repr__(self) -> str:
        ranks = sorted({u.rank for u in self.updates.values()})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}" if ranks else "–"
        return f"Adapter({self.name!r}, {len(self.updates)} modules, rank {span}, {str(self.dtype)[6:]})"

    def update(self, module: str) -> Update:
        """The update of one ``module``, in factors. Raises :class:`InputError` for a module that is not adapted."""
        try:
            return self.updates[module]
        except KeyError:
            close = [m for m in self.updates if m.endswith(module.rsplit(".", 1)[-1])][:3]
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise InputError(
                f"adapter {self.name!r} has no module {module!r}{hint} (`.modules` lists all {len(self.updates)})"
            ) from None

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """``(B [n, r], A [r, m])`` of one ``module`` with ``ΔW = B A``: float32, the scaling inside ``B``.

        Raises :class:`InputError` for a module that is not adapted. Reads the module's factors once.
        """
        return materialise([self.update(module).baked()], torch.float32)[0]

    def delta(self, module: str) -> Tensor:
        """``ΔW [n, m]`` of one ``module`` as a dense matrix, float32, scaling included. For tests and small models.

        Raises :class:`InputError` for a module that is not adapted. Costs ``2·n·m·r`` operations in float64.
        """
        left, right = self.factors(module)
        device = of_float64(left.device)
        return (left.to(device).double() @ right.to(device).double()).float().to(left.device)

    def compress(self, rank: int | None = None, *, energy: float | None = None) -> Adapter:
        """The best approximation of every ``ΔW`` of at most ``rank``, or with the share ``energy`` of its ``Σσ²``.

        :func:`fastlora.compress` has the formula, the shapes, the cost and what it raises (:class:`InputError`).
        """
        check_cut(rank, energy)
        found = cut_updates(self.name, self.updates, rank=rank, energy=energy)
        sizes = {m: (norm, retained) for m, (_, norm, retained) in found.items()}
        return with_cuts(self, {m: own.update for m, own in found.items()}, sizes, rank, energy)

    def save(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        uniform_rank: int | bool | None = None,
        overwrite: Overwrite = False,
        format: str | None = None,
    ) -> Path:
        """Writes the adapter, atomically: it is complete or not there, and then as it was before. It becomes a PEFT
        directory, or where it comes from a single file, a file of the same format and names.

        Every module is saved with ``B [n, r]``, ``A [r, m]`` and the scaling inside ``B`` (``lora_alpha = r``), so that
        PEFT and readers that take ``r`` from the configuration see the same ``ΔW``. Modules of rank 0 are left out.
        Single files have scales as their readers agree on them (docs/formats.md).

        Args:
            path: the directory to make, or the file, ``NAME.safetensors``.
            dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype; by default the widest of the inputs.
            uniform_rank: ``True`` saves every module with the largest rank, a number with that one; zeros fill the
                smaller ones. It is for readers that divide ``lora_alpha`` by a module's own rank (llama.cpp) or take
                one rank only. By default ranks are what they are, except where PEFT needs one: among experts with
                factors of their own, and under names of older model code.
            overwrite: replace an earlier output of fastlora, known by what its files say; ``"force"`` replaces
                whatever is there.
            format: ``"peft"``, ``"kohya"``, ``"diffusers"``, ``"comfy"``, ``"xlabs"`` or ``"mlx"``, in the dialect in
                which its readers agree; by default the format and the names of the (first) file that it is from.

        Returns:
            ``path``.

        Raises:
            InputError: an unknown dtype, an adapter without modules, a ``uniform_rank`` below the adapter's own; a
                path that is none for the format, modules that the format has no place for or no known name.
            OutputError: a path that exists or cannot be written, a full disk, a number that holds NaN or Inf or that
                overflows ``dtype``.

        Cost: one read of the factors, one write of the result. Memory does not grow with the model.
        """
        return formats.save(
            self, Path(path), dtype=dtype, uniform_rank=uniform_rank, overwrite=overwrite, format=format
        )

    def without_extras(self) -> Adapter:
        """The low-rank updates alone, without biases and replaced modules. No factor is read or copied."""
        base = replace(self.base, modules_to_save=(), bias="none")
        return replace(self, extras={}, base=base, provenance={"without_extras": self.provenance}, details={})

    @classmethod
    def weighted_sum(cls, terms: Sequence[tuple[float, Adapter]], name: str | None = None) -> Adapter:
        """``ΔW = Σ_i w_i ΔW_i`` in every module, exactly: ``B = [w_1 s_1 B_1 | …]`` and ``A = [A_1; …]``.

        The rank of a module is ``Σ_i r_i``; terms of weight 0 add nothing, and are looked at for NaN and Inf. Names of
        modules are aligned as in a :class:`Pool`, and the notes of the sum say how.

        Args:
            terms: ``(w_i, adapter)``, one pair at the least; the weights are finite.
            name: of the sum; by default its expression, such as ``0.7*a - b``.

        Raises:
            InputError: different shapes, layouts, devices or repeated layers; biases or replaced modules that cannot
                be summed.
            NonFiniteError: a factor that holds NaN or Inf, of an adapter whose weight is 0. Others are found when the
                sum is used.

        Cost: no factor is read until the sum is used, except for those of weight 0.
        """
        from fastlora.adapters.one_form import in_one_form  # only sums need it, and every command imports this file

        adapters, told = in_one_form([a for _, a in terms])
        return sum_of_aligned([(w, a) for (w, _), a in zip(terms, adapters, strict=True)], name, told)


def sum_of_aligned(
    terms: Sequence[tuple[float, Adapter]], name: str | None = None, told: Iterable[str] = ()
) -> Adapter:
    """:meth:`Adapter.weighted_sum` of adapters that have one naming and one form, as those of a pool; ``told``: notes
    on how they were brought there."""
    adapters = [a for _, a in terms]
    require_one_device(adapters)
    require_finite(a for w, a in terms if w == 0.0)  # no factor of these is read later
    modules = list(dict.fromkeys(m for a in adapters for m in a.updates))
    return Adapter(
        name or expression([(w, a.name) for w, a in terms]),
        {m: combine_updates([(w, a.updates[m]) for w, a in terms if m in a.updates], m) for m in modules},
        extras=combine_extras(terms),
        base=common_base(adapters),
        dtype=widest(a.dtype for a in adapters),
        provenance={"sum": [{"weight": w, "of": a.provenance} for w, a in terms], "semantics": "exact"},
        notes=tuple(dict.fromkeys([*(n for a in adapters for n in a.notes), *told])),
    )


def with_cuts(
    adapter: Adapter,
    updates: Mapping[str, Update],
    sizes: Mapping[str, tuple[float, float]],
    rank: int | None,
    energy: float | None,
) -> Adapter:
    """An adapter with its ``updates`` as they were cut to ``rank`` or ``energy``; ``sizes``: ``‖ΔW‖`` of each, and the
    share of its ``Σσ²`` that is kept."""
    total = sum(norm**2 for norm, _ in sizes.values())
    kept = sum(retained * norm**2 for norm, retained in sizes.values())
    return replace(
        adapter,
        updates=updates,
        provenance={
            "compress": adapter.provenance,
            "rank": rank,
            "energy": energy,
            "retained_energy": kept / total if total > 0 else 1.0,
        },
        notes=adapter.notes if total > 0 else (*adapter.notes, NO_CHANGE),
        details={"retained_energy": {m: retained for m, (_, retained) in sizes.items()}},
    )
