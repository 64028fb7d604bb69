"""``merge_tiles`` by the formulas: dense matrices in float64, a band of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastlora.ops.merge_tiles import Cut, TileOutputs, TileResult, TileRule, TileTask
from fastlora.reference import merge_tiles as formula

BAND_BYTES = 256 * 2**20  # of the elements of all updates together


def _bands(task: TileTask) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their elements, float64 ``[k, rows, m]``."""
    n, m = task.shape
    height = max(1, BAND_BYTES // (8 * max(m, 1) * len(task.pairs)))
    for first in range(0, n, height):
        rows = slice(first, min(first + height, n))
        pairs = [None if pair is None else (pair[0][rows], pair[1]) for pair in task.pairs]
        yield rows, formula.elements(pairs, task.scales, (rows.stop - first, m))


def _all(task: TileTask) -> Tensor:
    """Of every element, ``[k, n, m]``."""
    return torch.cat([x for _, x in _bands(task)], 1)


def select(task: TileTask, ranks: Sequence[tuple[int, int]], quantity: str) -> list[Cut]:
    """The cuts by sorting."""
    if quantity == "variance":
        sizes = torch.cat([formula.variance(x) for _, x in _bands(task)])
        return [Cut(*formula.cut(sizes, q)) for _, q in ranks]
    cuts: list[Cut] = []
    for adapter, q in ranks:
        pair, scale = task.pairs[adapter], task.scales[adapter]
        cuts.append(Cut(*formula.cut(formula.elements([pair], [scale], task.shape)[0].abs(), q)))
    return cuts


def count_varied(task: TileTask, least: float) -> int:
    """Places whose variance is above ``least``."""
    return sum(int((formula.variance(x) > least).sum()) for _, x in _bands(task))


def row_masks(task: TileTask, spans: Sequence[tuple[float, float]], keys: Sequence[int], module_key: int) -> Tensor:
    """The masks of all rows, as bits."""
    masks = zip(_all(task), spans, keys, strict=True)
    return torch.stack([packed_row_mask(x, span, key, module_key, 0) for x, span, key in masks])


def packed_row_mask(x: Tensor, span: tuple[float, float], key: int, module_key: int, first: int) -> Tensor:
    """DELLA's mask of the rows ``x [rows, m]`` of a module from ``first`` on, as words of 64 bits."""
    rows, m = x.shape
    words = -(-m // 64)
    mask = torch.zeros(rows, 64 * words, dtype=torch.int64, device=x.device)
    mask[:, :m] = formula.row_mask(x, *span, key, module_key, first)
    return (mask.view(rows, words, 64) << torch.arange(64, device=x.device)).sum(2)


def unpacked(bits: Tensor, m: int) -> Tensor:
    """Masks ``[..., m]`` of words of 64 bits ``[..., ⌈m/64⌉]``."""
    places = torch.arange(64, device=bits.device)
    return ((bits[..., None] >> places) & 1).flatten(-2)[..., :m].bool()


def _held(sizes: Tensor, cut: Cut, first: int) -> Tensor:
    """What a cut of the module holds of the rows from ``first`` on."""
    return formula.held(sizes, cut.magnitude, cut.order - first * sizes.shape[1])


def _kept(x: Tensor, rule: TileRule, rows: slice) -> Tensor:
    """Which elements ``[k, rows, m]`` a rule keeps."""
    m = x.shape[2]
    if rule.trim == "magnitude":
        kept = torch.stack([_held(x[i].abs(), cut, rows.start) for i, cut in enumerate(rule.low)])
        for i, cut in enumerate(rule.high):
            kept[i] &= ~_held(x[i].abs(), cut, rows.start)
        return kept
    if rule.trim == "variance":
        return _held(formula.variance(x), rule.low[0], rows.start).expand_as(x)
    if rule.trim == "bits":
        assert rule.bits is not None
        return unpacked(rule.bits[:, rows], m)
    if rule.trim == "random":
        pairs = zip(rule.keep, rule.keys, strict=True)
        masks = [formula.random_mask((rows.stop, m), keep, key, rule.module_key)[rows] for keep, key in pairs]
        return torch.stack(masks).to(x.device)
    return torch.ones_like(x, dtype=torch.bool)


def merge(task: TileTask, rule: TileRule, outputs: TileOutputs) -> TileResult:
    """The rule by its formula."""
    square, undecided, majority, finite = 0.0, 0, 0, True
    sums = torch.zeros(len(task.pairs), 3, dtype=torch.float64)
    product = empty_product(task, outputs)
    for rows, x in _bands(task):
        v = torch.where(_kept(x, rule, rows), x, 0.0)
        M, S = formula.merged(
            v, elect=rule.elect, votes=rule.votes, gains=rule.gains, shares=rule.shares, least=rule.least,
            instead=rule.instead, scale=rule.scale, zero=rule.zero,
        )  # fmt: skip
        square += float(M.square().sum())
        finite &= bool(M.isfinite().all())
        undecided += int(((S == 0) & (v != 0).any(0)).sum())
        majority += int(S.sign().sum())
        sums += torch.stack([x.abs().sum((1, 2)), v.abs().sum((1, 2)), v.square().sum((1, 2))], 1).cpu()
        if outputs.dense is not None:
            part = outputs.dense[rows]
            part.copy_(part.double() + M if outputs.add else M)
        if product is not None and outputs.right is not None:
            product[rows] = M @ outputs.right
        if product is not None and outputs.left is not None:
            product += M.mT @ outputs.left[rows]
    return TileResult(square, undecided, majority, finite, product, sums if outputs.sums else None)


def empty_product(task: TileTask, outputs: TileOutputs) -> Tensor | None:
    """Zeros of the shape of the product that is asked for, or ``None``."""
    n, m = task.shape
    thin = outputs.right if outputs.right is not None else outputs.left
    if thin is None:
        return None
    length = n if outputs.right is not None else m
    return torch.zeros(length, thin.shape[1], dtype=torch.float64, device=task.device)
