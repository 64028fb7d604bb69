"""Forms beside decompositions: rules on the elements of updates, all pairs of a pool, merges."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastlora as fl
from fastlora.bench.gpu.forms.form import Form, Found, gaussian, largest
from fastlora.bench.workloads import Workload, make_pool
from fastlora.ops import merge_tiles
from fastlora.ops.merge_tiles import Elect, TileOutputs, TileRule, TileTask, Trim
from fastlora.ops.similarity import similarity
from fastlora.reference import merge_tiles as tiles_formula
from fastlora.reference import similarity as similarity_formula

RULES: dict[str, dict[str, Any]] = {
    "sum": {},
    "ties": {"trim": "magnitude", "elect": "total", "shares": True},
    "breadcrumbs": {"trim": "magnitude", "high": True, "elect": "total"},
    "dare": {"trim": "random"},
    "della": {"trim": "bits", "elect": "frequency", "shares": True},
    "sce": {"trim": "variance", "elect": "total", "shares": True},
}
"""How a rule trims and elects, by the method that has it."""
MERGES: dict[str, dict[str, Any]] = {"cat": {}, "svd": {"rank": 8}, "ties": {"rank": 8, "min_energy": 0.1}}
K, R = 4, 4


def _integers(*shape: int, seed: int) -> Tensor:
    """Small ones: products, sums, means of four and their squares are exact, so that no threshold turns by rounding."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def tiles(method: str, dtype: torch.dtype, shape: tuple[int, int], device: str) -> Found:
    """A dense result of a rule, elements trimmed and elected by definition in float64."""
    n, m = shape
    pairs = [(_integers(n, R, seed=i), _integers(R, m, seed=9 + i)) for i in range(K)]
    task = TileTask([(B.to(device), A.to(device)) for B, A in pairs], [1.0, -0.5, 2.0, 0.25], shape, dtype)
    x = tiles_formula.elements(pairs, task.scales, task.shape)
    rule, held = _trimmed(task, x, **RULES[method])
    out = torch.full(shape, torch.nan, dtype=dtype, device=device)
    merge_tiles.merge(task, rule, TileOutputs(dense=out))
    wanted, _ = tiles_formula.merged(
        x * held, elect=rule.elect, votes=rule.votes, gains=rule.gains, shares=rule.shares, least=rule.least,
        instead=rule.instead, scale=rule.scale, zero=rule.zero,
    )  # fmt: skip
    return Found(largest(out.cpu().double() - wanted, float(wanted.abs().max())), 4 * torch.finfo(dtype).eps)


def _trimmed(
    task: TileTask, x: Tensor, trim: Trim = "none", elect: Elect = "none", high: bool = False, shares: bool = False
) -> tuple[TileRule, Tensor]:
    """A rule, with cuts and masks made where the factors are, and what it keeps of ``x [k, n, m]`` by definition."""
    numbers = [1.0, 2.0, 0.5, 1.0]
    rule = TileRule(trim=trim, elect=elect, votes=numbers, gains=numbers, shares=numbers if shares else None)
    keys = [merge_tiles.key_of(i) for i in range(K)]
    size = x[0].numel()
    if trim == "magnitude":
        ranks = [(i, size // (2 + i)) for i in range(K)]
        held = _held(x.abs(), ranks)
        rule = replace(rule, low=merge_tiles.select(task, ranks))
        if high:
            ranks = [(i, size // 10) for i in range(K)]
            return replace(rule, high=merge_tiles.select(task, ranks)), held & ~_held(x.abs(), ranks)
        return rule, held
    if trim == "variance":
        ranks = [(0, size // 3)]
        cuts = merge_tiles.select(task, ranks, "variance")
        return replace(rule, low=cuts), _held(tiles_formula.variance(x)[None], ranks).expand_as(x)
    if trim == "random":
        keep = [merge_tiles.bound_of(0.3 + 0.2 * i) for i in range(K)]
        masks = [tiles_formula.random_mask(task.shape, *own, 7) for own in zip(keep, keys, strict=True)]
        return replace(rule, keep=keep, keys=keys, module_key=7), torch.stack(masks)
    if trim == "bits":
        bits = merge_tiles.row_masks(task, [(0.2, 0.5)] * K, keys, 7)
        masks = [tiles_formula.row_mask(v, 0.2, 0.5, key, 7) for v, key in zip(x, keys, strict=True)]
        return replace(rule, bits=bits), torch.stack(masks)
    return rule, torch.ones_like(x, dtype=torch.bool)


def _held(sizes: Tensor, ranks: list[tuple[int, int]]) -> Tensor:
    """The ``q`` largest of each of ``sizes [k, n, m]``."""
    return torch.stack([tiles_formula.held(sizes[i], *tiles_formula.cut(sizes[i], q)) for i, q in ranks])


def pairs(rank: int, device: str) -> Found:
    """Inner products and overlaps of all pairs, by the lengths of the updates."""
    ranks, n, m = (rank, rank, 1, 3, rank), 300, 250
    bases = [torch.linalg.qr(gaussian(n, q, seed=i))[0] for i, q in enumerate(ranks)]
    left = torch.cat(bases, 1).float()
    right = gaussian(m, sum(ranks), seed=9, dtype=torch.float32)
    starts = torch.tensor([0, *ranks]).cumsum(0)
    kept = torch.tensor([max(1, q - 1) for q in ranks])
    found = similarity(left.to(device), right.to(device), starts, kept)
    wanted = similarity_formula.similarity(left, right, starts, kept, 0)
    lengths = wanted[0].diagonal().sqrt()
    sizes: tuple[Tensor | float, ...] = (lengths[:, None] * lengths, float(rank))
    errors = [largest(got.cpu() - t, size) for got, t, size in zip(found, wanted, sizes, strict=True)]
    return Found(max(errors), 1e-5)  # sums of some hundred products in float32


def merge(method: str, device: str) -> Found:
    """``fl.merge`` of a pool with factors there, against the host's: ``ΔW``, by its length."""
    pool = make_pool(Workload({"a": (96, 64), "b": (64, 160)}, 3, 8, torch.float32))
    options = MERGES[method]
    wanted = fl.merge(pool, method=method, **options)
    found = fl.merge(pool, method=method, device=device, **options).to("cpu")
    deltas = [(found.delta(m).double(), wanted.delta(m).double()) for m in wanted.modules]
    return Found(max(float((a - b).norm() / b.norm()) for a, b in deltas), 1e-4)


def forms(tiny: bool) -> list[Form]:
    """Of the newer ops, then of what stands on them."""
    shape = (17, 40) if tiny else (129, 200)  # no multiples of a tile
    found = [
        Form(f"merge_tiles {m} {d}", partial(tiles, m, getattr(torch, d), shape))
        for m in RULES
        for d in ("float32", "float64")
    ]
    found += [Form(f"similarity r={r}", partial(pairs, r)) for r in (5, 16, 64)]
    return found + [Form(f"merge {m}", partial(merge, m)) for m in MERGES]
