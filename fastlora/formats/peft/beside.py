"""Trained parameters in files beside an adapter, which readers of the adapter alone lose without a word.

Trainers put there what PEFT has no place for: the projector of a vision-language model, the value head of a reward
model, new embeddings. They are told and left alone: what they mean, only their trainer knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from fastlora.core.names import CONFIG_NAME

TENSOR_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz"})

USUAL = re.compile(
    r"adapter_model(-\d+-of-\d+)?\.\w+"  # the adapter itself
    r"|(optimizer|scheduler|lr_scheduler|scaler|sampler|dl_state_dict|dataloader|random_states?|rng_state)\b.*"
    r"|(optimizer|scheduler|scaler|sampler|random_states|rng_state|custom_checkpoint)_\d+.*"
    r"|(training_args|trainer_state|training_state|recipe_state|fsdp_model_config|loss|history).*"
)
"""What a trainer's checkpoint holds beside the adapter, none of it parameters."""

USUAL_FOLDERS = re.compile(
    r"\..*|checkpoint[-_].*|(global_)?step[-_]?\d+|epoch[-_].*|optimizer_\d+|pytorch_model_fsdp_\d+|runs|logs?|wandb"
    r"|tensorboard|__pycache__"
)
"""Folders of trainers: other checkpoints, states of optimisers, logs."""

LISTED, MOST_ENTRIES = 8, 2000


def note_on_files(directory: Path, name: str) -> list[str]:
    """A sentence on the files of tensors beside an adapter that no reader of it reads; none where there are none."""
    files = sorted(_files(directory))
    if not files:
        return []
    more = f" and {len(files) - LISTED} more" if len(files) > LISTED else ""
    they, are, them = ("it", "is", "it") if len(files) == 1 else ("they", "are", "them")
    listed = ", ".join(files[:LISTED]) + more
    return [
        (
            f"adapter {name!r}: {listed} beside it may hold trained parameters (such as a projector, a head or new "
            f"embeddings). {they.capitalize()} {are} not read, and no part of a result: where the result needs {them}, "
            f"copy {them} beside it"
        )
    ]


def _files(directory: Path) -> Iterator[str]:
    for entry in _entries(directory):
        if _holds_tensors(entry):
            yield entry.name
        elif entry.is_dir() and not USUAL_FOLDERS.fullmatch(entry.name.lower()) and not _stands_alone(entry):
            yield from (f"{entry.name}/{file.name}" for file in _entries(entry) if _holds_tensors(file))


def _entries(directory: Path) -> list[Path]:
    try:
        return [entry for entry, _ in zip(directory.iterdir(), range(MOST_ENTRIES), strict=False)]
    except OSError:  # not ours to read
        return []


def _holds_tensors(file: Path) -> bool:
    name = file.name.lower()
    is_candidate = file.suffix.lower() in TENSOR_SUFFIXES and not name.startswith(".") and not USUAL.fullmatch(name)
    return is_candidate and file.is_file()


def _stands_alone(folder: Path) -> bool:
    """Whether a folder is another adapter, or a whole model, and not a part of this adapter."""
    if (folder / CONFIG_NAME).exists():
        return True
    try:
        fields = json.loads((folder / "config.json").read_bytes()[: 1 << 20])
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and ("model_type" in fields or "architectures" in fields)
