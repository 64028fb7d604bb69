"""``add_products``: low-rank products onto a stored matrix, from memory to memory or from file to file.

What is made is a :class:`ProductTask`: ``W' = W + Σ_i s_i L_i R_i`` for columns that each have products of their own.
Sums of products are formed first, in float32 or float64, and ``W`` is added to them as they are rounded: once, to
nearest even. ``s_i L_i`` is rounded to the dtype of the sums before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastlora.ops import dispatch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
What = Literal["not finite", "read", "short", "write"]


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Columns ``[left, left + width)``, and the products ``scales_i · L_i [n, r_i] · R_i [r_i, width]`` for them."""

    left: int
    width: int
    pairs: Sequence[tuple[Tensor, Tensor]] = ()
    scales: Sequence[float] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ProductTask:
    """What is added to ``W [n, m]``.

    Args:
        shape: ``(n, m)``.
        segments: of all columns, in their order; those without products are converted alone.
        source: the dtype of ``W``. target: that of ``W'``.
        sums: in which the products are summed, float32 or float64; not narrower than a factor.
        threads: that the CPU kernel uses; by default torch's.
    """

    shape: tuple[int, int]
    segments: Sequence[Segment]
    source: torch.dtype
    target: torch.dtype
    sums: torch.dtype = torch.float32
    threads: int | None = None

    def __post_init__(self) -> None:
        n, m = self.shape
        for name, dtype, allowed in (
            ("source", self.source, DTYPES),
            ("target", self.target, DTYPES),
            ("sums", self.sums, DTYPES[2:]),
        ):
            if dtype not in allowed:
                raise TypeError(f"add_products: {name} is {dtype}; needed is one of {', '.join(map(str, allowed))}")
        at = 0
        for segment in self.segments:
            if segment.left != at or segment.width < 0 or len(segment.pairs) != len(segment.scales):
                raise ValueError("add_products: segments must have all columns in their order, and a scale a pair")
            at += segment.width
            for L, R in segment.pairs:
                if L.dim() != 2 or R.dim() != 2 or (L.shape[0], R.shape[1]) != (n, segment.width):
                    raise ValueError(
                        f"add_products: factors {list(L.shape)} and {list(R.shape)} for {[n, segment.width]}"
                    )
                if L.shape[1] != R.shape[0]:
                    raise ValueError(f"add_products: factors {list(L.shape)} and {list(R.shape)} have no product")
                if torch.float64 in (L.dtype, R.dtype) and self.sums != torch.float64:
                    raise TypeError("add_products: factors in float64 need sums in float64")
        if at != m:
            raise ValueError(f"add_products: segments of {at} columns for {m}")

    @property
    def factors(self) -> list[Tensor]:
        """All factors, for the choice of a backend."""
        return [x for segment in self.segments for pair in segment.pairs for x in pair]

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return next((x.device for x in self.factors), torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class FilePlace:
    """Where a matrix starts in an open file, row after row."""

    file: int
    offset: int


@dataclass(frozen=True, slots=True)
class ProductProblem:
    """What stopped a call: NaN or infinity in the result, a file that cannot be read (``errno``), is shorter than
    that, or cannot be written (``errno``)."""

    what: What
    errno: int = 0


def add_products(task: ProductTask, source: Tensor | FilePlace, target: Tensor | FilePlace) -> ProductProblem | None:
    """Makes ``target`` of ``source``; ``None`` where all is well. Both are in memory, or both in files.

    In memory ``target`` may be ``source``; rows are contiguous. What is not finite is written to memory and not to a
    file. For one backend and instruction set bits depend on the task alone, not on threads or tiles.

    Cost: ``W`` read and ``W'`` written once, ``2·n·m·Σr`` operations; memory of a tile of about 0.5 MB and the factors
    ``R`` in the dtype of the sums, a thread.
    """
    for name, x, dtype in (("source", source, task.source), ("target", target, task.target)):
        if isinstance(x, Tensor) and (x.dtype != dtype or tuple(x.shape) != task.shape):
            raise ValueError(f"add_products: {name} is {x.dtype} {list(x.shape)}, the task {dtype} {list(task.shape)}")
        if isinstance(x, Tensor) and x.shape[1] > 1 and x.stride(1) != 1:
            raise ValueError(f"add_products: rows of {name} must be contiguous")
    if isinstance(source, Tensor) != isinstance(target, Tensor):
        raise ValueError("add_products: source and target are both in memory or both in files")
    problem: ProductProblem | None = dispatch.run("add_products", task, source, target)
    return problem
