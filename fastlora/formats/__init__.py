"""Adapter files. :func:`load` finds out which format a path holds."""

from __future__ import annotations

from pathlib import Path

from fastlora.adapter import Adapter
from fastlora.errors import InputError, UnsupportedAdapter
from fastlora.finetune import TaskVector
from fastlora.formats import ia3, peft, task_vector
from fastlora.formats.peft_config import CONFIG_NAME, read_fields
from fastlora.ia3 import IA3
from fastlora.locate import check_name, find
from fastlora.output import partial_of

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
    return peft.read(directory, name, fields)


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
