"""State dicts of models, in one file or several."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fastlora.core.names import CONFIG_NAME
from fastlora.errors import InputError
from fastlora.files.tensor_files import SAFETENSORS, read_safetensors
from fastlora.files.torch_files import read_torch


def read_model(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of tensors or in a model's directory (several files are put together)."""
    path = path.expanduser()
    if path.is_dir():
        if (path / CONFIG_NAME).exists():
            raise InputError(
                f"{path} is an adapter and no whole model; load it with `fl.load`, or merge it into its base model "
                "first (`merge_and_unload` of peft)"
            )
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise InputError(
                f"{path} holds no *.safetensors and no pytorch_model*.bin; pass a model's directory or file"
            )
        state: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in _read(file).items():
                if name in state:
                    raise InputError(f"{path}: several files hold {name!r}; pass the file that is meant")
                state[name] = tensor
        return state
    if not path.exists():
        raise InputError(f"there is no file or directory {path}; pass a model's directory, or its file of tensors")
    return _read(path)


def _read(path: Path) -> dict[str, Tensor]:
    return read_safetensors(path) if path.suffix == SAFETENSORS else read_torch(path)
