"""PEFT directories built by property, without peft: ranks, scaling, dtype, layout, subspaces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastlora.core.data import Extra, LoraData
from fastlora.formats.peft.writing import AdapterFile

PREFIX = "base_model.model."

MODULES = {
    "model.layers.0.self_attn.q_proj": (24, 16),
    "model.layers.0.self_attn.v_proj": (8, 16),
    "model.layers.1.self_attn.q_proj": (24, 16),
    "model.layers.1.mlp.up_proj": (40, 16),
}
"""``[out, in]`` of the modules of a small made-up model; odd enough that no dimension is taken for
another."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def make_factors(
    modules: Mapping[str, tuple[int, int]] = MODULES,
    *,
    rank: int | Mapping[str, int] = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """``{module: (B [out, r], A [r, in])}`` with independent normal entries; ``rank`` for all, or by
    module."""
    factors = {}
    for i, (module, (n, m)) in enumerate(modules.items()):
        r = rank if isinstance(rank, int) else rank[module]
        left = scale * gaussian(n, r, seed=1000 * seed + 2 * i, dtype=torch.float64)
        right = gaussian(r, m, seed=1000 * seed + 2 * i + 1, dtype=torch.float64)
        factors[module] = left.to(dtype), right.to(dtype)
    return factors


def write(
    directory: Path,
    adapter: LoraData,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    extras: Mapping[str, Extra] | None = None,
) -> None:
    """Writes a PEFT directory through the sink of the format, all factors at once; ``factors`` with the scaling
    inside. ``extras``: what else to write; those of ``adapter`` by default."""
    whole = adapter if extras is None else replace(adapter, extras=extras)
    file = AdapterFile(directory, whole, factors, dtype)
    file.put(factors)
    file.finish()
    file.close()


def make_config(**fields: Any) -> dict[str, Any]:
    """The fields of ``adapter_config.json`` as peft writes them for a plain adapter, with changes."""
    config: dict[str, Any] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "made-up/model",
        "bias": "none",
        "eva_config": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "qalora_group_size": 16,
        "r": 4,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    return config | fields


def peft_tensors(factors: Mapping[str, tuple[Tensor, Tensor]], prefix: str = PREFIX) -> dict[str, Tensor]:
    """Tensors of linear modules under the names that peft gives them."""
    tensors = {}
    for module, (left, right) in factors.items():
        tensors[f"{prefix}{module}.lora_A.weight"] = right
        tensors[f"{prefix}{module}.lora_B.weight"] = left
    return tensors


def write_peft(
    directory: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    odd: bool = False,
) -> Path:
    """A PEFT directory with exactly these tensors; ``odd`` puts them at odd addresses of the file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(make_config() if config is None else config))
    file = directory / "adapter_model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
    if odd:
        make_odd(file)
    return directory


def make_odd(file: Path) -> None:
    """Lengthens the header by a space, which moves every tensor by one byte."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    file.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])


def make_adapter(
    directory: Path,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    *,
    rank: int | Mapping[str, int] = 4,
    alpha: float = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    odd: bool = False,
    **fields: Any,
) -> Path:
    """A plain adapter on disk. Ranks that differ between modules become a ``rank_pattern``."""
    factors = make_factors(modules, rank=rank, seed=seed, dtype=dtype)
    ranks = {module: right.shape[0] for module, (_, right) in factors.items()}
    common = max(ranks.values())
    pattern = {module: r for module, r in ranks.items() if r != common}
    config = make_config(**{"r": common, "lora_alpha": alpha, "rank_pattern": pattern, **fields})
    return write_peft(directory, peft_tensors(factors), config, odd=odd)


def shared_pool(
    root: Path,
    count: int = 3,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    *,
    rank: int = 4,
    shared: int = 2,
    alpha: float = 8,
    dtype: torch.dtype = torch.float32,
) -> list[Path]:
    """Adapters whose column spaces have exactly ``shared`` common directions in every module.

    Columns ``shared…rank`` of adapter ``i`` are orthogonal to all others, so the shared space is known.
    """
    paths = []
    for i in range(count):
        tensors = {}
        for k, (module, (n, m)) in enumerate(modules.items()):
            own = rank - shared
            basis = torch.linalg.qr(gaussian(n, shared + count * own, seed=k, dtype=torch.float64)).Q
            columns = torch.cat([basis[:, :shared], basis[:, shared + i * own : shared + (i + 1) * own]], 1)
            mix = gaussian(rank, rank, seed=100 * i + k + 1, dtype=torch.float64)
            right = gaussian(rank, m, seed=7000 + 100 * i + k, dtype=torch.float64)
            tensors |= peft_tensors({module: ((columns @ mix).to(dtype), right.to(dtype))})
        paths.append(write_peft(root / f"adapter{i}", tensors, make_config(r=rank, lora_alpha=alpha)))
    return paths


class Elsewhere(Tensor):
    """A tensor without memory that says it is on the CPU."""

    @staticmethod
    def __new__(cls, shape: torch.Size) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)  # type: ignore[attr-defined]
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: object, *_: object) -> None:
        raise AssertionError(f"{func} was called")
