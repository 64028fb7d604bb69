"""Tensor files as mappings from name to tensor, read where they lie."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlora.errors import InputError

LFS_POINTER = b"version https://git-lfs"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, as a view of a private mapping that lives as long as the tensor.

    Nothing is copied, so addresses can be odd: they are where the file put the tensors.
    """
    _refuse_pointer(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is no readable safetensors file ({error}); it may be cut off: copy or download it again"
        ) from None


def read_torch(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file written by ``torch.save``; only tensors and plain containers are unpickled."""
    _refuse_pointer(path)
    try:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Files older than torch 1.6 are no zip archives and cannot be mapped.
            values = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path} is no readable file of tensors ({_first_line(error)}); "
            "save the adapter again as safetensors, or download it again"
        ) from None
    if not isinstance(values, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in values.items()
    ):
        raise InputError(f"{path} holds no mapping from names to tensors; save the adapter again as safetensors")
    return {key: value.detach() for key, value in values.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _refuse_pointer(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    if start == LFS_POINTER:
        raise InputError(f"{path} is a Git LFS pointer and not the file itself; run `git lfs pull` beside it")
