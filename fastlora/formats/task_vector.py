"""Task vectors as one ``.safetensors`` file, and state dicts of models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from fastlora._version import __version__
from fastlora.adapters.task_vector import TaskVector
from fastlora.core.dtypes import parse_dtype
from fastlora.engine.checks import is_finite
from fastlora.errors import InputError, NonFiniteError, OutputError
from fastlora.files.output import replacing
from fastlora.files.tensor_files import TensorFile, cast_tensor, read_safetensors

KIND = "task_vector"
SUFFIX = ".safetensors"


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
    tensors = {p: cast_tensor(d, target, p) for p, d in vector.deltas.items()}
    data = {"kind": KIND, "version": __version__, "provenance": vector.provenance}
    with replacing(path, overwrite=overwrite) as staging:
        file = TensorFile(staging, tensors, {"format": "pt", "fastlora": json.dumps(data, default=str)})
        file.write(tensors, check=True)
        file.close()
    return path
