"""PEM (arXiv 2306.14870): addition, negation and analogy of adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from fastlora.adapters.alignment import aligned
from fastlora.adapters.lora import Adapter
from fastlora.core.dtypes import widest
from fastlora.core.factors import add as add_factors
from fastlora.core.sums import combine_extras, common_base
from fastlora.core.updates import Update, joint_noise
from fastlora.core.vector_space import VectorSpace, expression, linear, require_one_kind
from fastlora.engine.checks import require_finite
from fastlora.errors import InputError

SEMANTICS = ("exact", "pem")

X = TypeVar("X", bound=VectorSpace)


def add(elements: Sequence[X], weights: Sequence[float] | None = None, *, semantics: str = "exact") -> X:
    """Adds adapters of one kind with weights (PEM, arXiv 2306.14870; MATH section 4).

    ``"exact"`` is ``Σ_i w_i x_i``. Here ``x`` is ``ΔW`` (LoRA), ``l − 1`` ((IA)³) or the change of every parameter
    (task vectors). ``"pem"`` works elementwise on the stored parameters, with ``λ_i = w_i / Σ_j w_j``:

        B = Σ_i λ_i B_i,  A = Σ_i λ_i A_i         LoRA: ΔW = s B A, MATH (10b), and not Σ_i λ_i ΔW_i
        l = Σ_i λ_i l_i,  θ − θ₀ = Σ_i λ_i (θ_i − θ₀)     (IA)³, task vectors

    Args:
        elements: one adapter at the least, all LoRA, all (IA)³ or all task vectors.
        weights: one finite number for each; 1 by default, so that ``"pem"`` takes the mean.
        semantics: ``"exact"`` or ``"pem"``.

    Returns:
        An adapter of the same kind. LoRA: with ``"exact"`` the rank of a module is ``Σ_i r_i`` and what one adapter
        lacks counts as zero; with ``"pem"`` shapes and ranks stay; the dtype is the widest. (IA)³ vectors are float64
        until they are saved, task vectors float32 (float64 where the models are). ``provenance`` has the semantics.

    Raises:
        InputError: no adapters, mixed kinds or shapes, weights that are not finite or not one for each, biases or
            replaced modules that cannot be summed; with ``"pem"``, a sum of weights of 0 or less, or LoRA adapters
            whose modules, ranks or scalings differ.

    Cost: nothing for LoRA until the result is used, then one read of all factors. The other kinds are summed at once.
    """
    _check(elements, semantics)
    if weights is not None and len(weights) != len(elements):
        raise InputError(f"add: {len(elements)} adapters and {len(weights)} weights; give one weight for each adapter")
    given = [1.0] * len(elements) if weights is None else [float(w) for w in weights]
    if semantics == "exact":
        return linear(zip(given, elements, strict=True))
    for weight, element in zip(given, elements, strict=True):
        _check_number(weight, f"the weight of {element.name!r}")
    total = sum(given)
    if not total > 0:
        raise InputError(
            f"add: the weights {given} sum to {total:g}, and the semantics 'pem' divides by their sum, which must be "
            "above 0; use semantics='exact', which does not"
        )
    shares = [w / total for w in given]
    name = expression(list(zip(shares, (e.name for e in elements), strict=True)))
    terms = list(zip(shares, shares, elements, strict=True))
    result = _elementwise(terms, f"pem({name})", "addition")
    if weights is not None and not math.isclose(total, 1.0, rel_tol=1e-9):
        return replace(result, notes=(*result.notes, f"pem: the weights were divided by their sum {total:g}"))
    return result


def negate(element: X, strength: float = 1.0, *, semantics: str = "exact") -> X:
    """Turns an adapter around, so that applying it forgets what it taught (PEM, arXiv 2306.14870; MATH section 4).

        ΔW → −λ ΔW             LoRA: the sign and λ go to the side of B, A stays as it is
        l → (1 + λ) − λ l      (IA)³: 2 − l at λ = 1
        θ − θ₀ → −λ (θ − θ₀)   task vectors

    Args:
        element: a LoRA adapter, an (IA)³ adapter or a task vector.
        strength: ``λ``, a finite number.
        semantics: ``"exact"`` or ``"pem"``. Both give the same numbers; ``provenance`` has the name.

    Returns:
        An adapter of the same kind, modules, shapes and ranks. LoRA keeps its dtype, (IA)³ vectors are float64 until
        they are saved.

    Raises:
        InputError: an unknown semantics, something that is no adapter, a strength that is not finite, replaced
            modules, which cannot be scaled.

    Cost: nothing for LoRA until the result is used; the other kinds are scaled at once.
    """
    _check([element], semantics)
    _check_number(strength, "negate: the strength")
    provenance = {"negate": element.provenance, "strength": strength, "semantics": semantics}
    return replace(linear([(-strength, element)]), provenance=provenance)


def analogy(
    first: X,
    second: X,
    third: X,
    c0: float | None = None,
    c1: float | None = None,
    *,
    semantics: str = "exact",
) -> X:
    """Carries a skill to another domain: the result is to ``first`` as ``second`` is to ``third``.

    The source is PEM (arXiv 2306.14870), MATH section 4. In the paper's domain transfer ``first`` is the classifier
    trained on the auxiliary domain, ``second`` the language model of the target domain and ``third`` that of the
    auxiliary one.

        ΔW = c_0 ΔW_1 + c_1 (ΔW_2 − ΔW_3)                                     LoRA, "exact"
        B = c_0 B_1 + c_1 B_2 − c_1 B_3,  A = c_0 A_1 + c_1 A_2 + c_1 A_3     LoRA, "pem": only B is negated
        l = (1 − c_0) + c_0 l_1 + c_1 (l_2 − l_3)                             (IA)³, both
        τ = c_0 τ_1 + c_1 (τ_2 − τ_3)                                         task vectors, both

    Args:
        first, second, third: adapters of one kind.
        c0, c1: finite numbers; by default 1 with ``"exact"`` and 1/2 with ``"pem"``.
        semantics: ``"exact"`` or ``"pem"``.

    Returns:
        An adapter of the same kind. LoRA: with ``"exact"`` the rank of a module is ``r_1 + r_2 + r_3`` and what one
        adapter lacks counts as zero; with ``"pem"`` shapes and ranks stay; the dtype is the widest. (IA)³ vectors are
        float64 until they are saved, task vectors float32 (float64 where the models are).

    Raises:
        InputError: an unknown semantics, mixed kinds or shapes, coefficients that are not finite, biases or replaced
            modules that cannot be summed; with ``"pem"``, LoRA adapters whose modules, ranks or scalings differ.

    Cost: nothing for LoRA until the result is used, then one read of all factors. The other kinds are summed at once.
    """
    elements = [first, second, third]
    _check(elements, semantics)
    default = 1.0 if semantics == "exact" else 0.5
    c0, c1 = (default if c is None else float(c) for c in (c0, c1))
    for name, value in (("c0", c0), ("c1", c1)):
        _check_number(value, f"analogy: {name}")
    if semantics == "pem":
        label = f"pem({expression([(c0, first.name), (c1, second.name), (-c1, third.name)])})"
        return _elementwise([(c0, c0, first), (c1, c1, second), (-c1, c1, third)], label, "analogy")
    result = linear([(c0, first), (c1, second), (-c1, third)])
    provenance = {"analogy": [e.provenance for e in elements], "c0": c0, "c1": c1, "semantics": "exact"}
    return replace(result, provenance=provenance)


def _check(elements: Sequence[VectorSpace], semantics: str) -> None:
    if semantics not in SEMANTICS:
        raise InputError(f"semantics={semantics!r} does not exist: use one of {', '.join(SEMANTICS)}")
    if not elements:
        raise InputError("add: no adapter was given")
    other = next((e for e in elements if not isinstance(e, VectorSpace)), None)
    if other is not None:
        raise InputError(
            f"an adapter is needed, not a {type(other).__name__}; load it with `fl.load` (a pool: .adapters)"
        )
    require_one_kind(elements)


def _check_number(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise InputError(f"{what} is {value}: it must be a finite number")


def _elementwise(terms: Sequence[tuple[float, float, X]], name: str, operation: str) -> X:
    """``B = Σ β_i B_i``, ``A = Σ α_i A_i`` for ``(β, α, adapter)``; other kinds have one parameter, weighted ``β``."""
    kept = [(b, a, x) for b, a, x in terms if (b, a) != (0.0, 0.0)] or list(terms)
    first = kept[0][2]
    used: list[dict[str, object]] = [{"weight": b, "of": x.provenance} for b, _, x in terms]
    if isinstance(first, Adapter):
        require_finite(x for b, a, x in terms if (b, a) == (0.0, 0.0) and isinstance(x, Adapter))
        result: X = _elementwise_lora(kept, name)  # type: ignore[arg-type, assignment]
        used = [{"weight_A": a, **term} for (_, a, _), term in zip(terms, used, strict=True)]
    else:
        result = linear([(b, x) for b, _, x in kept], name)
    return replace(result, provenance={operation: used, "semantics": "pem"})


def _elementwise_lora(terms: Sequence[tuple[float, float, Adapter]], name: str) -> Adapter:
    adapters, told = aligned([x for _, _, x in terms])
    base = common_base(adapters)
    first = adapters[0]
    for other in adapters[1:]:
        _require_correspondence(first, other)
    updates: dict[str, Update] = {}
    terms = [(b, a, x) for (b, a, _), x in zip(terms, adapters, strict=True)]
    for module, like in first.updates.items():
        updates_here = [x.updates[module] for x in adapters]
        left = add_factors(u.B.scaled(b) for (b, _, _), u in zip(terms, updates_here, strict=True))
        right = add_factors(u.A.scaled(a) for (_, a, _), u in zip(terms, updates_here, strict=True))
        noise = joint_noise(u.noise.scaled(b) for (b, _, _), u in zip(terms, updates_here, strict=True))
        updates[module] = replace(like, B=left, A=right, noise=noise)
    return Adapter(
        name,
        updates,
        extras=combine_extras([(b, x) for b, _, x in terms]),
        base=base,
        dtype=widest(a.dtype for a in adapters),
        notes=tuple(dict.fromkeys([*(n for a in adapters for n in a.notes), *told])),
    )


def _require_correspondence(first: Adapter, other: Adapter) -> None:
    """Refuses factors that cannot be added elementwise, or whose sum would not mean what the paper's does."""
    names = f"{first.name!r} and {other.name!r}"
    out = "use the semantics 'exact' (linear in ΔW), which has no such limit"
    lacking = [m for m in first.modules if m not in other] or [m for m in other.modules if m not in first]
    if lacking:
        raise InputError(f"pem: only one of {names} adapts {lacking[0]}, so there is no factor to add; {out}")
    for module in first.modules:
        one, two = first.updates[module], other.updates[module]
        if one.shape != two.shape or one.layout != two.layout:
            raise InputError(
                f"pem: {module} is {one.shape[0]}×{one.shape[1]} in {first.name!r} and {two.shape[0]}×{two.shape[1]} "
                f"in {other.name!r}: these adapters are of different base models"
            )
        if one.rank != two.rank:
            raise InputError(
                f"pem: {module} has rank {one.rank} in {first.name!r} and {two.rank} in {other.name!r}, and factors of "
                f"different ranks cannot be added elementwise; {out}"
            )
        if not math.isclose(one.scaling, two.scaling, rel_tol=1e-12):
            raise InputError(
                f"pem: {module} has the scaling {one.scaling:g} in {first.name!r} and {two.scaling:g} in "
                f"{other.name!r}, so equal weights would not weigh them equally; {out}, or save both with the scaling "
                "inside the factors (`adapter.save`)"
            )
