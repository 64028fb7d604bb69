"""Products ``X_iᵀX_j`` as exact as float64 can hold, on devices that compute in float64 and on those that do not."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.core.float64 import has_float64

SLICE_BITS, SLICES = 8, 7
CHUNK = 128  # products of two slices are at most 2¹⁶ in units of their own: 128 of them sum exactly in float32


def inner(x: Tensor, y: Tensor) -> Tensor:
    """``x yᵀ [..., a, b]`` in float64 for rows ``x [..., a, n]`` and ``y [..., b, n]``.

    Where the device has no float64 the result is on the host: rows become sums of seven slices of eight bits relative
    to the largest entry of 128 (Ozaki, Ogita, Oishi, Rump 2012), whose products are exact in float32, and the sums of
    those are made in float64. What is left out is below ``2⁻⁵⁴`` of ``n·max|x|·max|y|``.
    """
    if has_float64(x.device):
        return x.double() @ y.double().mT
    return sliced(x, y)


def sliced(x: Tensor, y: Tensor) -> Tensor:
    """:func:`inner` in float32 alone, summed on the host."""
    left, left_units = _slices(x.float())
    right, right_units = (left, left_units) if y is x else _slices(y.float())
    total: Tensor | None = None
    for i in range(SLICES - 1, -1, -1):  # from the least on
        for j in range(SLICES - 1 - i, -1, -1):
            part = (left[i] @ right[j].mT).cpu().double()  # [..., chunks, a, b]
            part = part * (2.0 ** -(SLICE_BITS * (i + j)))
            total = part if total is None else total + part
    assert total is not None
    scale = left_units.cpu().double()[..., :, None] * right_units.cpu().double()[..., None, :]
    return (total * scale).sum(-3)


def _slices(x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Whole numbers ``[..., chunks, a, 128]``, most significant first, and their unit ``[..., chunks, a]``:
    ``x = Σ_s unit · 2^(-8 s) · slice_s``."""
    *batch, a, n = x.shape
    chunks = max(1, -(-n // CHUNK))
    x = torch.nn.functional.pad(x, (0, chunks * CHUNK - n)).reshape(*batch, a, chunks, CHUNK).transpose(-2, -3)
    largest = x.abs().amax(-1)
    exponent = largest.clamp(min=torch.finfo(torch.float32).tiny).log2().ceil().clamp(-118, 127)
    unit = torch.exp2(exponent - SLICE_BITS)
    rest, slices = x / unit[..., None], []
    for _ in range(SLICES):
        whole = rest.round()
        slices.append(whole)
        rest = (rest - whole) * 2.0**SLICE_BITS
    return slices, unit
