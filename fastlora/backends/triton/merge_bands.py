"""``merge_tiles`` on a device: bands of rows by the Triton kernel, and what is made of them by torch, in float64.

A band is as many rows as 64 MB hold, so that nothing of the size of a module is kept. Magnitudes are counted, and
counts of whole numbers are exact in any order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastlora.backends import reference_tiles
from fastlora.ops.merge_tiles import NOTHING, Cut, TileOutputs, TileResult, TileRule, TileTask

BAND_BYTES = 64 * 2**20
DIGIT = 16  # bits of a magnitude that one pass decides
TRIMS = ("none", "magnitude", "random", "bits", "variance")
ELECTS = ("none", "total", "frequency")

Band = tuple[slice, Tensor, Tensor]
"""Rows, their part of the merged matrix, and the states of their votes."""


def _tables(task: TileTask, rule: TileRule) -> tuple[list[Tensor], Tensor, Tensor]:
    """Factors that the kernel reads, and its tables: int64 ``[k, 8]``, float64 ``[k, 6]``."""
    alive: list[Tensor] = []
    addresses, numbers = [], []
    for i, (pair, scale) in enumerate(zip(task.pairs, task.scales, strict=True)):
        row = [0, 0, 0]
        if pair is not None:
            B, A = (x.to(task.dtype).contiguous() for x in pair)
            alive += [B, A]
            row = [B.data_ptr(), B.shape[1], A.data_ptr()]
        low = rule.low[0 if rule.trim == "variance" else i] if rule.low else NOTHING
        high = rule.high[i] if rule.high else NOTHING
        bound, key = (rule.keep[i], rule.keys[i]) if rule.trim == "random" else (0, 0)
        addresses.append([*row, low.order, high.order, bound, _signed(key), _signed(rule.module_key)])
        shares = 0.0 if rule.shares is None else rule.shares[i]
        votes = rule.votes[i] if rule.votes else 1.0
        numbers.append([scale, low.magnitude, high.magnitude, votes, rule.gains[i], shares])
    table = torch.from_numpy(np.array(addresses, dtype=np.int64)).to(task.device)
    return alive, table, torch.tensor(numbers, dtype=torch.float64).to(task.device)


def _signed(word: int) -> int:
    """A word of 64 bits as the number that has its bits."""
    return word - 2**64 if word >= 2**63 else word


def _scale(rule: TileRule) -> float:
    """The factor of the result, with the divisor that all places share where no sign is elected."""
    if rule.shares is None or rule.elect != "none":
        return rule.scale
    divisor = sum(rule.shares)
    return rule.scale / (rule.instead if abs(divisor) < rule.least else divisor)


def _bands(task: TileTask, rule: TileRule, *, only_variance: bool = False) -> Iterator[Band]:
    """The merged matrix, band by band; the next one takes the memory of the last."""
    from tritonkernels.merge_tiles import merge_tile_launch

    n, m = task.shape
    if not n or not m:
        return
    alive, factors, numbers = _tables(task, rule)
    rules = torch.tensor([_scale(rule), rule.least, rule.instead, rule.zero], dtype=torch.float64).to(task.device)
    bits = factors if rule.bits is None else rule.bits.contiguous()
    alive += [factors, numbers, rules, bits]
    height = min(n, max(1, BAND_BYTES // (task.dtype.itemsize * m)))
    out = torch.empty(height, m, dtype=task.dtype, device=task.device)
    states = torch.zeros(height, m, dtype=torch.int8, device=task.device)
    on_device = torch.cuda.device(task.device) if task.device.type == "cuda" else contextlib.nullcontext()
    for first in range(0, n, height):
        last = min(first + height, n)
        launch = merge_tile_launch(
            (factors, numbers, rules, bits), out, states, (len(task.pairs), n, m), (first, last),
            double=task.dtype == torch.float64, trim=TRIMS.index(rule.trim), high=bool(rule.high),
            elect=ELECTS.index(rule.elect), shares=rule.shares is not None and rule.elect != "none",
            only_variance=only_variance,
        )  # fmt: skip
        with on_device:
            launch.run()
        yield slice(first, last), out[: last - first], states[: last - first]


def _alone(task: TileTask, rule: TileRule, i: int) -> tuple[TileTask, TileRule]:
    """The kept elements of one update: a task and the rule of it alone."""
    one = slice(i, i + 1)
    part = TileTask(task.pairs[one], task.scales[one], task.shape, task.dtype)
    own = TileRule(
        rule.trim, rule.low[one], rule.high[one], rule.keep[one], rule.keys[one], rule.module_key,
        None if rule.bits is None else rule.bits[one], gains=[1.0],
    )  # fmt: skip
    return part, own


def _magnitudes(task: TileTask, quantity: str, adapter: int) -> Iterator[tuple[slice, Tensor]]:
    if quantity == "variance":
        rule = TileRule(gains=[1.0] * len(task.pairs))
        yield from ((rows, x) for rows, x, _ in _bands(task, rule, only_variance=True))
    else:
        part, rule = _alone(task, TileRule(), adapter)
        yield from ((rows, x.abs()) for rows, x, _ in _bands(part, rule))


def select(task: TileTask, ranks: Sequence[tuple[int, int]], quantity: str) -> list[Cut]:
    """The cuts, by counting the bits of magnitudes: two passes an update in float32, four in float64."""
    return [_cut(task, quantity, adapter, q) for adapter, q in ranks]


def _cut(task: TileTask, quantity: str, adapter: int, q: int) -> Cut:
    if not q:
        return NOTHING
    n, m = task.shape
    integers = torch.int32 if task.dtype == torch.float32 else torch.int64
    upper, left, equal = 0, q, 0
    for shift in range(8 * task.dtype.itemsize - DIGIT, -1, -DIGIT):
        counts = torch.zeros(2**DIGIT, dtype=torch.int64, device=task.device)
        for _, sizes in _magnitudes(task, quantity, adapter):
            digits = sizes.view(integers).flatten() >> shift
            inside = digits[(digits >> DIGIT) == upper] & (2**DIGIT - 1)
            counts += torch.bincount(inside, minlength=2**DIGIT)
        above = counts.flip(0).cumsum(0).cpu()
        index = int((above >= left).int().argmax())
        left -= int(above[index - 1]) if index else 0
        digit = 2**DIGIT - 1 - index
        upper, equal = (upper << DIGIT) | digit, int(counts[digit])
    magnitude = float(torch.tensor(upper, dtype=integers).view(task.dtype))
    if left == equal or magnitude == 0.0:
        return Cut(magnitude, n * m)
    for rows, sizes in _magnitudes(task, quantity, adapter):
        places = (sizes.flatten() == magnitude).nonzero().flatten()
        if left <= len(places):
            return Cut(magnitude, rows.start * m + int(places[left - 1]) + 1)
        left -= len(places)
    raise AssertionError("elements changed between two passes")


def count_varied(task: TileTask, least: float) -> int:
    """The places whose variance is above ``least``."""
    return sum(int((sizes > least).sum()) for _, sizes in _magnitudes(task, "variance", 0))


def row_masks(task: TileTask, spans: Sequence[tuple[float, float]], keys: Sequence[int], module_key: int) -> Tensor:
    """The masks by sorting rows of elements of the kernel."""
    n, m = task.shape
    bits = torch.zeros(len(task.pairs), n, -(-m // 64), dtype=torch.int64, device=task.device)
    for i in range(len(task.pairs)):
        part, rule = _alone(task, TileRule(), i)
        for rows, x, _ in _bands(part, rule):
            bits[i, rows] = reference_tiles.packed_row_mask(x.double(), spans[i], keys[i], module_key, rows.start)
    return bits


def merge(task: TileTask, rule: TileRule, outputs: TileOutputs) -> TileResult:
    """One pass of a rule, and as many of every update alone where their sums are asked for."""
    square = torch.zeros((), dtype=torch.float64, device=task.device)
    undecided = majority = 0
    thin = outputs.right if outputs.right is not None else outputs.left
    product = None if thin is None else reference_tiles.empty_product(task, outputs)
    for rows, M, states in _bands(task, rule):
        wide = M.double()
        square += wide.square().sum()
        if rule.elect != "none":
            undecided += int((states == 2).sum())
            majority += int((states == 1).sum()) - int((states == -1).sum())
        if outputs.dense is not None:
            part = outputs.dense[rows]
            part.copy_(part.to(torch.promote_types(part.dtype, M.dtype)) + M if outputs.add else M)
        if product is not None and outputs.right is not None:
            product[rows] = wide @ outputs.right
        if product is not None and outputs.left is not None:
            product += wide.mT @ outputs.left[rows]
    total = float(square)
    sums = _sums(task, rule) if outputs.sums else None
    return TileResult(total, undecided, majority, total < float("inf"), product, sums)


def _sums(task: TileTask, rule: TileRule) -> Tensor:
    k = len(task.pairs)
    sums = torch.zeros(k, 3, dtype=torch.float64)
    for i in range(k):
        for _, x, _ in _bands(*_alone(task, TileRule(), i)):
            sums[i, 0] += x.double().abs().sum().cpu()
        if rule.trim == "variance":
            gains = [float(j == i) for j in range(k)]
            kept = task, replace(rule, elect="none", shares=None, scale=1.0, gains=gains)
        else:
            kept = _alone(task, rule, i)
        for _, v, _ in _bands(*kept):
            sums[i, 1] += v.double().abs().sum().cpu()
            sums[i, 2] += v.double().square().sum().cpu()
    return sums
