"""Writing the parts of a decomposition, and ``report.json`` beside them."""

from __future__ import annotations

import functools
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TextIO

import torch

from fastlora.adapters.lora import Adapter
from fastlora.files.earlier import Overwrite
from fastlora.files.output import OutputDirectory
from fastlora.files.small_files import make_folder
from fastlora.formats import suffix_of, write_adapters


class SavedParts(ABC):
    """What a decomposition returns: parts that are saved together."""

    @abstractmethod
    def write(
        self,
        staging: Path,
        dtype: torch.dtype | str | None = None,
        uniform_rank: bool = False,
        format: str | None = None,
    ) -> list[str]:
        """Writes into the directory ``staging``, which exists; for ``dtype``, ``uniform_rank``, ``format`` and what it
        raises see :meth:`save`. Returns what is worth telling, in sentences."""

    def save(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        uniform_rank: bool = False,
        overwrite: Overwrite = False,
        format: str | None = None,
    ) -> Path:
        """Writes every part and ``report.json`` below ``path``: complete or not at all. A part is a PEFT directory, or
        where its adapters are from single files, ``NAME.safetensors`` of the same format and names.

        Args:
            path: the directory to make; ``.adapters()`` has the names of the folders in it.
            dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype; by default each part's own.
            uniform_rank: all modules of a part have its largest rank (:meth:`Adapter.save`).
            overwrite: replace an earlier output of fastlora, known by what its files say; ``"force"`` replaces
                whatever is there.
            format: ``"peft"``, ``"kohya"``, ``"diffusers"`` or ``"comfy"`` (:meth:`Adapter.save`).

        Returns:
            ``path``.

        Raises:
            InputError: an unknown dtype or format.
            OutputError: a path that exists or cannot be written, a full disk, a number that overflows ``dtype``.

        Cost: one read of all factors, and of rows of inputs that parts are made of, and one write of all parts. Memory
        does not grow with the model, and stays below the ``memory`` of :func:`fastlora.decompose`.
        """
        with OutputDirectory(Path(path), overwrite=overwrite) as staging:
            notes = self.write(staging, dtype, uniform_rank, format)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return Path(path)


def write_parts(
    staging: Path,
    parts: Iterable[Mapping[str, Adapter]],
    write_reports: Callable[[TextIO], None],
    dtype: torch.dtype | str | None,
    uniform_rank: bool,
    format: str | None,
) -> list[str]:
    """Writes parts by their places below ``staging``, as many at a time as ``parts`` gives together; returns what is
    worth telling. ``write_reports`` begins ``report.json``, whose object is ended here."""
    empty: list[str] = []
    notes: list[str] = []
    with (staging / "report.json").open("w") as file:
        for i, adapters in enumerate(parts):
            targets = {}
            for place, adapter in adapters.items():
                suffix = suffix_of(adapter, format)
                target = staging / f"{place}{suffix}"
                make_folder(target.parent if suffix else target)
                targets[target] = adapter
            # Reports need no kernels, so they are made while results are written.
            meanwhile = functools.partial(write_reports, file) if i == 0 else lambda: None
            notes += write_adapters(targets, dtype, meanwhile, uniform_rank, format)
            empty += [p for p, a in adapters.items() if not any(u.rank for u in a.updates.values())]
        file.write(f', "empty_adapters": {json.dumps(empty)}}}\n')
    return notes
