"""(IA)³ adapters: vectors that rescale what goes into a module or comes out of it (arXiv 2205.05638)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastlora import formats
from fastlora.core.data import Ia3Data, Scaling
from fastlora.core.dtypes import widest
from fastlora.core.sums import combine_extras, common_base
from fastlora.core.vector_space import VectorSpace, expression
from fastlora.errors import InputError
from fastlora.files.earlier import Overwrite


class IA3(Ia3Data, VectorSpace):
    """An (IA)³ adapter (arXiv 2205.05638): a vector ``l`` for every adapted module, which rescales its activations.

    A feed-forward module computes ``y = W (l ∘ x) + b`` with ``l [in]``, any other ``y = l ∘ (W x + b)`` with
    ``l [out]``. Modules are named by their paths in the model. :func:`fastlora.load` makes adapters from files.

    Arithmetic is centred at one, where an adapter changes nothing (MATH section 4): ``Σ_i w_i x_i`` has
    ``l = 1 + Σ_i w_i (l_i − 1)``, so ``-a`` is ``2 − l``. A module that an adapter lacks counts as ``l = 1``. The
    operators raise :class:`InputError` for different kinds or shapes, for weights that are not finite, and for
    replaced modules, which cannot be summed.

    Args:
        name: what messages and expressions call it.
        vectors: ``{module: scaling}``: ``l`` as it is stored, and whether it scales inputs or outputs.
        extras: ``{parameter: extra}``: replaced modules.
        base: what the adapter says about its base model.
        dtype: what the adapter is saved in by default. Results of arithmetic are float64 until then.
        provenance: how the adapter came about, as plain data; it is saved with the adapter.
        notes: what a user should know about the result, in sentences.
        details: what was measured while it was made, by name; it is not saved.
    """

    kind = "an (IA)³ adapter"

    def __repr__(self) -> str:
        return f"IA3({self.name!r}, {len(self.vectors)} modules, {str(self.dtype)[6:]})"

    def vector(self, module: str) -> Tensor:
        """``l`` of one ``module``, flat: float64 ``[in]`` or ``[out]``.

        Raises :class:`InputError` for a module that is not adapted.
        """
        if module not in self.vectors:
            raise InputError(
                f"(IA)³ adapter {self.name!r} has no module {module!r}, which so is not scaled (`.modules` lists all "
                f"{len(self.vectors)})"
            )
        return self.vectors[module].vector.double().flatten()

    def renamed(self, strip: str, put: str) -> IA3:
        """The adapter under module names without the prefix ``strip`` and with ``put`` before them.

        No vector is copied. A name that does not start with ``strip`` only gets ``put`` before it.
        """
        return replace(
            self,
            vectors={put + m.removeprefix(strip): s for m, s in self.vectors.items()},
            extras={put + p.removeprefix(strip): e for p, e in self.extras.items()},
        )

    def without_extras(self) -> IA3:
        """The vectors alone, without replaced modules. No vector is copied."""
        base = replace(self.base, modules_to_save=())
        return replace(self, extras={}, base=base, provenance={"without_extras": self.provenance}, details={})

    def save(self, path: str | Path, *, dtype: torch.dtype | str | None = None, overwrite: Overwrite = False) -> Path:
        """Writes a PEFT directory, atomically: it is complete or not there, and then as it was before.

        Args:
            path: the directory to make.
            dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype; by default the widest of the inputs.
            overwrite: replace an earlier output of fastlora, known by what its files say; ``"force"`` replaces
                whatever is there.

        Returns:
            ``path``.

        Raises:
            InputError: an unknown dtype.
            OutputError: a path that exists or cannot be written, a number that overflows ``dtype``.

        Cost: one write of all vectors.
        """
        return formats.save(self, Path(path), dtype=dtype, overwrite=overwrite)

    @classmethod
    def weighted_sum(cls, terms: Sequence[tuple[float, IA3]], name: str | None = None) -> IA3:
        """``l = 1 + Σ_i w_i (l_i − 1)`` in every module that some adapter has, in float64.

        Names of modules are aligned as in a :class:`Pool`, and the notes of the sum say how.

        Args:
            terms: ``(w_i, adapter)``, one pair at the least; the weights are finite.
            name: of the sum; by default its expression, such as ``0.7*a - b``.

        Raises:
            InputError: vectors of different shapes, or of which one scales inputs and the other outputs; replaced
                modules, which cannot be summed.

        Cost: one read of all vectors.
        """
        from fastlora.adapters.alignment import aligned  # only sums need it, and every command imports this file
        from fastlora.adapters.fused_projections import refuse_two_forms

        adapters, told = aligned([a for _, a in terms])
        refuse_two_forms([(a.name, a.vectors) for a in adapters])
        terms = [(w, a) for (w, _), a in zip(terms, adapters, strict=True)]
        modules = list(dict.fromkeys(m for a in adapters for m in a))
        return cls(
            name or expression([(w, a.name) for w, a in terms]),
            {m: _sum(m, [(w, a) for w, a in terms if m in a]) for m in modules},
            extras=combine_extras(terms),
            base=common_base(adapters),
            dtype=widest(a.dtype for a in adapters),
            provenance={"sum": [{"weight": w, "of": a.provenance} for w, a in terms], "semantics": "exact"},
            notes=tuple(dict.fromkeys([*(n for a in adapters for n in a.notes), *told])),
        )


def check_same(module: str, first: IA3, second: IA3) -> None:
    """Refuses vectors of different shapes, or of which one scales inputs and the other outputs."""
    one, two = first.vectors[module], second.vectors[module]
    if one.shape != two.shape or one.feedforward != two.feedforward:
        raise InputError(
            f"module {module!r}: {first.name!r} scales its {one.scales} ({list(one.shape)}), {second.name!r} its "
            f"{two.scales} ({list(two.shape)}); these adapters are of different base models or were set up differently "
            "(`feedforward_modules`), and their sum is no (IA)³ adapter"
        )


def _sum(module: str, terms: Sequence[tuple[float, IA3]]) -> Scaling:
    first = terms[0][1]
    for _, other in terms[1:]:
        check_same(module, first, other)
    if len(terms) == 1 and terms[0][0] == 1.0:
        return first.vectors[module]
    total = torch.ones(first.vectors[module].shape, dtype=torch.float64)
    for weight, adapter in terms:
        total += weight * (adapter.vectors[module].vector.double() - 1.0)
    return replace(first.vectors[module], vector=total)
