"""Matrices by address, and tables of them that go to a device in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
HALVES = (2, 3)
SIZES = (4, 8, 2, 2)  # bytes of an element, by dtype code

IntTable = np.ndarray[Any, np.dtype[np.int64]]


class Matrix(NamedTuple):
    """A stored factor: the long dimension ``n`` and the short one ``width``, whichever of them is contiguous."""

    address: int
    n: int
    width: int
    stride: int  # between the rows as they are stored, in elements
    code: int

    @staticmethod
    def of(x: Tensor, rows: bool) -> Matrix:
        """The matrix of a tensor ``[n, width]``, or ``[width, n]`` with ``rows``; refuses rows that are not
        contiguous."""
        height, width = x.shape
        if width > 1 and x.stride(1) != 1:
            raise ValueError(
                f"a matrix of a plan must have contiguous rows, got strides {x.stride()} for shape {tuple(x.shape)}: "
                "copy it with .contiguous() first"
            )
        if x.dtype not in CODES:
            raise TypeError(f"a matrix must be float16/bfloat16/float32/float64, got {x.dtype}")
        n, short = (width, height) if rows else (height, width)
        return Matrix(x.data_ptr(), n, short, x.stride(0), CODES[x.dtype])

    def is_odd(self) -> bool:
        """Whether elements lie across the addresses that hardware can load them from."""
        return self.address % SIZES[self.code] != 0

    def vector(self, rows: bool) -> int:
        """How many half-precision elements may be loaded at once: 8, 4 or 1."""
        contiguous = self.n if rows else self.width
        for v in (8, 4):
            if self.address % (2 * v) == 0 and self.stride % v == 0 and contiguous % v == 0:
                return v
        return 1


def table(rows: Sequence[Sequence[int]], columns: int) -> IntTable:
    """Rows of whole numbers as int64 ``[len(rows), columns]``, also where there are no rows."""
    return np.array(rows, dtype=np.int64).reshape(-1, columns)


class Sections:
    """Tables that are put one after another into one buffer, each at a 16-byte boundary."""

    def __init__(self) -> None:
        self._parts: list[IntTable] = []
        self._size = 0

    def add(self, part: IntTable) -> slice:
        """Where the table will be in the buffer."""
        section = slice(self._size, self._size + part.size)
        self._parts.append(part.reshape(-1))
        if part.size % 2:
            self._parts.append(np.zeros(1, dtype=np.int64))
        self._size += part.size + part.size % 2
        return section

    def to(self, device: torch.device) -> Tensor:
        """The buffer on a device, in one copy."""
        joined = np.concatenate(self._parts) if self._parts else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(joined).to(device)
