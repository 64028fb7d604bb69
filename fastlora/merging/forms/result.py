"""What every merged adapter has beside its updates: extras, base, dtype, provenance, notes, retained energy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.data import Extra
from fastlora.core.dtypes import widest
from fastlora.core.sums import combine_extras, common_base
from fastlora.core.updates import Update
from fastlora.engine import shares
from fastlora.engine.checks import LARGEST
from fastlora.errors import InputError

Squares = Mapping[str, tuple[float, float]]
"""``{module: (Σσ² that is kept, Σσ² of all)}``."""


ByModule = dict[str, tuple[Update, float, float]]
"""``{module: (its update, Σσ² that is kept, Σσ² of all)}``."""


def of_modules(
    what: str, merged: Callable[[], ByModule], pool: Pool
) -> tuple[dict[str, Update], dict[str, tuple[float, float]]]:
    """The updates of all modules, and what a cut has kept, in the order of the pool. ``merged`` computes those of this
    rank where several work together, and all others'."""
    found = shares.each(what, merged, pool.adapters)
    return {m: found[m][0] for m in pool.modules}, {m: found[m][1:] for m in pool.modules}


def largest_rank(pool: Pool) -> int:
    """The largest rank of the pool."""
    return max((u.rank for a in pool.adapters for u in a.updates.values()), default=1)


def retained(squares: Squares) -> tuple[float, dict[str, float]]:
    """The share of ``Σσ²`` that is kept, of all modules together and of each; 1 where there is nothing."""
    kept, total = (sum(pair[i] for pair in squares.values()) for i in range(2))
    return kept / total if total > 0 else 1.0, {m: k / t if t > 0 else 1.0 for m, (k, t) in squares.items()}


def merged_adapter(
    name: str,
    pool: Pool,
    weights: Sequence[float],
    updates: Mapping[str, Update],
    parameters: Mapping[str, object],
    *,
    squares: Squares | None = None,
    extras: Mapping[str, Extra] | None = None,
) -> Adapter:
    """The adapter that a method made of a pool.

    Args:
        name: of the method.
        weights: of the adapters, in the order of the pool.
        updates: of all modules of the pool.
        parameters: what the method was given, for the provenance.
        squares: what a cut has kept, where there was one.
        extras: by default the sums with the weights.
    """
    adapters = pool.adapters
    terms = list(zip(weights, adapters, strict=True))
    provenance: dict[str, object] = {
        "merge": name,
        "parameters": {key: value for key, value in parameters.items() if value is not None},
        "of": [{"weight": w, "of": a.provenance} for w, a in terms],
    }
    details: dict[str, object] = {}
    if squares is not None:
        provenance["retained_energy"], details["retained_energy"] = retained(squares)
    return Adapter(
        name,
        {m: updates[m] for m in pool.modules},
        extras=combine_extras(terms) if extras is None else extras,
        base=common_base(adapters),
        dtype=widest(a.dtype for a in adapters),
        provenance=provenance,
        notes=tuple(dict.fromkeys(n for a in adapters for n in a.notes)),
        details=details,
    )


def rescaled(
    merged: Adapter, pool: Pool, weights: Mapping[str, float], factor: float, parameters: Mapping[str, object]
) -> Adapter:
    """``factor`` times a result: updates and what stands beside them. ``parameters``: all that the method was given."""
    updates = {
        m: replace(u, scaling=factor * u.scaling, noise=u.noise.scaled(factor)) for m, u in merged.updates.items()
    }
    extras = combine_extras([(factor * weights[a.name], a) for a in pool.adapters])
    told = {key: value for key, value in parameters.items() if value is not None}
    provenance = {**merged.provenance, "parameters": told, "scale": factor}
    return replace(merged, updates=updates, extras=extras, provenance=provenance)


def require_energy(name: str, squares: Squares, least: float, rank: int | None) -> None:
    """Refuses a result that keeps less than ``least`` of the energy."""
    share, by_module = retained(squares)
    if share >= least:
        return
    worst = min(by_module, key=by_module.__getitem__)
    cut = "this cut" if rank is None else f"rank {rank}"
    raise InputError(
        f"method {name!r}: {cut} keeps {share:.3g} of Σσ² of the merged ΔW (the least {by_module[worst]:.3g}, of "
        f"{worst}), below min_energy={least:g}: a rule on elements makes matrices of full rank. Choose a larger rank, "
        f"let energy={least:g} (`--energy {least:g}`) find it, or accept the loss with a smaller min_energy "
        f"(`--min-energy {math.floor(share * 100) / 100:g}`)"
    )


def check_result(name: str, modules: Sequence[str], result: Tensor, shape: tuple[int, ...]) -> None:
    """Refuses what a method returned for some modules unless it is of ``shape``, modules first, and its squares do not
    overflow."""
    if tuple(result.shape) != shape or result.dtype != torch.float64:
        raise TypeError(f"method {name!r}: a float64 {list(shape)} is needed, not {result.dtype} {list(result.shape)}")
    bad = (~(result.abs() <= LARGEST)).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise too_large(name, modules[bad[0]])


def too_large(name: str, module: str) -> InputError:
    """What is said of a result that overflows."""
    return InputError(
        f"method {name!r}: the result for {module} is too large or not finite; change the weights or its parameters"
    )
