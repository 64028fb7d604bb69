"""From a path to an adapter."""

from __future__ import annotations

from pathlib import Path

from fastlora import formats
from fastlora.adapters.ia3 import IA3
from fastlora.adapters.lora import Adapter
from fastlora.adapters.task_vector import TaskVector
from fastlora.runtime.cpython import paused_collector


def load(path: str | Path, name: str | None = None) -> Adapter | IA3 | TaskVector:
    """Loads one adapter, LoRA or (IA)³, or a saved task vector; the format is detected. Tensors stay in the file,
    memory-mapped.

    Raises:
        InputError: a path, file, field or tensor that cannot be used. UnsupportedAdapter: a kind whose numbers would
            come out wrong (DoRA, …). Both say what was found and what to do.
    """
    with paused_collector():
        return formats.load(Path(path), name)
