"""An adapter in another format: the same ΔW under other names, with scales stored in another way."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from fastlora.adapters.dora import DoRA
from fastlora.adapters.loading import Element, load
from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import require_updates
from fastlora.core.file_form import PEFT, FileForm
from fastlora.errors import InputError
from fastlora.files.earlier import Overwrite

Kind = TypeVar("Kind", Adapter, DoRA)


def convert(
    adapter: str | Path | Adapter | DoRA,
    path: str | Path,
    to: str,
    *,
    family: str | None = None,
    rank: int | None = None,
    dtype: torch.dtype | str | None = None,
    uniform_rank: int | bool | None = None,
    keep_private: bool = False,
    overwrite: Overwrite = False,
) -> Path:
    """Writes an adapter in another format, in the dialect in which its readers agree: the same ``ΔW = s B A``.

    Fused projections are cut and parts put together as that dialect has them, exactly. Numbers change only where a
    scale has to go into ``B`` (one rounding). A file of the same format is mended: its modules get the names and scales
    that every reader takes for the same numbers.

    Args:
        adapter: a path or Hub id (:func:`fastlora.load`), or an :class:`Adapter` or DoRA, whose magnitudes are kept.
        path: the file to make, ``NAME.safetensors``, or for PEFT the directory.
        to: ``"peft"``, ``"kohya"``, ``"diffusers"``, ``"comfy"``, ``"xlabs"`` or ``"mlx"``.
        family: the models that it is for (``"sdxl"``, ``"flux"``), where its names fit several.
        rank: the rank at which modules are read that are no plain LoRA (LoHa, LoKr, whole matrices).
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype; by default that of the adapter.
        uniform_rank: as in :meth:`Adapter.save`.
        keep_private: keep metadata that may say of a training run what its owner would not tell (folders, captions).
        overwrite: replace an earlier output of fastlora, known by what its files say; ``"force"`` replaces whatever is
            there.

    Returns:
        ``path``. Of a single file with text encoders, PEFT gets a folder for each model: ``path/unet``, ….

    Raises:
        InputError: a format or family that is not known, modules that the format has no place for, a path that is none
            for it.
        UnsupportedAdapter: another kind of adapter than LoRA and DoRA.
        OutputError: a path that exists or cannot be written, a full disk, a number that overflows ``dtype``.

    Cost: one read of the factors, one write of the result; memory does not grow with the model, but for the ``B`` of
    projections that are fused from parts of one ``A``.
    """
    given: Element
    if isinstance(adapter, Adapter | DoRA):
        if rank is not None:
            raise InputError("rank: an adapter in memory has its factors already; use `adapter.compress(rank)`")
        given = adapter
    else:
        given = load(adapter, family=family, rank=rank)
        for note in given.notes:
            warnings.warn(note, stacklevel=2)
    if isinstance(given, DoRA):
        if uniform_rank:
            raise InputError(f"uniform_rank: the factors of DoRA adapter {given.name!r} are written as they are")
        converted = to_convert(given, to, family=family, keep_private=keep_private)
        return converted.save(path, dtype=dtype, overwrite=overwrite, format=to)
    ready = to_convert(require_updates(given, "convert"), to, family=family, keep_private=keep_private)
    return ready.save(path, dtype=dtype, uniform_rank=uniform_rank, overwrite=overwrite, format=to)


def to_convert(adapter: Kind, to: str, *, family: str | None = None, keep_private: bool = False) -> Kind:
    """An adapter that is to be written in the format ``to``, and knows what its names do not tell."""
    form = adapter.base.form
    if form is None and to == PEFT:
        return adapter
    form = FileForm(to, family) if form is None else replace(form, family=family or form.family)
    return replace(adapter, base=replace(adapter.base, form=replace(form, keeps_private=keep_private)))
