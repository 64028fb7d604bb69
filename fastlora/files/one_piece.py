"""Stored matrices as the bytes of a file."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from fastlora.backends import cpu

PLAIN = (Tensor, torch.nn.Parameter)
"""Classes whose numbers are in memory; others may have them elsewhere."""


def in_one_piece(
    tensors: list[Tensor], dtype: torch.dtype, scales: Tensor | None = None
) -> bytearray | memoryview | None:
    """The numbers of tensors, one tensor after another, each times its scale in ``scales``, of ``dtype``, too.

    ``None`` where a tensor is of another class, has another dtype or is on a device, or a number is NaN or Inf, or
    becomes it.
    """
    joined = cpu.joined(tensors, dtype)
    if joined is not None and scales is None:
        return joined
    if joined is not None:
        numbers = torch.frombuffer(joined, dtype=dtype)
    elif any([type(x) not in PLAIN or x.dtype is not dtype or not x.is_cpu for x in tensors]):
        return None
    else:  # without the compiled module, or of tensors whose numbers do not lie one after another
        numbers = _flatten_dense_tensors(tensors).detach()  # type: ignore[no-untyped-call]
    if scales is not None:
        numbers = numbers * scales
    if not math.isfinite(numbers.sum(dtype=torch.float32)):  # NaN and Inf stay what they are in a sum
        return None
    data: memoryview = numbers.view(torch.uint8).numpy().data
    return data
