"""What a module of a single file has beside a low-rank update: changes of biases and norms, replaced weights, and the
magnitudes of DoRA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastlora.core.data import Extra, Magnitude
from fastlora.dialects.naming import Named
from fastlora.dialects.suffixes import Stored
from fastlora.dialects.weights import Place, check_tensor
from fastlora.errors import InputError, NonFiniteError

BESIDE = ("diff_b", "up_bias", "set_weight", "dora_scale", "magnitude")
MAGNITUDES = ("dora_scale", "magnitude")


def swapped_halves(tensor: Tensor, where: Place) -> Tensor:
    """The two halves of a tensor's rows in the other order, as a copy."""
    if not tensor.dim() or tensor.shape[0] % 2:
        raise where.fail(f"has {list(tensor.shape)[:1]} rows, of which two halves are needed; it is of another model")
    half = tensor.shape[0] // 2
    return torch.cat([tensor[half:], tensor[:half]])


def extras_of(
    stored: Stored, named: Named, scaling: float, rows: int | None, file: Path
) -> Iterator[tuple[str, Extra]]:
    """``(parameter, extra)`` of what a module has beside its update. ``rows``: of its weight, if that is known."""
    parts, where = stored.parts, Place(file, stored.stem)
    shift: Tensor | None = None
    for part in ("diff_b", "up_bias"):
        if part not in parts:
            continue
        own = _checked(stored, part, file)
        if own.dim() != 1 or rows not in (None, len(own)):
            raise where.fail(f"has {stored.keys[part]!r} {list(own.shape)}, needed is [{rows or 'out'}]")
        wide = torch.promote_types(own.dtype, torch.float32)
        change = (own.double() * scaling).to(wide) if part == "up_bias" else own
        shift = change if shift is None else shift + change
    if shift is not None:
        yield f"{named.module}.bias", Extra("delta", swapped_halves(shift, where) if named.swapped else shift)
    if "diff" in parts and parts["diff"].dim() == 1:
        yield f"{named.module}.weight", Extra("delta", _checked(stored, "diff", file))
    if "set_weight" in parts:
        value = _checked(stored, "set_weight", file)
        if len(parts) > 1:
            raise where.fail(f"has {stored.keys['set_weight']!r} and other tensors, one of which replaces the others")
        yield f"{named.module}.weight", Extra("value", swapped_halves(value, where) if named.swapped else value)


def _checked(stored: Stored, part: str, file: Path) -> Tensor:
    tensor, key = stored.parts[part], stored.keys[part]
    check_tensor(key, tensor, file)
    if not bool(tensor.isfinite().all()):
        raise NonFiniteError(f"{file}: tensor {key!r} holds NaN or Inf; save it again")
    return tensor


def magnitude_of(stored: Stored, named: Named, shape: tuple[int, int], kernel: int, file: Path) -> Magnitude | None:
    """The magnitude of a DoRA module whose weight has this shape; ``None`` for a plain one.

    ``[out, 1, …]``, ``[out]`` and PEFT's ``[1, out, 1, …]`` are one number for each output, ``[1, in, …]`` one for each
    input channel.
    """
    given = [part for part in MAGNITUDES if part in stored.parts]
    if not given:
        return None
    where, vector = Place(file, stored.stem), _checked(stored, given[0], file)
    (n, m), sizes = shape, [k for k in vector.shape if k != 1]
    channels = m // kernel
    if len(given) > 1 or len(sizes) > 1 or (sizes and sizes[0] not in (n, channels)):
        raise where.fail(
            f"has {stored.keys[given[0]]!r} {list(vector.shape)}, needed is one number for each of {n} outputs or "
            f"{channels} inputs"
        )
    outputs = given == ["magnitude"] or (vector.dim() >= 1 and vector.shape[0] == n)
    axis_size = n if outputs else channels
    if vector.numel() != axis_size:
        raise where.fail(f"has {stored.keys[given[0]]!r} {list(vector.shape)}, needed are {axis_size} numbers")
    if outputs and named.swapped:
        flat = swapped_halves(vector.flatten(), where)
        vector = flat.reshape(vector.shape)
    return Magnitude(vector, "out" if outputs else "in")


def require_owner(stored: Stored, has_update: bool, file: Path) -> None:
    """Refuses what means nothing without an update: a lone alpha, a magnitude, a bias of ``lora_B``."""
    if has_update:
        return
    lone = next((p for p in ("alpha", "up_bias", *MAGNITUDES, "scalar", "scale") if p in stored.parts), None)
    if lone is not None and (lone != "alpha" or not {"diff", "diff_b", "set_weight"} & stored.parts.keys()):
        raise InputError(
            f"{file}: tensor {stored.keys[lone]!r} has no factors beside it; the file is incomplete: save or download "
            "the adapter again"
        )
