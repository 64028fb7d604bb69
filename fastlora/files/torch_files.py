"""Files of ``torch.save``: tensors out of pickles that may call nothing else."""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from fastlora.errors import InputError
from fastlora.files.json_files import is_plain
from fastlora.files.tensor_files import LONGEST_NAME, first_line, refuse_pointer

MOST_VIEWS = 4
"""How often the bytes of a file may be used: tied tensors share theirs."""

CALLS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")
"""What a pickle of tensors names."""
LEGACY_PICKLES = 5
"""A file older than torch 1.6: magic number, version, system, tensors, keys; then the data."""


def read_torch(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file written by ``torch.save``; only tensors and plain containers are unpickled."""
    refuse_pointer(path)
    size = path.stat().st_size
    # Only mapped storages are held against the size of the file. Files older than torch 1.6 are no zip archives and
    # cannot be mapped.
    mapped = _is_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        # What a damaged pickle raises has no common class: unpickling runs operations with arguments from the file.
        raise _unreadable(path, error) from None
    if not isinstance(values, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in values.items()
    ):
        raise InputError(f"{path} holds no mapping from names to tensors; save the adapter again as safetensors")
    total = 0
    for key, value in values.items():
        if not is_plain(key) or len(key) > LONGEST_NAME:
            raise InputError(
                f"{path}: tensor {key[:60]!r} has control characters in its name, or is too long; rename it"
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise InputError(f"{path}: tensor {key!r} is no plain tensor; save the adapter again as safetensors")
        total += value.nbytes
        if value.nbytes > value.untyped_storage().nbytes() or total > MOST_VIEWS * size:
            raise InputError(
                f"{path}: tensor {key!r} is {list(value.shape)}, more than the file holds; "
                "save the adapter again as safetensors"
            )
    return {key: value.detach() for key, value in values.items()}


def _is_archive(path: Path) -> bool:
    """Whether a file of tensors is a zip archive, as all but the oldest are. Refuses what only a hostile one holds:
    entries that grow when unpacked, and calls of anything but what makes tensors."""
    size = path.stat().st_size
    try:
        archived = zipfile.is_zipfile(path)
        if not archived:
            with path.open("rb") as file:
                for _ in range(LEGACY_PICKLES):
                    _check_calls(path, file)
            return False
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(e.file_size for e in entries) > size or any(e.compress_type != zipfile.ZIP_STORED for e in entries):
                raise InputError(
                    f"{path} is compressed, which torch.save never does; save the adapter again as safetensors"
                )
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    _check_calls(path, io.BytesIO(archive.read(entry)))
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from None
    return True


def _check_calls(path: Path, file: IO[bytes]) -> None:
    """Refuses a pickle that names anything but tensors: what torch allows beside them can take any memory."""
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "STACK_GLOBAL" or (
            operation.name in ("GLOBAL", "INST") and not CALLS.fullmatch(str(argument))
        ):
            raise InputError(
                f"{path} calls {str(argument)[:80]!r}, which makes no tensor; "
                "have the adapter saved again as safetensors"
            )


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is no readable file of tensors ({first_line(error)}); "
        "save the adapter again as safetensors, or download it again"
    )
