"""Trained parameters in files beside an adapter, which readers of the adapter alone lose without a word.

Trainers put there what PEFT has no place for: the projector of a vision-language model, the value head of a reward
model, new embeddings. They are told and left alone: what they mean, only their trainer knows.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastlora.core.names import CONFIG_NAME
from fastlora.errors import FastloraError
from fastlora.files.tensor_files import read_safetensors
from fastlora.files.torch_files import read_torch
from fastlora.formats.peft.names import OLD_WEIGHTS_NAME, WEIGHTS_NAME

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

COMPARED = 8
"""Tensors of two files that are compared."""


def note_on_files(directory: Path, name: str) -> list[str]:
    """A sentence on the files of tensors beside an adapter that no reader of it reads; none where there are none."""
    files, twins = sorted(_files(directory)), note_on_twin(directory, name)
    if not files:
        return twins
    more = f" and {len(files) - LISTED} more" if len(files) > LISTED else ""
    they, are, them = ("it", "is", "it") if len(files) == 1 else ("they", "are", "them")
    listed = ", ".join(files[:LISTED]) + more
    return [
        *twins,
        (
            f"adapter {name!r}: {listed} beside it may hold trained parameters (such as a projector, a head or new "
            f"embeddings). {they.capitalize()} {are} not read, and no part of a result: where the result needs {them}, "
            f"copy {them} beside it"
        ),
    ]


def note_on_twin(directory: Path, name: str) -> list[str]:
    """A sentence on an ``adapter_model.bin`` that holds something else than the ``.safetensors`` beside it: one of them
    is left from an earlier run. Names, shapes and some small tensors are compared."""
    if not os.path.isfile(os.path.join(directory, OLD_WEIGHTS_NAME)):
        return []
    file, twin = directory / WEIGHTS_NAME, directory / OLD_WEIGHTS_NAME
    if not file.is_file():
        return []
    try:
        tensors, others = read_safetensors(file), read_torch(twin)
    except FastloraError:  # it is of no use to any reader
        return []
    if tensors.keys() == others.keys():
        small = sorted(tensors, key=lambda key: tensors[key].numel())[:COMPARED]
        if all(_equal(tensors[key], others[key]) for key in small):
            return []
    return [f"adapter {name!r}: {twin.name} beside {file.name} holds other tensors and is not read, as in peft"]


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first.double(), second.double())


def _files(directory: Path) -> Iterator[str]:
    for entry in _entries(directory):
        if _holds_tensors(entry):
            yield entry.name
        elif _is_folder(entry) and not USUAL_FOLDERS.fullmatch(entry.name.lower()) and not _stands_alone(entry):
            inside = _entries(Path(entry.path))
            yield from (f"{entry.name}/{file.name}" for file in inside if _holds_tensors(file))


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(itertools.islice(entries, MOST_ENTRIES))
    except OSError:  # not ours to read
        return []


def _holds_tensors(file: os.DirEntry[str]) -> bool:
    name = file.name.lower()
    suffix = os.path.splitext(name)[1]
    is_candidate = suffix in TENSOR_SUFFIXES and not name.startswith(".") and not USUAL.fullmatch(name)
    # What is no link needs no question to the system. A link may lead nowhere, or in a circle.
    return is_candidate and (file.is_file(follow_symlinks=False) or os.path.isfile(file.path))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _stands_alone(folder: os.DirEntry[str]) -> bool:
    """Whether a folder is another adapter, or a whole model, and not a part of this adapter."""
    if Path(folder.path, CONFIG_NAME).exists():
        return True
    try:
        fields = json.loads(Path(folder.path, "config.json").read_bytes()[: 1 << 20])
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and ("model_type" in fields or "architectures" in fields)
