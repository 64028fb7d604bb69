"""``merge_tiles`` and ``add_products`` on the compiled CPU kernels: tasks and rules become rows of addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastlora.backends.rows import packed_numbers
from fastlora.ops.add_products import FilePlace, ProductProblem, ProductTask, What
from fastlora.ops.merge_tiles import Cut, TileOutputs, TileResult, TileRule, TileTask

try:
    from fastlora import _core
except ImportError:
    _core = None  # type: ignore[assignment]

Array = np.ndarray[Any, Any]
Fields = Sequence[tuple[str, str]]
R = TypeVar("R")

WIDTH = 8  # of thin matrices: a multiple of it
_WHAT: dict[int, What] = {} if _core is None else {code: what for what, code in _core.ADD_PROBLEMS.items()}  # type: ignore[misc]
NO_GAINS: dict[str, int | float] = {"least": 0.0, "instead": 1.0, "scale": 1.0, "zero": 1}


def supports(task: TileTask, *_: object) -> str | None:
    """Factors must be in this machine's memory."""
    for x in task.factors:
        if not x.is_cpu:
            return f"a tensor is on {x.device}, this backend needs the CPU"
    return None


class _Row:
    """The fields of a row of arguments by name, and what they point to."""

    def __init__(self, fields: Fields) -> None:
        self.alive: list[Tensor | Array] = []
        self.layout = fields
        self.fields: dict[str, int | float] = {name: 0 for name, _ in fields}

    @staticmethod
    def of(task: TileTask) -> _Row:
        """``MergeArgs`` of a task, without a rule."""
        row = _Row(_core.MERGE_FIELDS)
        n, m = task.shape
        row.fields |= NO_GAINS
        row.fields |= {"k": len(task.pairs), "n": n, "m": m}
        row.fields["threads"] = task.threads or torch.get_num_threads()
        row.fields["is_double"] = task.dtype == torch.float64
        row.numbers("scales", task.scales)
        row.matrices("factors", [x for pair in task.pairs for x in (pair or _zero(task.shape))])
        return row

    def numbers(self, name: str, values: Sequence[float] | Sequence[int], dtype: type = np.float64) -> Array:
        """An array, whose address becomes a field."""
        array: Array = np.array(values, dtype=dtype)
        self.alive.append(array)
        self.fields[name] = int(array.ctypes.data)
        return array

    def tensor(self, name: str, x: Tensor) -> Tensor:
        """A contiguous tensor, whose address becomes a field."""
        self.alive.append(x)
        self.fields[name] = x.data_ptr()
        return x

    def matrices(self, name: str, tensors: Sequence[Tensor]) -> None:
        """A table of matrices; those without contiguous rows are copied."""
        table: list[int] = []
        for x in tensors:
            rows, columns = x.shape
            if columns > 1 and x.stride(1) != 1:
                x = x.contiguous()
            stride = columns if rows == 1 else x.stride(0)
            self.alive.append(x)
            table += (x.data_ptr(), rows, columns, stride, _code(x.dtype))
        self.numbers(name, table, np.int64)

    def run(self, name: str, kernel: Callable[[bytes], R]) -> R:
        """What a kernel of the compiled module returns; ``name`` is that of the row."""
        return kernel(packed_numbers(name, self.fields, self.layout))


def _code(dtype: torch.dtype) -> int:
    return _core.DTYPES[str(dtype).removeprefix("torch.")]


