"""``add_products`` in torch: for backends without a kernel of their own, a tile of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastlora.ops.add_products import FilePlace, ProductProblem, ProductTask, Segment
from fastlora.runtime.system import read_at, write_all_at

TILE_BYTES = 2 * 2**20

Formula = Callable[[ProductTask, Tensor], Tensor]
"""``W`` to ``W'`` before it is rounded."""


def plain(task: ProductTask, W: Tensor) -> Tensor:
    """The products in the dtype of the task."""
    out = W.to(task.sums, copy=True)
    for segment in task.segments:
        if not segment.pairs:
            continue
        total = torch.zeros(len(W), segment.width, dtype=task.sums, device=W.device)
        for (L, R), scale in zip(segment.pairs, segment.scales, strict=True):
            total += (L.to(task.sums) * scale) @ R.to(task.sums)
        out[:, segment.left : segment.left + segment.width] += total
    return out


def add_products(
    task: ProductTask, source: Tensor | FilePlace, target: Tensor | FilePlace, formula: Formula
) -> ProductProblem | None:
    """The op by a formula."""
    n, m = task.shape
    tall = max(1, TILE_BYTES // max(1, m * task.source.itemsize))
    for first in range(0, n, tall):
        last = min(first + tall, n)
        part = replace(task, shape=(last - first, m), segments=[_rows(s, first, last) for s in task.segments])
        if isinstance(source, Tensor):
            problem = _in_memory(part, source[first:last], target[first:last], formula)  # type: ignore[index]
        else:
            assert isinstance(target, FilePlace)
            before = first * m
            problem = _in_files(
                part,
                FilePlace(source.file, source.offset + before * task.source.itemsize),
                FilePlace(target.file, target.offset + before * task.target.itemsize),
                formula,
            )
        if problem is not None:
            return problem
    return None


def _rows(segment: Segment, first: int, last: int) -> Segment:
    return replace(segment, pairs=[(L[first:last], R) for L, R in segment.pairs])


def _in_memory(task: ProductTask, source: Tensor, target: Tensor, formula: Formula) -> ProductProblem | None:
    target.copy_(formula(task, source))
    return None if bool(target.isfinite().all()) else ProductProblem("not finite")


def _in_files(task: ProductTask, source: FilePlace, target: FilePlace, formula: Formula) -> ProductProblem | None:
    W = torch.empty(task.shape, dtype=task.source)
    if not W.numel():
        return None
    memory, offset = _bytes(W), source.offset
    while len(memory):
        try:
            count = read_at(source.file, memory, offset)
        except OSError as error:
            return ProductProblem("read", error.errno or 0)
        if not count:
            return ProductProblem("short")
        memory, offset = memory[count:], offset + count
    out = torch.empty(task.shape, dtype=task.target)
    problem = _in_memory(task, W, out, formula)
    if problem is None:
        try:
            write_all_at(target.file, _bytes(out), target.offset)
        except OSError as error:
            return ProductProblem("write", error.errno or 0)
    return problem


def _bytes(x: Tensor) -> memoryview:
    return memoryview(x.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
