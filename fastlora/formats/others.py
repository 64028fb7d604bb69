"""Files of other tools, recognised by how they name their tensors, and refused with the way to an adapter.

A format that is read gets a module of its own, which takes what it detects before this one where its name comes first.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError, safe_open

from fastlora.core.data import AdapterData
from fastlora.core.names import CONFIG_NAME
from fastlora.dialects.looks import looks_of
from fastlora.errors import FastloraError, UnsupportedAdapter
from fastlora.files.earlier import MARK
from fastlora.files.json_files import parse_object, require_file
from fastlora.files.tensor_files import SAFETENSORS
from fastlora.files.torch_files import read_torch

WRITES: tuple[type[AdapterData], ...] = ()

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".lora")
MOST_FILES = 8
"""Of a folder that are looked into."""

LARGEST_CONFIG = 1 << 20


@dataclass(frozen=True, slots=True)
class Kind:
    """What another tool leaves: ``what`` it is, a ``pattern`` that one of its tensors' names matches, and ``factors``,
    its ``B``, ``A`` and scaling where it is a low-rank update."""

    what: str
    pattern: str
    factors: str | None = None


KINDS = (
    Kind(
        "a LoRA of MLX without its configuration",
        r".*\.lora_[ab]",
        "(tensors[f'{key}.lora_b'].mT, tensors[f'{key}.lora_a'].mT, scale)",
    ),
    Kind("an adapter of AdapterHub", r".*\.(adapters|loras|prefix_tunings|adapter_fusion_layer)\..*"),
    Kind("a LLaMA-Adapter", r".*(adapter_query|adaption_prompt|adapter_wte|gating_factor).*"),
    Kind(
        "the tensors of a PEFT adapter",
        r".*\.lora_(A|B|embedding_A|embedding_B)(\.\w+)*(\.weight)|base_model\.model\..*\.lora_\w+.*|.*\.ia3_l",
    ),
    Kind(
        "a LoRA of loralib or LitGPT",
        r".*\.lora_[AB]",
        "(tensors[f'{key}.lora_B'], tensors[f'{key}.lora_A'], alpha / rank)",
    ),
    Kind(
        "a LoRA of a model that is not known here",
        r".*[._]lora[._](down|up)\.weight|.*\.lora_(down|up)\.weight",
        "(tensors[f'{key}.lora_up.weight'], tensors[f'{key}.lora_down.weight'], alpha / rank)",
    ),
    Kind(
        "a LyCORIS adapter of a model that is not known here", r".*\.(hada_[wt]\d.*|lokr_[wt]\d.*|oft_blocks|oft_diag)"
    ),
    Kind("embeddings of textual inversion", r"emb_params|string_to_param|<[^<>]+>"),
)

WITHOUT_CONFIG = next(kind for kind in KINDS if "PEFT" in kind.what)
GGUF = Kind("a LoRA of llama.cpp (GGUF)", "")
ADAPTER_HUB = next(kind for kind in KINDS if "AdapterHub" in kind.what)
MLX = Kind("a LoRA of MLX without its adapters.safetensors", "")
TRAINING_STATE = Kind("the state of a training run that is spread over processes (DeepSpeed or FSDP)", "")


def detects(path: Path) -> bool:
    """Whether a path is a file of another tool's adapter, or a folder that holds such files and no PEFT adapter."""
    try:
        return _found(path) is not None
    except (OSError, FastloraError):  # told when it is read by others
        return False


def read(path: Path, name: str) -> NoReturn:
    """Raises :class:`UnsupportedAdapter`: what the path holds, and the way to a PEFT adapter, or that there is none."""
    found = _found(path)
    assert found is not None, "detects() said so"
    kind, file = found
    where = f"{path}" if file == path else f"{path} ({file.name})"
    if kind is WITHOUT_CONFIG:
        raise UnsupportedAdapter(
            f"{where} has no {CONFIG_NAME}, and holds {kind.what}; copy it beside them, from where the adapter was "
            "trained or downloaded: it has what the tensors lack (lora_alpha, r, modules_to_save). Where there is "
            "none, `fl.Adapter.from_tensors({module: (lora_B, lora_A, alpha / rank), …})` makes an adapter"
        )
    raise UnsupportedAdapter(f"{where} holds {kind.what}, which is not read; {_way_out(kind)}")


