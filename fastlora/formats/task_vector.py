"""Task vectors as one ``.safetensors`` file, and state dicts of models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

import fastlora
from fastlora.engine import is_finite, parse_dtype
from fastlora.errors import InputError, NonFiniteError, OutputError
from fastlora.finetune import TaskVector
from fastlora.formats.peft_config import CONFIG_NAME
from fastlora.formats.peft_write import cast
from fastlora.formats.tensors import TensorFile, read_safetensors, read_torch
from fastlora.output import replacing

KIND = "task_vector"
SUFFIX = ".safetensors"


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
    return read_safetensors(path) if path.suffix == SUFFIX else read_torch(path)


def is_task_vector(path: Path) -> bool:
    """Whether a safetensors file says that it is a task vector."""
    return _metadata(path).get("kind") == KIND


def _metadata(path: Path) -> dict[str, object]:
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("fastlora", "{}"))
    except Exception:  # whatever is wrong with the file is told by the reader, better
        return {}
    return found if isinstance(found, dict) else {}


def read(path: Path, name: str) -> TaskVector:
    """The task vector in a file that :func:`write` wrote."""
    deltas = read_safetensors(path)
    for parameter, delta in deltas.items():
        if not delta.is_floating_point():
            raise InputError(f"{path}: {parameter} is {str(delta.dtype)[6:]}, which is no change of a parameter")
        if not is_finite(delta.reshape(1, -1)):
            raise NonFiniteError(f"{path}: {parameter} holds NaN or Inf; make the task vector again")
    provenance = _metadata(path).get("provenance")
    return TaskVector(name, deltas, provenance=provenance if isinstance(provenance, dict) else {"task_vector": name})


def write(path: Path, vector: TaskVector, dtype: torch.dtype | str | None, *, overwrite: bool) -> Path:
    """Writes a file of the changes, in ``dtype`` (float32 by default), whose metadata say what it is."""
    if path.suffix != SUFFIX:
        raise OutputError(f"{path}: a task vector is one file; give a name that ends in {SUFFIX}")
    if not vector.deltas:
        raise OutputError(f"{path} was not written: task vector {vector.name!r} changes nothing")
    target = parse_dtype(dtype, torch.float32)
    tensors = {p: cast(d, target, p) for p, d in vector.deltas.items()}
    data = {"kind": KIND, "version": fastlora.__version__, "provenance": vector.provenance}
    with replacing(path, overwrite=overwrite) as staging:
        file = TensorFile(staging, tensors, {"format": "pt", "fastlora": json.dumps(data, default=str)})
        file.write(tensors, check=True)
        file.close()
    return path
