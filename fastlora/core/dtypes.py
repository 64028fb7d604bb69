"""The dtypes of adapters: the widest of some, and by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastlora.errors import InputError

WIDTHS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPE_NAMES = {
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
}


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The widest of the dtypes; float16 with bfloat16 needs float32, which holds both."""
    given = set(dtypes) or {torch.float32}
    if len(given) == 1:
        return given.pop()
    if {torch.float16, torch.bfloat16} <= given:
        given.add(torch.float32)
    return max(given, key=WIDTHS.index)


def parse_dtype(dtype: torch.dtype | str | None, default: torch.dtype) -> torch.dtype:
    """A dtype that adapters are saved in; ``None`` gives the default (float64 inputs are saved as float32)."""
    if dtype is None:
        return torch.float32 if default == torch.float64 else default
    parsed = DTYPE_NAMES.get(dtype) if isinstance(dtype, str) else dtype
    if parsed not in (torch.float16, torch.bfloat16, torch.float32):
        raise InputError(f"dtype {dtype!r}: adapters are saved as float32, bfloat16 or float16")
    return parsed
