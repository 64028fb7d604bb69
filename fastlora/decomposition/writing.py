"""Writing the parts of a decomposition, and ``report.json`` beside them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TextIO

import torch

from fastlora.adapters.lora import Adapter
from fastlora.formats import suffix_of, write_adapters


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
            targets = {staging / f"{place}{suffix_of(a, format)}": a for place, a in adapters.items()}
            for target, adapter in targets.items():
                (target.parent if suffix_of(adapter, format) else target).mkdir(parents=True, exist_ok=True)
            # Reports need no kernels, so they are made while results are written.
            meanwhile = functools.partial(write_reports, file) if i == 0 else lambda: None
            notes += write_adapters(targets, dtype, meanwhile, uniform_rank, format)
            empty += [p for p, a in adapters.items() if not any(u.rank for u in a.updates.values())]
        file.write(f', "empty_adapters": {json.dumps(empty)}}}\n')
    return notes