def _way_out(kind: Kind) -> str:
    if kind is GGUF:
        return "pass the PEFT adapter that it was converted from; there is no way back from GGUF yet"
    if kind is MLX:
        return "copy that file beside the configuration, or convert adapters.npz of older versions with mlx"
    if kind is TRAINING_STATE:
        return "resume the run from it, and save the adapter with `save_pretrained` of the PEFT model"
    if kind.factors is None:
        return (
            "it is no update s·B·A, and there is no way to a PEFT adapter yet. Merge it into its model with the tool "
            "that it is from, and take the difference of the two models (`fastlora extract BASE TUNED`)"
        )
    return (
        "in Python, with `tensors = safetensors.torch.load_file(…)`, "
        f"`fl.Adapter.from_tensors({{module: {kind.factors}, …}})` is the adapter, with the paths of the modules in "
        "the model as names, and `.save(…)` makes a PEFT directory of it. The scaling is 1 where the file has no alpha"
    )


def _found(path: Path) -> tuple[Kind, Path] | None:
    """What a path holds and the file that shows it; ``None`` for what is no adapter of another tool."""
    if path.is_dir():
        return _in_folder(path)
    if path.is_file() and not (path.parent / CONFIG_NAME).exists():
        kind = _kind_of_file(path)
        return None if kind is None else (kind, path)
    return None


def _in_folder(folder: Path) -> tuple[Kind, Path] | None:
    if all(map(os.path.exists, (folder / CONFIG_NAME, folder / f"adapter_model{SAFETENSORS}"))):
        return None
    entries = sorted(folder.iterdir())
    names = {entry.name for entry in entries}
    if any(name.startswith("adapter_model") for name in names) and CONFIG_NAME in names:
        return None
    if CONFIG_NAME in names:
        kind = _kind_of_config(folder / CONFIG_NAME)
        return None if kind is None else (kind, folder / CONFIG_NAME)
    if {"config.json", "model_index.json"} & names or any(folder.glob(f"*/{CONFIG_NAME}")):
        return None
    states = [e for e in entries if re.fullmatch(r"global_step\d+|pytorch_model_fsdp_\d+|.*\.distcp", e.name)]
    if states:
        return TRAINING_STATE, states[0]
    files = [e for e in entries if e.suffix in (SAFETENSORS, ".gguf", ".npz", *TORCH_SUFFIXES) and e.is_file()]
    kinds = [(kind, file) for file in files[:MOST_FILES] if (kind := _kind_of_file(file)) is not None]
    return kinds[0] if len(kinds) == len(files[:MOST_FILES]) and kinds else None


def _kind_of_config(file: Path) -> Kind | None:
    """The tool that wrote an ``adapter_config.json`` that is none of PEFT's."""
    require_file(file, LARGEST_CONFIG)
    fields = parse_object(file.read_bytes(), str(file))
    if "peft_type" in fields:
        return None
    if fields.keys() & {"lora_parameters", "fine_tune_type", "lora_layers"}:
        return MLX
    is_hub = {"model_class", "model_type"} <= fields.keys() or isinstance(fields.get("config"), dict)
    return ADAPTER_HUB if is_hub else None


def _kind_of_file(file: Path) -> Kind | None:
    if file.suffix == ".gguf":
        return GGUF if _is_gguf_adapter(file) else None
    if looks_of(file) is not None:  # another format reads it
        return None
    names = list(_tensor_names(file))
    return next((kind for kind in KINDS if any(re.fullmatch(kind.pattern, name) for name in names)), None)


def _is_gguf_adapter(file: Path) -> bool:
    """Whether a GGUF file calls itself an adapter; whole models do not."""
    with file.open("rb") as opened:
        start = opened.read(1 << 20)
    return start.startswith(b"GGUF") and b"adapter" in start


def _tensor_names(file: Path) -> Iterable[str]:
    """The names of the tensors in a file, none where it is no readable file of tensors."""
    try:
        if file.suffix == SAFETENSORS:
            with safe_open(file, framework="pt") as opened:
                says = (opened.metadata() or {}).get(MARK, "")
                return () if '"kind"' in says else list(opened.keys())  # a file of a kind of ours
        if file.suffix == ".npz":
            with zipfile.ZipFile(file) as archive:
                return [name.removesuffix(".npy") for name in archive.namelist()]
        return read_torch(file) if file.suffix in TORCH_SUFFIXES else ()
    except (OSError, SafetensorError, FastloraError, zipfile.BadZipFile, ValueError):
        return ()
