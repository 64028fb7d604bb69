"""A DoRA as the single file that it is from: its factors as those of a LoRA, and ``dora_scale`` beside them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fastlora.core.data import DoraData, LoraData, Magnitude
from fastlora.dialects.families import family_named
from fastlora.dialects.writing import FileAdapter, laid_out
from fastlora.errors import InputError


def laid_dora(record: DoraData) -> LoraData:
    """The DoRA as the file of its form will have it.

    Raises :class:`InputError` where a module with a magnitude is no module of its own there.
    """
    adapter = LoraData(
        record.name,
        record.updates,
        extras=record.extras,
        base=record.base,
        dtype=record.dtype,
        provenance=record.provenance,
        notes=record.notes,
    )
    file = laid_out(adapter, None)
    assert isinstance(file, FileAdapter)
    form = record.base.form
    family = family_named(form.family) if form is not None and form.family is not None else None
    scales: dict[str, Tensor] = {}
    for module, magnitude in record.magnitudes.items():
        place, shape = file.places[module], record.updates[module].shape
        original = family.original(module, shape) if family is not None else None
        is_turned = file.style.original and original is not None and original[1]
        if place.row or place.rows != shape[0] or is_turned:
            raise InputError(
                f"DoRA adapter {record.name!r}: {module} is no module of its own in a file of the dialect "
                f"{file.style.name!r}, so its magnitude has no place there; keep the file that it was read from"
            )
        scales[f"{place.stem}.dora_scale"] = _shaped(magnitude)
    return replace(file, others={**file.others, **scales})


def _shaped(magnitude: Magnitude) -> Tensor:
    """``[out, 1, …]`` or ``[1, in, …]``, which tell the two apart."""
    vector = magnitude.vector
    if vector.dim() >= 2 and vector.shape[0 if magnitude.axis == "out" else 1] == vector.numel():
        return vector
    return vector.reshape(-1, 1) if magnitude.axis == "out" else vector.reshape(1, -1)
