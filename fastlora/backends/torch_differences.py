"""Products of the difference of two stored matrices, by tiles of rows in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.ops.difference_products import DifferenceProducts
from fastlora.runtime.threads import in_threads, one_thread

STRETCHES = 8
"""Of rows, whose sums are added in their order."""
ROWS = 128
"""Of a tile: so many are summed in float32."""


def products(
    new: Tensor,
    old: Tensor | None,
    right: Tensor | None,
    left: Tensor | None,
    back: bool,
    square: bool,
    precision: str,
    threads: int,
) -> DifferenceProducts:
    """See :func:`fastlora.ops.difference_products.difference_products`; ``"coarse"`` is ``"float32"``."""
    device = new.device
    n, m = new.shape
    dtype = torch.float64 if precision == "float64" else torch.float32
    right, left = (None if x is None else x.to(dtype) for x in (right, left))
    given = right if right is not None else left
    width = 0 if given is None else given.shape[1]
    images = None if right is None else torch.empty(n, width, dtype=dtype, device=device)

    def walk(first: int) -> tuple[Tensor | None, float]:
        found = torch.zeros(m, width, dtype=torch.float64, device=device) if back else None
        total = 0.0
        for start in range(first, min(first + length, n), ROWS):
            rows = slice(start, min(start + ROWS, first + length, n))
            tile = new[rows].to(dtype)
            if old is not None:
                tile = tile - old[rows].to(dtype)
            if square:
                total += float(tile.double().square().sum())
            image = None if left is None else left[rows]
            if right is not None:
                assert images is not None
                product = tile @ right
                image = product if image is None else product - image
                images[rows] = image
            if found is not None:
                assert image is not None
                found += (tile.mT @ image).double()
        return found, total

    length = -(-n // (STRETCHES * ROWS)) * ROWS
    with one_thread():  # the number of torch's threads changes bits
        found = in_threads(walk, range(0, n, length), threads if device.type == "cpu" else 1)
    preimages: Tensor | None = None
    if back:
        preimages = torch.zeros(m, width, dtype=torch.float64, device=device)
        for part, _ in found:
            assert part is not None
            preimages += part
    total = sum(total for _, total in found) if square else None
    return DifferenceProducts(None if images is None else images.double(), preimages, total)
