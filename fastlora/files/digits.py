"""Tensors that a narrow dtype has no digits for, and no second factor that could share their size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# A relative error that is told: twice the rounding of a float16 number.
TOLD = 2.0**-10


def digits_lost(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> list[str]:
    """The note on what float16 takes from tensors below its range, for the adapter ``name``; none in other dtypes.

    Costs one look at the tensors in float16, else nothing.
    """
    if dtype != torch.float16:
        return []
    lost = {path: share for path, x in tensors.items() if (share := _share(x, dtype)) > TOLD}
    if not lost:
        return []
    worst = max(lost, key=lost.__getitem__)
    gone = sum(int(((tensors[path].to(dtype) == 0) & (tensors[path] != 0)).sum()) for path in lost)
    others = f" (one of {len(lost)} such parameters)" if len(lost) > 1 else ""
    note = (
        f"{name}: {worst}{others} is too small for {str(dtype)[6:]}, which changes it by {100 * lost[worst]:.2g} % and "
        f"makes {gone} numbers zero; save with dtype=float32 or bfloat16 (--dtype)"
    )
    return [note]


def _share(tensor: Tensor, dtype: torch.dtype) -> float:
    """The relative error of a tensor in ``dtype``; 0 for what is not finite, which is refused elsewhere."""
    exact = tensor.double()
    size = float(exact.norm())
    return float((exact - tensor.to(dtype).double()).norm()) / size if 0 < size < torch.inf else 0.0
