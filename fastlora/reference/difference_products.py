"""The products of a difference by its formula: see ``ops/difference_products.py``."""

from __future__ import annotations

from torch import Tensor


def difference_products(
    new: Tensor, old: Tensor | None, right: Tensor | None, left: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """``Y = D X − S``, or ``S`` where there is no ``X``; ``Dᵀ Y``; ``‖D‖²``: in float64, from the whole ``D``."""
    D = new.double() if old is None else new.double() - old.double()
    if right is None:
        images = left
    else:
        images = D @ right if left is None else D @ right - left
    return images, None if images is None else D.mT @ images, D.square().sum()
