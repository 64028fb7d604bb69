"""Task vectors as one ``.safetensors`` file, and state dicts of models."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastlora._version import __version__
from fastlora.core.data import AdapterData, DeltaData
from fastlora.core.dtypes import parse_dtype
from fastlora.core.model_facts import ModelFacts
from fastlora.errors import InputError, NonFiniteError
from fastlora.files.json_files import shown
from fastlora.files.tensor_files import SAFETENSORS, read_safetensors
from fastlora.files.tensor_writing import TensorFile, cast_tensor
from fastlora.ops.finite import is_finite

KIND = "task_vector"
SUFFIX = SAFETENSORS
WRITES = (DeltaData,)


def detects(path: Path) -> bool:
    """Whether a path is a safetensors file that says that it is a task vector."""
    return path.suffix == SUFFIX and path.is_file() and _metadata(path).get("kind") == KIND


def _metadata(path: Path) -> dict[str, object]:
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("fastlora", "{}"))
    except Exception:  # whatever is wrong with the file is told by the reader, better
        return {}
    return found if isinstance(found, dict) else {}


def read(path: Path, name: str) -> DeltaData:
    """The task vector in a file that :func:`write` wrote."""
    deltas = read_safetensors(path)
    for parameter, delta in deltas.items():
        if not delta.is_floating_point():
            raise InputError(f"{path}: {parameter} is {str(delta.dtype)[6:]}, which is no change of a parameter")
        if not is_finite(delta.reshape(1, -1)):
            raise NonFiniteError(f"{path}: {parameter} holds NaN or Inf; make the task vector again")
    name = name.removesuffix(SUFFIX)
    metadata = _metadata(path)
    provenance = metadata.get("provenance")
    return DeltaData(
        name,
        deltas,
        notes=() if any(bool(d.any()) for d in deltas.values()) else (f"task vector {name!r} changes nothing",),
        provenance=provenance if isinstance(provenance, dict) else {},
        facts=_facts(metadata.get("facts"), path),
    )


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and 2 <= len(value) <= 5 and all(type(n) is int and 0 < n < 1 << 31 for n in value)


def _facts(stored: object, path: Path) -> ModelFacts:
    """What was known of the model; files of other versions lack some of it."""
    if stored is None:
        return ModelFacts()
    defaults: dict[str, Any] = asdict(ModelFacts())
    found: dict[str, Any] = {}
    for key, value in (stored if isinstance(stored, dict) else {"": None}).items():
        default = defaults.get(key)
        if isinstance(default, tuple) and isinstance(value, list) and all(isinstance(v, str) for v in value):
            found[key] = tuple(value)
        elif key == "ties" and isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
            found[key] = value
        elif key == "still" and isinstance(value, dict) and all(map(_is_shape, value.values())):
            found[key] = {module: tuple(shape) for module, shape in value.items()}
        elif key == "task_type" and isinstance(value, str | None):
            found[key] = value
        elif isinstance(default, bool) and isinstance(value, bool):
            found[key] = value
        elif key == "excluded" and isinstance(value, int | float) and math.isfinite(value) and value >= 0:
            found[key] = float(value)
        else:
            raise InputError(
                f"{path}: its metadata say {shown(key)} of the model in a form that is not understood; make the task "
                "vector again"
            )
    return ModelFacts(**found)


def write(path: Path, vector: AdapterData, dtype: torch.dtype | str | None) -> None:
    """Writes a file of the changes, in ``dtype`` (float32 by default), whose metadata say what it is."""
    assert isinstance(vector, DeltaData)
    target = parse_dtype(dtype, torch.float32)
    tensors = {p: cast_tensor(d, target, p) for p, d in vector.deltas.items()}
    facts = asdict(vector.facts)
    data = {"kind": KIND, "version": __version__, "provenance": vector.provenance, "facts": facts}
    file = TensorFile(path, tensors, {"format": "pt", "fastlora": json.dumps(data, default=str)})
    file.write(tensors, check=True)
    file.close()
