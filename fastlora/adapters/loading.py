"""From a path to an adapter of one of the kinds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastlora import formats
from fastlora.adapters.ia3 import IA3
from fastlora.adapters.lora import Adapter
from fastlora.adapters.task_vector import TaskVector
from fastlora.core.data import AdapterData, DeltaData, Ia3Data, LoraData
from fastlora.runtime.cpython import paused_collector

Element = Adapter | IA3 | TaskVector
"""Whatever can be loaded, added and scaled."""

KINDS: dict[type[AdapterData], type[Element]] = {LoraData: Adapter, Ia3Data: IA3, DeltaData: TaskVector}
"""What a record that a format read becomes: the same fields, with verbs."""


def load(path: str | Path, name: str | None = None) -> Element:
    """Loads one adapter, LoRA or (IA)³, or a saved task vector; the format is detected. Tensors stay in the file,
    memory-mapped.

    Raises:
        InputError: a path, file, field or tensor that cannot be used. UnsupportedAdapter: a kind whose numbers would
            come out wrong (DoRA, …). Both say what was found and what to do.
    """
    with paused_collector():
        record = formats.read(Path(path), name)
        fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        return KINDS[type(record)](**fields)
