"""The updates of one module as a :class:`~fastlora.ops.merge_tiles.TileTask`: stored factors as they lie, and the dtype
in which their elements are formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.adapters.pool import Pool
from fastlora.core.factors import Factor
from fastlora.core.updates import Update
from fastlora.engine.materialise import is_rounding, materialise
from fastlora.errors import InputError
from fastlora.ops.merge_tiles import TileTask

Pair = tuple[Tensor, Tensor]

# What float32 forms without overflow, and without loss where numbers are far smaller than the largest.
FLOAT32_RANGE = 1e-16, 1e16
MOST = 1e300  # of an element in float64


def task_of(pool: Pool, module: str, chosen: Sequence[int], weights: Sequence[float]) -> TileTask:
    """The ``ΔW_i`` of some adapters of a pool in one module; one that lacks it is zero.

    Elements are float32 where all factors are stored in float32 or half precision and all sizes are ordinary. What is
    computed (a sum of terms, cancellations among them), stored in float64, very large or very small gets float64.

    Raises :class:`InputError` for weights (of all ``chosen``) that make elements overflow.
    """
    present = set(pool.present(module))
    updates = [pool.adapters[i].updates[module] if i in present else None for i in chosen]
    shape = next(pool.adapters[i].updates[module].shape for i in present)
    found = _stored(updates)
    narrow = found is not None
    pairs, scales = found or _computed(updates)
    sizes = [0.0 if p is None else abs(s) * float(p[0].shape[1]) for p, s in zip(pairs, scales, strict=True)]
    for i, pair in enumerate(pairs):
        if pair is None or not sizes[i]:
            continue
        left, right = _largest(pair[0]), _largest(pair[1])
        narrow = narrow and all(_is_ordinary(x) for x in (left, right, left * scales[i], left * right * scales[i]))
        sizes[i] *= left * right
    narrow = narrow and all(_is_ordinary(w) for w in weights)
    if not sum(abs(w) * size for w, size in zip(weights, sizes, strict=True)) < MOST:
        raise InputError(f"the weighted updates of {module} overflow: lower the weights")
    return TileTask(pairs, scales, shape, torch.float32 if narrow else torch.float64)


def _is_ordinary(size: float) -> bool:
    least, most = FLOAT32_RANGE
    return size == 0.0 or least <= abs(size) <= most


def _largest(x: Tensor) -> float:
    return float(x.abs().amax()) if x.numel() else 0.0


def _stored(updates: Sequence[Update | None]) -> tuple[list[Pair | None], list[float]] | None:
    """The stored factors and scales of updates of which none has to be computed, or ``None``."""
    pairs: list[Pair | None] = []
    scales: list[float] = []
    for update in updates:
        if update is None or not update.rank:
            pairs.append(None)
            scales.append(0.0)
            continue
        B, A = stored_source(update.B), stored_source(update.A)
        if B is None or A is None or torch.float64 in (B[0].dtype, A[0].dtype):
            return None
        pairs.append((B[0], A[0]))
        scales.append(update.scaling * B[1] * A[1])
    return pairs, scales


def stored_source(factor: Factor) -> tuple[Tensor, float] | None:
    """The stored matrix of which a factor is a multiple, and by what; ``None`` where it has to be computed."""
    if len(factor.terms) != 1:
        return None
    (term,) = factor.terms
    whole = term.coefficient is None and tuple(term.source.shape) == factor.shape
    return (term.source, term.scale) if whole else None


def _computed(updates: Sequence[Update | None]) -> tuple[list[Pair | None], list[float]]:
    """All factors in float64; what is nothing but rounding is zero."""
    there = [u for u in updates if u is not None and u.rank]
    made = iter(materialise(there, torch.float64)) if there else iter(())
    pairs: list[Pair | None] = []
    scales: list[float] = []
    for update in updates:
        pair = None if update is None or not update.rank else next(made)
        if update is None or pair is None or is_rounding(update.B, pair[0]) or is_rounding(update.A, pair[1]):
            pairs.append(None)
            scales.append(0.0)
        else:
            pairs.append(pair)
            scales.append(update.scaling)
    return pairs, scales
