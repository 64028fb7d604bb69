"""A LoRA of a pipeline as the one file that diffusers loads."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastlora._version import __version__
from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import require_updates
from fastlora.errors import InputError
from fastlora.files.disk_errors import writing
from fastlora.files.earlier import MARK, Overwrite
from fastlora.files.output import replacing
from fastlora.integrations.diffusers.components import adapted, names_in
from fastlora.integrations.peft.reading import read

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
"""Where diffusers looks for the fields of PEFT's configuration."""


def save_merged(
    pipe: Any,
    name: str,
    directory: str | Path,
    weight_name: str = FILE,
    *,
    dtype: torch.dtype | str | None = None,
    overwrite: Overwrite = False,
) -> Path:
    """Writes one LoRA of a pipeline, of all its components, as the file that ``pipe.load_lora_weights(directory)``
    loads.

    Scales are inside ``B``. Ranks stand in the header, in fields that every PEFT knows, and there is no ``.alpha``,
    which excludes them. So every version reads the same ``ΔW``.

    Args:
        pipe: a pipeline of diffusers.
        name: of the adapter, made by :func:`merge_loaded` or loaded.
        directory: where the file is put; it is made where it is not there.
        weight_name: of the file.
        dtype: of the factors, ``"float32"``, ``"bfloat16"`` or ``"float16"``; by default those of the adapter.
        overwrite: replace an earlier file of fastlora; ``"force"`` replaces any.

    Returns:
        The path of the file.

    Raises:
        InputError: an adapter that the pipeline does not have, or in a component that its files cannot hold.
        UnsupportedAdapter: an adapter that is not ``s·B·A``, such as DoRA.
        OutputError: a file that exists or cannot be written.

    Cost: one read of the factors and one write.
    """
    parts = {component: model for component, model in adapted(pipe).items() if name in names_in(model)}
    if not parts:
        loaded = sorted({n for model in adapted(pipe).values() for n in names_in(model)})
        raise InputError(f"the pipeline has no adapter {name!r}; it has {', '.join(loaded)}")
    taken = inspect.signature(pipe.save_lora_weights).parameters
    unheld = next((component for component in parts if f"{component}_lora_layers" not in taken), None)
    if unheld is not None:
        raise InputError(
            f"files of {type(pipe).__name__} do not hold {unheld!r}; save that component with "
            f"`fastlora.integrations.peft.read(pipe.{unheld}, {name!r}).save(…)`"
        )
    tensors: dict[str, Tensor] = {}
    fields: dict[str, object] = {}
    for component, model in parts.items():
        adapter = require_updates(read(model, name, "config"), "save_merged")
        _add(component, adapter, dtype, tensors, fields)
    path = Path(directory).expanduser() / weight_name
    metadata = {"format": "pt", METADATA: json.dumps(fields), MARK: json.dumps({"version": __version__, "of": name})}
    with replacing(path, overwrite=overwrite) as staging, writing(path):
        save_file(tensors, staging, metadata)
    return path


def _add(
    component: str,
    adapter: Adapter,
    dtype: torch.dtype | str | None,
    tensors: dict[str, Tensor],
    fields: dict[str, object],
) -> None:
    """The tensors and the fields of one component."""
    if adapter.extras:
        raise InputError(
            f"{adapter.name!r} changes {next(iter(adapter.extras))!r} of {component} beside its factors, which such a "
            "file cannot hold"
        )
    factors = {m: pair for m, pair in adapter.tensors(dtype).items() if pair[0].shape[1]}
    for module, (B, A) in factors.items():
        tensors[f"{component}.{module}.lora_A.weight"] = A.cpu().contiguous()
        tensors[f"{component}.{module}.lora_B.weight"] = B.cpu().contiguous()
    fields |= {f"{component}.{key}": value for key, value in _fields(component, factors).items()}


def _fields(component: str, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, object]:
    """A scale of 1 in every module, whatever its rank. Text encoders have their modules below ``text_model`` or not, by
    the version of transformers: there a pattern matches the end of a path."""
    is_text = component.startswith("text_encoder")
    ranks = {m.removeprefix("text_model.") if is_text else m: pair[0].shape[1] for m, pair in factors.items()}
    most = max(ranks.values())
    smaller = {(re.escape(m) if is_text else f"^{re.escape(m)}"): rank for m, rank in ranks.items() if rank != most}
    return {
        "r": most,
        "lora_alpha": most,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": list(ranks),
    }
