"""``difference_products``: what the difference of two stored matrices makes of a few columns, and its transpose."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastlora.ops import dispatch

Precision = Literal["coarse", "float32", "float64"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class DifferenceProducts(NamedTuple):
    """Float64 ``D X − S [n, width]``, ``Dᵀ Y [m, width]`` and ``‖D‖²``, of those that were asked for."""

    images: Tensor | None
    preimages: Tensor | None
    square: float | None


def difference_products(
    old: Tensor | None,
    new: Tensor,
    right: Tensor | None = None,
    left: Tensor | None = None,
    *,
    back: bool = True,
    square: bool = False,
    precision: Precision = "float32",
    threads: int | None = None,
) -> DifferenceProducts:
    r"""Both products of a power step with ``D = new − old``, which is never formed as a whole, in one reading::

        Y = D X − S            X = right [m, width], S = left [n, width] or 0;  Y = left where there is no right
        Z = Dᵀ Y
        ‖D‖² = Σ D_ij²

    Args:
        old, new: ``[n, m]``, each float16, bfloat16, float32 or float64; ``old=None`` for 0. Rows may have gaps.
        right, left: float64 columns.
        back: whether ``Z`` is wanted.
        square: whether ``‖D‖²`` is.
        precision: ``"float64"``: all in float64. ``"float32"``: as float32, with ``Z`` summed in float64 over blocks of
            128 rows or less; of ``X`` at least 16 bits count. ``"coarse"``: where the processor has tiles of bfloat16,
            of numbers rounded to it; else as float32, sums too. ``Z`` is always that of the ``Y`` that is returned.
            Differences of float64 numbers are always taken and multiplied in float64.
        threads: of the CPU; by default torch's.

    Returns:
        :class:`DifferenceProducts`. ``‖D‖²`` is that of ``D`` rounded to float32 or float64. Below float64, numbers
        beyond 1e±15 may be lost. NaN and Inf give what is not finite. The bits depend on the arguments but ``threads``,
        the instruction set and the backend alone.

    Raises:
        TypeError, ValueError: dtype or shape.

    Cost: reading both, ``2·n·m·width`` operations a product; ``m·width`` numbers a thread.
    """
    for name, x in (("old", old), ("new", new)):
        if x is not None and x.dtype not in DTYPES:
            raise TypeError(f"difference_products: {name} must be floating-point of 16 to 64 bits, got {x.dtype}")
    if new.dim() != 2 or (old is not None and old.shape != new.shape):
        shapes = [list(x.shape) for x in (new, old) if x is not None]
        raise ValueError(f"difference_products: new and old must be matrices of one shape, got {shapes}")
    n, m = new.shape
    width = 0
    for name, x, length in (("right", right, m), ("left", left, n)):
        if x is None:
            continue
        if x.dtype != torch.float64:
            raise TypeError(f"difference_products: {name} must be float64, got {x.dtype}")
        if x.dim() != 2 or x.shape[0] != length:
            raise ValueError(f"difference_products: {name} must be [{length}, width], got {list(x.shape)}")
        width = x.shape[1]
    if right is not None and left is not None and right.shape[1] != left.shape[1]:
        raise ValueError(
            f"difference_products: right and left must be as wide, got {right.shape[1]} and {left.shape[1]} columns"
        )
    back = back and (right is not None or left is not None)
    if old is not None and torch.float64 in (old.dtype, new.dtype):
        precision = "float64"
    if min(n, m) and (width or square):
        found_all: DifferenceProducts = dispatch.run(
            "difference_products", new, old, right, left, back, square, precision, threads or torch.get_num_threads()
        )
        return found_all
    images = None if right is None else right.new_zeros(n, width) if left is None else -left
    return DifferenceProducts(images, new.new_zeros(m, width, dtype=torch.float64) if back else None, 0.0)
