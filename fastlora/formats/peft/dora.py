"""The magnitudes of a DoRA (``use_dora``) in a PEFT directory: one number for each output of a module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastlora.core.data import DoraData, LoraData, Magnitude
from fastlora.core.dtypes import parse_dtype
from fastlora.engine.materialise import materialise
from fastlora.errors import InputError, OutputError
from fastlora.files.tensor_writing import cast_tensor
from fastlora.formats.peft.config import Fields
from fastlora.formats.peft.names import PREFIX
from fastlora.formats.peft.writing import AdapterFile
from fastlora.ops.finite import is_finite

NAME = "lora_magnitude_vector"
MAGNITUDE = re.compile(rf"(?P<module>.+)\.{NAME}(?:\.(?!weight$)[^.]+)?(?:\.weight)?")
"""A magnitude's name, with the adapter's name in it or without."""
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?A(?:\.[^.]+)*")


def taken(tensors: Mapping[str, Tensor], fields: Fields) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors without magnitudes, and these by the module's name in the file; of a LoRA, all are left."""
    if fields.values.get("use_dora") is not True:
        return dict(tensors), {}
    owners = {key: match["module"] for key in tensors if (match := MAGNITUDE.fullmatch(key)) is not None}
    return {k: t for k, t in tensors.items() if k not in owners}, {m: tensors[k] for k, m in owners.items()}


def with_magnitudes(
    adapter: LoraData, keys: Mapping[str, str], magnitudes: Mapping[str, Tensor], file: Path
) -> DoraData:
    """The DoRA that a LoRA and its magnitudes are. ``keys``: ``{module: name of its lora_A in the file}``.

    Raises :class:`InputError` for a module without a magnitude, or one that does not fit.
    """
    found: dict[str, Magnitude] = {}
    for module, update in adapter.updates.items():
        key = keys.get(module, "")
        match = FACTOR.fullmatch(key)
        vector = magnitudes.get(match["module"]) if match is not None else None
        if vector is None:
            raise InputError(
                f"{file}: module {module!r} has no {NAME}, and its configuration has use_dora; the file is incomplete; "
                "save or download the adapter again"
            )
        if vector.numel() != update.shape[0] or not vector.is_floating_point():
            raise InputError(
                f"{file}: {NAME} of module {module!r} is {str(vector.dtype)[6:]} {list(vector.shape)}, needed are "
                f"{update.shape[0]} numbers, one for each output; save or download the adapter again"
            )
        if not is_finite(vector.reshape(1, -1)):
            raise InputError(f"{file}: {NAME} of module {module!r} holds NaN or Inf; save the adapter again")
        found[module] = Magnitude(vector, "out")
    if len(magnitudes) > len(found):
        raise InputError(
            f"{file}: {len(magnitudes)} magnitudes for {len(found)} modules; save or download the adapter again"
        )
    return DoraData(
        adapter.name,
        adapter.updates,
        found,
        extras=adapter.extras,
        base=adapter.base,
        dtype=adapter.dtype,
        notes=adapter.notes,
    )


def write(directory: Path, record: DoraData, dtype: torch.dtype | str | None) -> None:
    """Writes a DoRA whose every module has a magnitude of its outputs.

    Raises :class:`InputError` for others, which PEFT does not have.
    """
    plain = next((m for m in record.updates if m not in record.magnitudes), None)
    columns = next((m for m, v in record.magnitudes.items() if v.axis == "in"), None)
    if plain is not None or columns is not None:
        what = f"{plain!r} has no magnitude" if plain is not None else f"{columns!r} has magnitudes of its inputs"
        raise InputError(
            f"DoRA adapter {record.name!r} cannot be a PEFT directory: PEFT has one magnitude for each output of every "
            f"module, and {what}; keep the file that it was read from"
        )
    target = parse_dtype(dtype, record.dtype)
    adapter = LoraData(
        record.name,
        record.updates,
        extras=record.extras,
        base=replace(record.base),
        dtype=target,
        provenance=record.provenance,
        notes=record.notes,
    )
    factors = {m: materialise([u.baked()], torch.float32)[0] for m, u in record.updates.items()}
    vectors = {m: cast_tensor(v.vector.flatten(), target, m) for m, v in record.magnitudes.items()}
    if any(u.layout.kind not in ("linear", "conv", "embedding") for u in record.updates.values()):
        raise OutputError(f"{directory} was not written: PEFT has no DoRA of experts in one parameter")
    shaped = {
        f"{PREFIX}{m}.{NAME}": v.reshape(1, -1, *(1 for _ in record.updates[m].layout.kernel)).contiguous()
        if record.updates[m].layout.kind == "conv"
        else v
        for m, v in vectors.items()
    }
    file = AdapterFile(directory, adapter, factors, target, shaped)
    file.put(factors)
    file.finish()
    file.close()
