"""The same decomposition by plain torch on the same device: batched products of stacked factors, ``torch.linalg``.

It is given what our passes do not need: modules of one shape, adapters of one rank, factors stacked beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastlora as fl
from fastlora.bench.contest import require
from fastlora.bench.gpu.events import TAU, Sizes, captured, device_seconds
from fastlora.bench.timing import Action
from fastlora.bench.workloads import make_pool
from fastlora.core.factors import Side
from fastlora.core.updates import Update, factor
from fastlora.ops import dispatch
from fastlora.reference.coefficients import coefficients

Row = dict[str, Any]
# Of the largest element: coefficients and what is subtracted are rounded to bfloat16.
ROUNDED = 3e-2
GIVEN = "stacked beforehand, not timed"


@dataclass(slots=True)
class Stack:
    """The modules of one shape: ``B [g, k, n, r]`` and side by side ``[g, n, k·r]``, ``A [g, k·r, m]``;
    ``scaling [g, k]``, all ``scale``."""

    modules: list[str]
    B: Tensor
    side_by_side: Tensor
    A: Tensor
    scaling: Tensor
    scale: float

    @property
    def k(self) -> int:
        return self.B.shape[1]

    @property
    def r(self) -> int:
        return self.B.shape[3]


def stacks(pool: fl.Pool, device: str) -> list[Stack]:
    """The pool, shape by shape."""
    by_shape: dict[tuple[int, int], list[str]] = {}
    for module in pool.modules:
        by_shape.setdefault(pool.adapters[0].updates[module].shape, []).append(module)
    found = []
    for modules in by_shape.values():
        rows = [[a.updates[m] for a in pool.adapters] for m in modules]
        B = torch.stack([torch.stack([_stored(u, "B") for u in row]) for row in rows]).to(device)
        A = torch.stack([torch.cat([_stored(u, "A") for u in row]) for row in rows]).to(device)
        (scale,) = {u.scaling for row in rows for u in row}
        scaling = torch.full(B.shape[:2], scale, dtype=torch.float64, device=device)
        found.append(Stack(modules, B, B.movedim(1, 2).flatten(2).contiguous(), A, scaling, scale))
    return found


def _stored(update: Update, side: Side) -> Tensor:
    stored = factor(update, side).stored
    assert stored is not None
    return stored


def products(a: Tensor, b: Tensor) -> Tensor:
    """``[…] @ […]`` of half precision with results in float32, where torch can (on CUDA)."""
    if a.device.type == "cuda" and a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def gram(own: Stack) -> tuple[Tensor, Tensor]:
    """``[g, k, k, r, r]`` of the B sides and ``[g, k, r, r]`` of the A sides, in float32."""
    g, k, r = len(own.modules), own.k, own.r
    left = products(own.side_by_side.mT, own.side_by_side).view(g, k, r, k, r).movedim(2, 3)
    A = own.A.view(g * k, r, -1)
    return left, products(A, A.mT).view(g, k, r, r)


def middle(own: Stack, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chain and coefficients in float64 by ``torch.linalg``: removals ``[g, r, k·r]`` of the first adapter's factor,
    basis ``[g, r, w]`` and mixing ``[g, w, k·r]``."""
    table = dispatch.kernels("torch")
    assert not isinstance(table, str), table
    left, right = left.double().contiguous(), right.double().contiguous()
    basis = table["chain"].launch(left, right, None, TAU, "product", 1e-6, 0, 1.0)[0]
    _, _, _, removal, mixing = coefficients(left, right, basis, own.scaling, own.scaling, 1)
    return removal[:, :, 0].movedim(1, 2).flatten(2), basis[:, 0], mixing.movedim(1, 2).flatten(2)


def combine(own: Stack, removal: Tensor, basis: Tensor, mixing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unique parts side by side ``[g, n, k·r]`` with their scaling, ``Z [g, n, w]`` and the shared part's other side
    ``[g, w, m]``, in the pool's dtype."""
    first, dtype = own.B[:, 0], own.B.dtype
    unique = torch.baddbmm(own.side_by_side, first, removal.to(dtype), beta=own.scale)
    return unique, torch.bmm(first, basis.to(dtype)), torch.bmm(mixing.to(dtype), own.A)


def decompose(own: Stack) -> tuple[Tensor, Tensor, Tensor]:
    """All of it for the modules of one shape."""
    return combine(own, *middle(own, *gram(own)))


def require_same(own: Stack, unique: Tensor, plan: fl.DecompositionPlan) -> None:
    """Holds the unique parts of the first and last modules against those of a plan."""
    for g in sorted({0, len(own.modules) - 1}):
        parts = unique[g].view(-1, own.k, own.r).movedim(1, 0)
        for found, name in zip(parts, plan.pool.names, strict=True):
            wanted = plan.unique_parts[name][own.modules[g]]
            require(f"plain torch, {name} {own.modules[g]}", found, wanted, ROUNDED)


def plain(sizes: Sizes) -> Iterator[Row]:
    """Both passes and the whole against plain torch; ours are timed in the same process."""
    pool = make_pool(sizes.workload)
    shapes = stacks(pool, "cuda")
    plan = fl.DecompositionPlan(pool.to("cuda"), TAU)
    plan.run()
    small = [middle(own, *gram(own)) for own in shapes]
    for own, made in zip(shapes, small, strict=True):
        require_same(own, combine(own, *made)[0], plan)
    contests: dict[str, tuple[Action, Action, str]] = {
        "gram torch": (plan.gram.run, lambda: [gram(own) for own in shapes], "bmm, sums in float32"),
        "combine torch": (
            plan.combine.run,
            lambda: [combine(own, *made) for own, made in zip(shapes, small, strict=True)],
            "bmm and baddbmm, coefficients rounded to the pool's dtype",
        ),
    }
    for key, (ours, theirs, note) in contests.items():
        mine, other = (device_seconds(captured(run), sizes) for run in (ours, theirs))
        yield {"key": key, "seconds": mine, "opponent": other, "note": f"{note}; {GIVEN}"}
    mine = device_seconds(plan.capture().replay, sizes)
    # Eigenvalues wait for the host, so it is no graph.
    other = device_seconds(lambda: [decompose(own) for own in shapes], sizes, head_start=0)
    yield {"key": "decompose torch", "seconds": mine, "opponent": other, "note": f"the same with torch.linalg; {GIVEN}"}
