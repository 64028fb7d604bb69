"""``LORA_MODEL``, what ComfyUI's nodes hand to each other: the tensors of a LoRA by name, as its files have them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fastlora import formats
from fastlora.adapters.loading import element_of
from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import require_updates
from fastlora.dialects.single_file import read_tensors
from fastlora.errors import InputError

READ = "comfy"
"""The format whose names ComfyUI reads in full, whatever the family."""


class State(dict[str, Tensor]):
    """Tensors by name, and the family of their model where it is known: names alone may leave it open."""

    family: str | None = None


def adapter_of(state: Mapping[str, Tensor], name: str, family: str | None = None) -> Adapter:
    """The adapter that a state stands for, on the CPU and without copies of what is there.

    Raises :class:`InputError` and :class:`UnsupportedAdapter` as :func:`fastlora.load` does for a file.
    """
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise InputError(f"{name} is of type {type(state).__name__}; a LORA_MODEL is needed, tensors by name")
    family = family or getattr(state, "family", None)
    tensors = {str(key): tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    return require_updates(element_of(read_tensors(tensors, {}, Path(name), name, family=family)), "LORA_MODEL")


def state_of(adapter: Adapter, format: str) -> tuple[State, list[str]]:
    """The tensors of the file of a format that the adapter becomes, and what is worth telling. All scales are in the
    tensors.

    Raises :class:`InputError` for modules that the format has no place for, and for models that are not known.
    """
    return _written(adapter, format)


def state_to_read(adapter: Adapter) -> tuple[State, list[str]]:
    """The same in names that ComfyUI reads. Where they depend on a family that is in doubt, names stay as they are."""
    try:
        return _written(adapter, READ)
    except InputError as doubt:
        state, notes = _written(adapter, None)
        return state, [*notes, f"names are handed on as they are, which ComfyUI may not read in full: {doubt}"]


def _written(adapter: Adapter, format: str | None) -> tuple[State, list[str]]:
    with tempfile.TemporaryDirectory(prefix="fastlora-") as folder:
        file = Path(folder) / "lora.safetensors"
        notes = formats.write_adapter(adapter, file, format=format)
        state = State(load_file(file))
    form = adapter.base.form
    state.family = None if form is None else form.family
    return state, notes