def _zero(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return torch.empty(shape[0], 0), torch.empty(0, shape[1])


def _queries(task: TileTask, ranks: Sequence[tuple[int, int]], variance: bool, magnitude: float = 0.0) -> Array:
    table = np.zeros((len(ranks), 4), dtype=np.int64)
    table[:, :2] = np.array(ranks, dtype=np.int64).reshape(-1, 2)
    table[:, 2] = np.float64(magnitude).view(np.int64)
    row = _Row.of(task)
    row.fields |= {"queries": int(table.ctypes.data), "n_queries": len(ranks), "variance": variance}
    if len(ranks):
        row.run("MergeArgs", _core.merge_select)
    return table


def select(task: TileTask, ranks: Sequence[tuple[int, int]], quantity: str) -> list[Cut]:
    """The cuts of :func:`fastlora.ops.merge_tiles.select`."""
    if 0 in task.shape:
        return [Cut(float("inf"), 0) for _ in ranks]
    table = _queries(task, ranks, quantity == "variance")
    magnitudes = table[:, 2].copy().view(np.float64)
    return [Cut(float(x), int(order)) for x, order in zip(magnitudes, table[:, 3], strict=True)]


def count_varied(task: TileTask, least: float) -> int:
    """The places whose variance is above ``least``."""
    return 0 if 0 in task.shape else int(_queries(task, [(0, -1)], True, least)[0, 3])


def row_masks(task: TileTask, spans: Sequence[tuple[float, float]], keys: Sequence[int], module_key: int) -> Tensor:
    """The masks of all rows, as bits."""
    n, m = task.shape
    row = _Row.of(task)
    bits = row.tensor("bits", torch.zeros(len(task.pairs), n, -(-m // 64), dtype=torch.int64))
    row.numbers("row_least", [least for least, _ in spans])
    row.numbers("row_span", [span for _, span in spans])
    row.numbers("keys", keys, np.uint64)
    row.fields["module_key"] = _signed(module_key)
    row.run("MergeArgs", _core.merge_row_masks)
    return bits


def _signed(word: int) -> int:
    """A word of 64 bits as the number that has its bits."""
    return word - 2**64 if word >= 2**63 else word


def _put_rule(row: _Row, rule: TileRule) -> None:
    row.fields |= {"trim": _core.TRIM_KINDS[rule.trim], "elect": _core.ELECT_KINDS[rule.elect]}
    row.fields |= {"least": rule.least, "instead": rule.instead, "scale": rule.scale, "zero": rule.zero}
    row.numbers("gains", rule.gains)
    if rule.elect != "none":
        row.numbers("votes", rule.votes)
    if rule.shares is not None and rule.elect != "none":
        row.numbers("shares", rule.shares)
    elif rule.shares is not None:  # the divisor of all places
        divisor = sum(rule.shares)
        row.fields["scale"] = rule.scale / (rule.instead if abs(divisor) < rule.least else divisor)
    for name, cuts in (("low", rule.low), ("high", rule.high)):
        if cuts:
            row.numbers(name, [cut.magnitude for cut in cuts])
            row.numbers(f"{name}_order", [cut.order for cut in cuts], np.int64)
    if rule.trim == "random":
        row.numbers("keep", rule.keep, np.uint64)
        row.numbers("keys", rule.keys, np.uint64)
        row.fields["module_key"] = _signed(rule.module_key)
    if rule.bits is not None:
        row.tensor("bits", rule.bits)


def merge(task: TileTask, rule: TileRule, outputs: TileOutputs) -> TileResult:
    """One pass of a rule."""
    n, m = task.shape
    row = _Row.of(task)
    _put_rule(row, rule)
    square, counts = row.numbers("square", [0.0]), row.numbers("counts", [0, 0], np.int64)
    if rule.elect == "none":
        row.fields["counts"] = 0
    sums = row.tensor("sums", torch.zeros(len(task.pairs), 3, dtype=torch.float64)) if outputs.sums else None
    product = None
    thin = outputs.right if outputs.right is not None else outputs.left
    if thin is not None:
        padded = torch.zeros(thin.shape[0], -(-thin.shape[1] // WIDTH) * WIDTH, dtype=torch.float64)
        padded[:, : thin.shape[1]] = thin
        row.tensor("thin", padded)
        transposed = outputs.left is not None
        product = row.tensor("product", padded.new_zeros(m if transposed else n, padded.shape[1]))
        row.fields |= {"width": padded.shape[1], "transposed": transposed}
    dense = outputs.dense
    if dense is not None:
        if m > 1 and dense.stride(1) != 1:
            raise ValueError("merge_tiles: rows of `dense` must be contiguous")
        row.matrices("out", [dense])
        row.fields["add"] = outputs.add
    row.run("MergeArgs", _core.merge_tiles)
    return TileResult(
        square=float(square[0]),
        undecided=int(counts[0]),
        majority=int(counts[1]),
        finite=bool(np.isfinite(square[0])),
        product=None if product is None or thin is None else product[:, : thin.shape[1]],
        sums=sums,
    )


def add_products(task: ProductTask, source: Tensor | FilePlace, target: Tensor | FilePlace) -> ProductProblem | None:
    """One pass over a matrix; see :func:`fastlora.ops.add_products.add_products`."""
    n, m = task.shape
    row = _Row(_core.ADD_FIELDS)
    segments: list[int] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    scales: list[float] = []
    for segment in task.segments:
        segments += (len(scales), len(segment.pairs), segment.left, segment.width)
        pairs += segment.pairs
        scales += segment.scales
    row.matrices("factors", [x for pair in pairs for x in pair])
    row.numbers("scales", scales)
    row.numbers("segments", segments, np.int64)
    row.fields |= {"n_segments": len(task.segments), "threads": task.threads or torch.get_num_threads()}
    row.fields["is_double"] = task.sums == torch.float64
    for name, place, dtype in (("from", source, task.source), ("to", target, task.target)):
        if isinstance(place, Tensor):
            row.matrices(name, [place])
            row.fields |= {f"{name}_file": -1}
        else:
            row.numbers(name, [0, n, m, m, _code(dtype)], np.int64)
            row.fields |= {f"{name}_file": place.file, f"{name}_offset": place.offset}
    kind, errno = row.run("AddArgs", _core.add_products)
    return ProductProblem(_WHAT[kind], errno) if kind else None
