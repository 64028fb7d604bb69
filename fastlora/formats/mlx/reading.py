"""Folders of MLX: ``adapters.safetensors`` beside an ``adapter_config.json`` with ``lora_parameters``.

A layer adds ``scale · (x lora_a) lora_b`` with ``lora_a [in, r]`` and ``lora_b [r, out]``, so ``ΔW = scale (A B)ᵀ``.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlora.core.data import BaseInfo, DoraData, LoraData, Magnitude
from fastlora.core.dtypes import widest
from fastlora.core.factors import Factor
from fastlora.core.file_form import FileForm
from fastlora.core.inert import note_on_zeros
from fastlora.core.names import CONFIG_NAME
from fastlora.core.updates import EMBEDDING, LINEAR, Update
from fastlora.dialects.weights import MOST_ABOVE_SIDES, check_tensor
from fastlora.errors import FastloraError, InputError, NonFiniteError, UnsupportedAdapter
from fastlora.files.json_files import parse_object, require_file, shown
from fastlora.files.tensor_files import read_safetensors
from fastlora.formats.mlx.writing import WEIGHTS
from fastlora.ops.finite import is_finite

KEPT = ("num_layers",)
"""Fields of a configuration that a result keeps where its inputs agree."""
LARGEST_CONFIG = 1 << 20
PARTS = ("lora_a", "lora_b", "m")
TABLES = frozenset("embed_tokens wte tok_embeddings embed_in word_embeddings".split())
"""What embeddings are called, whose ``lora_a`` is ``[vocabulary, r]``."""


def detects(path: Path) -> bool:
    """Whether a path is such a folder."""
    if not (path.is_dir() and (path / WEIGHTS).is_file() and (path / CONFIG_NAME).is_file()):
        return False
    try:
        return is_config(_fields(path))
    except FastloraError:  # told by the reader of other configurations
        return False


def is_config(fields: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of MLX."""
    return "peft_type" not in fields and bool(fields.keys() & {"lora_parameters", "fine_tune_type", "lora_layers"})


def _fields(folder: Path) -> dict[str, Any]:
    require_file(folder / CONFIG_NAME, LARGEST_CONFIG)
    return parse_object((folder / CONFIG_NAME).read_bytes(), str(folder / CONFIG_NAME))


def read(path: Path, name: str) -> LoraData | DoraData:
    """The LoRA or DoRA in such a folder.

    Raises :class:`InputError` for fields and tensors that are damaged, and :class:`UnsupportedAdapter` for whole
    weights and for experts in one tensor.
    """
    fields, file = _fields(path), path / WEIGHTS
    if fields.get("fine_tune_type") == "full":
        raise UnsupportedAdapter(
            f"{path} holds whole weights (fine_tune_type = full): fuse them into the model with `mlx_lm.fuse`, and "
            "take the change with `fastlora extract BASE TUNED --rank N`"
        )
    modules = _grouped(read_safetensors(file), file)
    updates: dict[str, Update] = {}
    magnitudes: dict[str, Magnitude] = {}
    scales = _Scale(fields.get("lora_parameters"), path / CONFIG_NAME)
    for module, parts in modules.items():
        updates[module] = _update(module, parts, scales, file)
        if "m" in parts:
            magnitudes[module] = _magnitude(module, parts["m"], updates[module], file)
    model = fields.get("model")
    kept = {key: json.dumps(fields[key]) for key in KEPT if isinstance(fields.get(key), int)}
    form = FileForm("mlx", style="mlx", stems={module: module for module in updates}, metadata=kept)
    base = BaseInfo(model=model if isinstance(model, str) and model.isprintable() else None, form=form)
    dtype = widest(t.dtype for parts in modules.values() for t in parts.values())
    if magnitudes:
        return DoraData(name, updates, magnitudes, base=base, dtype=dtype)
    return LoraData(name, updates, base=base, dtype=dtype, notes=tuple(note_on_zeros(name, updates.values())))


def _grouped(tensors: Mapping[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, part = key.rpartition(".")
        if part not in PARTS or not module:
            raise UnsupportedAdapter(
                f"{file} has the tensor {key!r}, which is none of {', '.join(PARTS)} of a LoRA; it would be lost. Fuse "
                "the adapter with `mlx_lm.fuse`, and take the change with `fastlora extract BASE TUNED --rank N`"
            )
        check_tensor(key, tensor, file)
        modules.setdefault(module, {})[part] = tensor
    if not modules:
        raise InputError(f"{file} holds no tensors, so the adapter is empty; save it again")
    return modules


def _update(module: str, parts: Mapping[str, Tensor], scales: _Scale, file: Path) -> Update:
    a, b = parts.get("lora_a"), parts.get("lora_b")
    if a is None or b is None:
        raise InputError(f"{file}: module {module!r} needs lora_a and lora_b; save or download the adapter again")
    if a.dim() == 3:
        raise UnsupportedAdapter(
            f"{file}: module {module!r} holds the experts of a layer in one tensor ({list(a.shape)}), which is not "
            "read from MLX; fuse the adapter with `mlx_lm.fuse` and take the change with `fastlora extract`"
        )
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise InputError(
            f"{file}: module {module!r} has lora_a {list(a.shape)} and lora_b {list(b.shape)}; needed are [in, rank] "
            "and [rank, out]"
        )
    if a.shape[1] > max(a.shape[0] + b.shape[1], MOST_ABOVE_SIDES):
        raise InputError(f"{file}: module {module!r} has rank {a.shape[1]}, far above both of its sides")
    layout = EMBEDDING if module.rpartition(".")[2] in TABLES else LINEAR
    # Kernels need rows that lie together, so that the factors are copied once.
    B, A = b.mT.contiguous(), a.mT.contiguous()
    return Update(Factor.of("B", B), Factor.of("A", A), scales.of(a.shape[1]), layout)


def _magnitude(module: str, vector: Tensor, update: Update, file: Path) -> Magnitude:
    rows = update.shape[0]
    if vector.numel() != rows:
        raise InputError(f"{file}: {module}.m is {list(vector.shape)}, needed are {rows} numbers, one for each output")
    if not is_finite(vector.reshape(1, -1)):
        raise NonFiniteError(f"{file}: {module}.m holds NaN or Inf; save the adapter again")
    return Magnitude(vector, "out")


class _Scale:
    """``scale``, times ``alpha / rank`` in files of versions that had an alpha beside it."""

    def __init__(self, parameters: object, place: Path) -> None:
        if not isinstance(parameters, dict) or not _is_number(parameters.get("scale")):
            found = shown(parameters.get("scale")) if isinstance(parameters, dict) else shown(parameters)
            raise InputError(f"{place}: lora_parameters.scale is {found}, needed is a number; correct the file")
        self._scale, self._alpha, self._place = float(parameters["scale"]), parameters.get("alpha"), place
        if self._alpha is not None and not _is_number(self._alpha):
            raise InputError(f"{place}: lora_parameters.alpha is {shown(self._alpha)}, needed is a number")

    def of(self, rank: int) -> float:
        """The scale of a module of this rank."""
        return self._scale if self._alpha is None else self._scale * float(self._alpha) / rank


def _is_number(value: object) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
