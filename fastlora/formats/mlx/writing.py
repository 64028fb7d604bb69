"""Folders of MLX, written: ``lora_a [in, r]``, ``lora_b [r, out]`` and one scale for all modules.

MLX makes layers of one rank and fills them from the file, so that all modules have the largest rank; zeros fill the
smaller ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastlora._version import __version__
from fastlora.core.card import adapter_card
from fastlora.core.data import LoraData
from fastlora.core.factors import Factor, Side
from fastlora.core.names import CONFIG_NAME
from fastlora.core.updates import chosen_rank, with_rank
from fastlora.errors import InputError
from fastlora.files.card import write_card
from fastlora.files.disk_errors import writing
from fastlora.files.earlier import MARK
from fastlora.files.tensor_writing import InOneFile, TensorFile

WEIGHTS = "adapters.safetensors"
LAYER = re.compile(r".*?\blayers\.\d+\.")
"""What stands before the names of modules in their layer, as configurations list them."""
LISTED = 4


@dataclass(frozen=True, eq=False)
class MlxAdapter(LoraData):
    """An adapter as a folder will have it: ``scale`` is that of all modules, what is left of theirs is inside ``B``."""

    _: KW_ONLY
    scale: float


def as_written(adapter: LoraData, uniform_rank: int | bool | None) -> LoraData:
    """The adapter at its largest rank, or ``uniform_rank``.

    Raises :class:`InputError` for what MLX has no place for.
    """
    if isinstance(adapter, MlxAdapter):
        return adapter
    odd = [m for m, u in adapter.updates.items() if u.layout.kind not in ("linear", "embedding")]
    if odd or adapter.extras:
        more = f" and {len(odd) - LISTED} more" if len(odd) > LISTED else ""
        what = f"convolutions or experts ({', '.join(odd[:LISTED])}{more})" if odd else "what lies beside the factors"
        way_out = "" if odd else ", or leave it out with `adapter.without_extras()` (--drop-extras)"
        raise InputError(
            f"adapter {adapter.name!r}: folders of MLX have no place for {what}; write a PEFT directory "
            f"(format='peft', --format peft){way_out}"
        )
    rank = chosen_rank(adapter.updates.values(), uniform_rank) or max(
        (u.rank for u in adapter.updates.values()), default=0
    )
    scales = {u.scaling for u in adapter.updates.values() if u.rank}
    scale = scales.pop() if len(scales) == 1 else 1.0
    updates = {}
    for module, update in adapter.updates.items():
        shared = replace(update, scaling=1.0) if update.rank and update.scaling == scale else update
        updates[module] = with_rank(shared, max(rank, 1))
    return MlxAdapter(
        adapter.name,
        updates,
        base=adapter.base,
        dtype=adapter.dtype,
        provenance=adapter.provenance,
        notes=adapter.notes,
        details=adapter.details,
        scale=scale,
    )


class MlxFolder(InOneFile):
    """A folder that is written module by module: factors come whole and are turned, since MLX has them transposed."""

    def __init__(self, directory: Path, adapter: LoraData, dtype: torch.dtype) -> None:
        assert isinstance(adapter, MlxAdapter)
        self.directory, self.adapter, self.dtype = directory, adapter, dtype
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        outlines = {}
        for module, update in adapter.updates.items():
            (rows, columns), rank = update.shape, update.rank
            outlines[f"{module}.lora_a"] = torch.empty(columns, rank, dtype=dtype, device="meta")
            outlines[f"{module}.lora_b"] = torch.empty(rank, rows, dtype=dtype, device="meta")
        provenance = json.dumps({"version": __version__, "provenance": adapter.provenance}, default=str)
        self._file = TensorFile(directory / WEIGHTS, outlines, {"format": "mlx", MARK: provenance})

    def is_packed(self, module: str) -> bool:
        """Every module is: its factors are turned before they are written."""
        return True

    def place(self, module: str, side: Side) -> tuple[str, int]:
        """Of no module, as none is written at its place."""
        raise AssertionError(module)

    def lay(self, module: str, side: Side, factor: Factor) -> Factor:
        """As it is."""
        return factor

    def put(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Writes some modules; the numbers are checked."""
        tensors = {}
        for module, (B, A) in factors.items():
            tensors[f"{module}.lora_a"] = A.to("cpu", self.dtype).mT.contiguous()
            tensors[f"{module}.lora_b"] = B.to("cpu", self.dtype).mT.contiguous()
        self._file.write(tensors, check=True)

    def finish(self) -> None:
        """Nothing: all of a folder belongs to modules."""

    def close(self) -> None:
        """Checks that everything was written, and writes the configuration, by which readers know the folder."""
        self._file.close()
        updates, form = self.adapter.updates, self.adapter.base.form
        kept = {} if form is None else {k: json.loads(v) for k, v in form.metadata.items() if k == "num_layers"}
        fields = {
            "fine_tune_type": "lora",
            "num_layers": -1,
            **kept,
            "lora_parameters": {
                "rank": max((u.rank for u in updates.values()), default=0),
                "scale": self.adapter.scale,
                "dropout": 0.0,
                "keys": sorted({LAYER.sub("", module, count=1) for module in updates}),
            },
        }
        if self.adapter.base.model is not None:
            fields["model"] = self.adapter.base.model
        ranks = [u.rank for u in updates.values()]
        write_card(
            self.directory, adapter_card(self.adapter, kind="LoRA", library="mlx", ranks=ranks, dtype=self.dtype)
        )
        with writing(self.directory):
            (self.directory / CONFIG_NAME).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
