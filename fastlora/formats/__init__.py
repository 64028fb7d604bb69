"""Adapter files. :func:`load` finds out which format a path holds."""

from __future__ import annotations

from pathlib import Path

import torch

from fastlora.adapters.ia3 import IA3
from fastlora.adapters.lora import Adapter
from fastlora.adapters.task_vector import TaskVector
from fastlora.core.names import check_name
from fastlora.engine.write import write_adapters
from fastlora.errors import InputError, UnsupportedAdapter
from fastlora.files.locate import find
from fastlora.files.output import partial_of
from fastlora.formats import task_vector
from fastlora.formats.peft import ia3, read
from fastlora.formats.peft.config import CONFIG_NAME, read_fields


def save_adapter(
    adapter: Adapter, path: Path, *, dtype: torch.dtype | str | None = None, overwrite: bool = False
) -> Path:
    """Writes one adapter as a PEFT directory, atomically."""
    from fastlora.files.output import OutputDirectory

    with OutputDirectory(path, overwrite=overwrite) as staging:
        write_adapter(adapter, staging, dtype)
    return path


def write_adapter(adapter: Adapter, directory: Path, dtype: torch.dtype | str | None = None) -> None:
    """Writes one adapter into a directory that is being staged."""
    write_adapters({directory: adapter}, dtype)


__all__ = ["load"]


def load(path: str | Path, name: str | None = None) -> Adapter | IA3 | TaskVector:
    """Loads an adapter without copying its tensors.

    path: a PEFT directory, the Hub id (``org/name``) of one, or the file of a task vector.
    name: what the adapter is called from here on; the folder name by default.

    Raises :class:`InputError` where nothing can be read and :class:`UnsupportedAdapter` for adapters whose
    numbers would come out wrong.
    """
    found = find(path)
    name = found.name if name is None else name
    check_name(name)
    directory = found.path
    if directory.is_file():
        if directory.suffix == task_vector.SUFFIX and task_vector.is_task_vector(directory):
            return task_vector.read(directory, name.removesuffix(task_vector.SUFFIX))
        _refuse_file(directory)
    unfinished = partial_of(directory)
    if unfinished is not None:
        raise InputError(
            f"{directory} lies in {unfinished.name}, an output that was never finished; run that command again"
        )
    if not (directory / CONFIG_NAME).exists():
        _refuse_directory(directory)
    fields = read_fields(directory)
    if fields.values.get("peft_type") == "IA3":
        return ia3.read(directory, name, fields)
    return read.read(directory, name, fields)


def _refuse_file(path: Path) -> None:
    if (path.parent / CONFIG_NAME).exists():
        raise InputError(f"{path} is one file of an adapter; pass its directory {path.parent}")
    if path.suffix == ".safetensors":
        raise UnsupportedAdapter(
            f"{path} is a single file without {CONFIG_NAME}; adapters are read from PEFT directories: "
            "convert it with diffusers (`pipe.load_lora_weights(...)`, then `save_pretrained` of the "
            "adapted model). A whole model takes part through `fl.task_vector(base, finetuned)`"
        )
    raise InputError(f"{path} is a file, needed is a PEFT adapter directory (with {CONFIG_NAME})")


def _refuse_directory(directory: Path) -> None:
    inside = sorted(p.parent.name for p in directory.glob(f"*/{CONFIG_NAME}"))
    if inside:
        raise InputError(
            f"{directory} holds {len(inside)} adapters ({', '.join(inside[:4])}) and is none itself; pass "
            f"one of them, for example {directory / inside[0]}"
        )
    if (directory / "config.json").exists():
        raise InputError(
            f"{directory} looks like a whole model (config.json, no {CONFIG_NAME}); needed is a PEFT adapter directory "
            "(a fine-tuned model takes part through `fl.task_vector(base, finetuned)`)"
        )
    found = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
    raise InputError(
        f"{directory} has no {CONFIG_NAME} (found: {found}); pass the directory that "
        "`model.save_pretrained(...)` of a PEFT model wrote"
    )
