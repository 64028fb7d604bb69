"""``merge_tiles`` in plain torch: a band of rows at a time, never a whole ``ΔW``.

Every pass cuts the same bands, so that an element has the same bits in all of them: thresholds need that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.backends.reference_tiles import empty_product, packed_row_mask, unpacked
from fastlora.ops.merge_tiles import NOTHING, Cut, TileOutputs, TileResult, TileRule, TileTask
from fastlora.reference import merge_tiles as formula

BAND_BYTES = 32 * 2**20  # of the elements of all updates together, counted in float64
DIGIT = 16  # bits of a magnitude that one pass decides


def _bands(task: TileTask, only: Sequence[int] | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their elements ``[k, rows, m]`` in the dtype of the task; ``only``: of these updates."""
    n, m = task.shape
    dtype = task.dtype
    height = max(1, BAND_BYTES // (8 * max(m, 1) * len(task.pairs)))
    chosen = range(len(task.pairs)) if only is None else only
    factors = []
    for i in chosen:
        pair = task.pairs[i]
        scale = torch.tensor(task.scales[i], dtype=dtype, device=task.device)
        factors.append(None if pair is None else (scale * pair[0].to(dtype), pair[1].to(dtype)))
    for first in range(0, n, height):
        rows = slice(first, min(first + height, n))
        x = torch.zeros(len(chosen), rows.stop - first, m, dtype=dtype, device=task.device)
        for band, pair in zip(x, factors, strict=True):
            if pair is not None:
                torch.mm(pair[0][rows], pair[1], out=band)
        yield rows, x


def _variance(x: Tensor) -> Tensor:
    """Of places, in float64; exactly 0 where all are equal, whatever their mean rounds to."""
    equal = (x == x[:1]).all(0)
    return torch.where(equal, 0.0, formula.variance(x.double()))


def _sizes(task: TileTask, adapters: Sequence[int], quantity: str) -> Iterator[tuple[int, list[Tensor]]]:
    """The first row of every band and the magnitudes in it of each of the adapters."""
    if quantity == "variance":
        for rows, x in _bands(task):
            yield rows.start, [_variance(x)] * len(adapters)
    else:
        for rows, x in _bands(task, adapters):
            yield rows.start, list(x.abs_())


@dataclass
class _Search:
    """One cut that is looked for: ``left`` is the rank among the magnitudes whose upper bits are ``upper``."""

    place: int  # of its adapter among those that are read
    left: int
    upper: int = 0
    equal: int = 0
    order: int = 0
    seen: int = 0


def select(task: TileTask, ranks: Sequence[tuple[int, int]], quantity: str) -> list[Cut]:
    """Exact cuts: floats that are not negative order as integers do, so every pass decides 16 bits more."""
    adapters = sorted({adapter for adapter, q in ranks if q})
    searches = [_Search(adapters.index(a), q) if q else None for a, q in ranks]
    active = [s for s in searches if s is not None]
    if not active:
        return [NOTHING] * len(ranks)
    kind = task.dtype if quantity == "magnitude" else torch.float64
    whole = torch.int64 if kind == torch.float64 else torch.int32
    for shift in range(8 * kind.itemsize - DIGIT, -1, -DIGIT):
        counts = torch.zeros(len(active), 2**DIGIT, dtype=torch.int64)
        for _, sizes in _sizes(task, adapters, quantity):
            digits = [x.flatten().view(whole) >> shift for x in sizes]
            for search, count in zip(active, counts, strict=True):
                own = digits[search.place]
                same = own[(own >> DIGIT) == search.upper] & (2**DIGIT - 1)
                count += torch.bincount(same, minlength=2**DIGIT).cpu()
        for search, count in zip(active, counts, strict=True):
            above = count.flip(0).cumsum(0)  # magnitudes whose digit is at least 2^16 − 1 − index
            index = int((above >= search.left).int().argmax())
            search.left -= int(above[index - 1]) if index else 0
            search.upper = (search.upper << DIGIT) | (2**DIGIT - 1 - index)
            search.equal = int(count[2**DIGIT - 1 - index])
    magnitudes = {id(s): float(torch.tensor(s.upper, dtype=whole).view(kind)) for s in active}
    _find_orders(task, adapters, quantity, active, magnitudes)
    return [NOTHING if s is None else Cut(magnitudes[id(s)], s.order) for s in searches]


def _find_orders(
    task: TileTask, adapters: Sequence[int], quantity: str, active: list[_Search], magnitudes: dict[int, float]
) -> None:
    """Where the last of the equals that are kept stands; a pass more where not all of them are."""
    n, m = task.shape
    for search in active:
        search.order = n * m
    parted = [s for s in active if s.left < s.equal]
    if not parted:
        return
    for first, sizes in _sizes(task, adapters, quantity):
        for search in parted:
            if search.seen >= search.left:
                continue
            places = (sizes[search.place].flatten() == magnitudes[id(search)]).nonzero()[:, 0]
            needed = search.left - search.seen
            if len(places) >= needed:
                search.order = first * m + int(places[needed - 1]) + 1
            search.seen += len(places)


def count_varied(task: TileTask, least: float) -> int:
    """Places whose variance is above ``least``."""
    return sum(int((_variance(x) > least).sum()) for _, x in _bands(task))


def row_masks(task: TileTask, spans: Sequence[tuple[float, float]], keys: Sequence[int], module_key: int) -> Tensor:
    """The masks of all rows, as bits."""
    n, m = task.shape
    masks = torch.zeros(len(task.pairs), n, -(-m // 64), dtype=torch.int64, device=task.device)
    for rows, x in _bands(task):
        for i, (span, key) in enumerate(zip(spans, keys, strict=True)):
            masks[i, rows] = packed_row_mask(x[i], span, key, module_key, rows.start)
    return masks


def _held(sizes: Tensor, cut: Cut, first: int) -> Tensor:
    """What a cut of the module holds of the rows from ``first`` on."""
    return formula.held(sizes, cut.magnitude, cut.order - first * sizes.shape[1])


def _kept(x: Tensor, rule: TileRule, rows: slice) -> Tensor:
    """Which elements ``[k, rows, m]`` a rule keeps."""
    height, m = x.shape[1:]
    if rule.trim == "magnitude":
        kept = torch.stack([_held(x[i].abs(), cut, rows.start) for i, cut in enumerate(rule.low)])
        for i, cut in enumerate(rule.high):
            kept[i] &= ~_held(x[i].abs(), cut, rows.start)
        return kept
    if rule.trim == "variance":
        return _held(_variance(x), rule.low[0], rows.start).expand_as(x)
    if rule.trim == "bits":
        assert rule.bits is not None
        return unpacked(rule.bits[:, rows], m)
    pairs = zip(rule.keep, rule.keys, strict=True)
    masks = [formula.random_mask((height, m), keep, key, rule.module_key, rows.start) for keep, key in pairs]
    return torch.stack(masks).to(x.device)


def merge(task: TileTask, rule: TileRule, outputs: TileOutputs) -> TileResult:
    """A rule over all bands."""
    square, undecided, majority, finite = 0.0, 0, 0, True
    sums = torch.zeros(len(task.pairs), 3, dtype=torch.float64)
    product = empty_product(task, outputs)
    for rows, x in _bands(task):
        v = x if rule.trim == "none" else torch.where(_kept(x, rule, rows), x, 0.0)
        M, S = formula.merged(
            v, elect=rule.elect, votes=rule.votes, gains=rule.gains, shares=rule.shares, least=rule.least,
            instead=rule.instead, scale=rule.scale, zero=rule.zero, dtype=torch.float64,
        )  # fmt: skip
        M = M.to(x.dtype)
        square += float(M.double().square().sum())
        finite = finite and bool(M.isfinite().all())
        if rule.elect != "none":
            undecided += int(((S == 0) & (v != 0).any(0)).sum())
            majority += int(S.sign().sum())
        if outputs.sums:
            found = [t.double().sum((1, 2)).cpu().double() for t in (x.abs(), v.abs(), v.double().square())]
            sums += torch.stack(found, 1)
        if outputs.dense is not None:
            part = outputs.dense[rows]
            part.copy_(part.double() + M if outputs.add else M)
        if product is not None and outputs.right is not None:
            product[rows] = M.to(product) @ outputs.right
        if product is not None and outputs.left is not None:
            product += M.to(product).mT @ outputs.left[rows]
    return TileResult(square, undecided, majority, finite, product, sums if outputs.sums else None)
