"""Pools of everything at once, beside the dense updates that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pools
import torch
from builders import gaussian
from torch import Tensor

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.updates import Update, with_rank_zero
from fastlora.merging import registry

SHAPES = {"wide": (12, 31), "tall": (26, 9), "small": (7, 7)}


def part(module: str, rank: int, seed: int, dtype: torch.dtype = torch.float64, scaling: float = 1.0) -> pools.Part:
    n, m = SHAPES[module]
    return gaussian(n, rank, seed=seed, dtype=dtype), gaussian(rank, m, seed=seed + 1, dtype=dtype), scaling


def mixed_pool(*, dtype: torch.dtype | None = None) -> Pool:
    """Five adapters: ragged ranks and scalings, a zero one, a duplicate, a rank above a side, gaps and a rank of 0.

    Every adapter has another dtype, or all have ``dtype``.
    """

    def own(other: torch.dtype) -> torch.dtype:
        return other if dtype is None else dtype

    first = {
        "wide": part("wide", 3, 10, own(torch.float32), 2.0),
        "tall": part("tall", 5, 20, own(torch.float32), -0.5),
        "small": part("small", 9, 30, own(torch.float32)),
    }
    zero = {"tall": (torch.zeros(26, 4, dtype=own(torch.float32)), *part("tall", 4, 40, own(torch.float32), 3.0)[1:])}
    half = {"wide": part("wide", 1, 50, own(torch.float16), 0.25), "tall": part("tall", 2, 60, own(torch.float16))}
    brain = {"wide": part("wide", 6, 70, own(torch.bfloat16)), "small": part("small", 2, 80, own(torch.bfloat16))}
    adapters = [
        pools.make_adapter(name, parts)
        for name, parts in (("first", first), ("zero", zero), ("half", half), ("brain", brain), ("again", first))
    ]
    adapters[3] = with_module(adapters[3], "tall", with_rank_zero(adapters[0].updates["tall"]))
    return Pool(adapters)


def with_module(adapter: Adapter, module: str, update: Update) -> Adapter:
    return Adapter(adapter.name, {**adapter.updates, module: update}, dtype=adapter.dtype)


WEIGHTS = {"first": 0.7, "zero": 2.0, "half": -1.5, "brain": 1.0, "again": 0.0}


def dense(pool: Pool, module: str, weights: Mapping[str, float] | None = None) -> Tensor:
    """``w_i ΔW_i`` of all adapters of the pool in float64: ``[k, n, m]``."""
    n, m = next(a.updates[module].shape for a in pool.adapters if module in a)
    return torch.stack([
        (1.0 if weights is None else weights.get(a.name, 0.0))
        * (pools.exact(a.updates[module]) if module in a else torch.zeros(n, m, dtype=torch.float64))
        for a in pool.adapters
    ])  # fmt: skip


def distance(found: Adapter, module: str, expected: Tensor) -> float:
    """Relative to what is expected, in the Frobenius norm; absolute where that is zero."""
    error = float((pools.exact(found.updates[module]) - expected).norm())
    return error / (float(expected.norm()) or 1.0)


@contextmanager
def registered(decorate: Callable[[Any], Any], program: Callable[..., Any]) -> Iterator[str]:
    """The name of a method that exists inside the block."""
    decorate(program)
    try:
        yield program.__name__
    finally:
        registry.unregister(program.__name__)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank."""
    U, sigma, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vt[:rank]


def noise(dtypes: Sequence[torch.dtype]) -> float:
    """Relative size below which singular values are not known from factors of these dtypes, MATH section 2."""
    return max([1e-6, *(torch.finfo(d).eps for d in dtypes)])


Definition = Callable[[Tensor, Tensor, float], Tensor]
"""``(w_i ΔW_i [k, n, m], weights [k], noise) → merged [n, m]``; ``noise``: relative size of what is not significant."""


def require_parity(
    method: str, definition: Definition, tolerance: float, /, *, without: Sequence[str] = (), **parameters: Any
) -> None:
    """A method on pools of every kind, in float64 and float32, of mixed dtypes and bfloat16, against its definition.

    Weights are 1 in float64, and differ in size and sign elsewhere. The pools have ragged ranks, scalings, gaps,
    duplicates, zero and rank-deficient updates. An error is relative to the longest of the result and the updates,
    which may cancel. ``without``: kinds of pools for which the result is not unique.
    """
    for kind, make in ((kind, make) for kind, make in pools.POOLS.items() if kind not in without):
        for dtype, given in ((torch.float64, (1.0, 1.0, 1.0)), (torch.float32, (0.5, -1.0, 2.0))):
            pool = pools.make_pool(pools.cast(make(3), dtype))
            weights = dict(zip(pool.names, given, strict=True))
            _require_parity(method, definition, tolerance, pool, weights, noise([dtype]), kind, parameters)
    for some in (None, torch.bfloat16):
        pool = mixed_pool(dtype=some)
        coarse = noise([torch.bfloat16])
        _require_parity(method, definition, tolerance, pool, WEIGHTS, coarse, f"mixed {some}", parameters)


def _require_parity(
    method: str,
    definition: Definition,
    tolerance: float,
    pool: Pool,
    weights: Mapping[str, float],
    coarse: float,
    what: str,
    parameters: Mapping[str, Any],
) -> None:
    merged = fl.merge(pool, weights, method=method, **parameters)
    given = torch.tensor([weights[n] for n in pool.names], dtype=torch.float64)
    assert merged.modules == pool.modules and merged.name == method
    for module in pool.modules:
        deltas = dense(pool, module, weights)
        present = [d for a in pool.adapters if module in a for d in a.updates[module].dtypes()]
        expected = definition(deltas, given, min(coarse, noise(present)))
        error = float((pools.exact(merged.updates[module]) - expected).norm())
        size = max(float(expected.norm()), float(deltas.flatten(1).norm(dim=1).max()))
        assert error <= tolerance * size, f"{method} of {what}, {weights}, {module}: {error / size:.1e}"


def forms(deltas: Tensor, noise: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """``(U, σ, Vᵀ)`` of every update, without directions that are not significant."""
    found = []
    for delta in deltas:
        U, sigma, Vt = torch.linalg.svd(delta, full_matrices=False)
        count = int((sigma > noise * sigma[0]).sum())
        found.append((U[:, :count], sigma[:count], Vt[:count]))
    return found


def procrustes(columns: Tensor, noise: float) -> Tensor:
    """``P Qᵀ`` of ``X = P S Qᵀ``, over the directions that are significant."""
    U, sigma, Vt = torch.linalg.svd(columns, full_matrices=False)
    count = int((sigma > noise * sigma[0]).sum()) if len(sigma) else 0
    return U[:, :count] @ Vt[:count]
