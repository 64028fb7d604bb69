"""PEFT directories: ``adapter_config.json`` beside ``adapter_model.safetensors`` (or the older ``.bin``).

A tensor is called ``base_model.model.<module path>.<part>``; the parts are in :data:`PARTS`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastlora.core.data import BaseInfo, DoraData, Extra, LoraData
from fastlora.core.factors import Factor
from fastlora.core.names import CONFIG_NAME, EMBEDDINGS
from fastlora.core.updates import EMBEDDING, LINEAR, Layout, Update
from fastlora.errors import InputError, NonFiniteError, UnsupportedAdapter
from fastlora.files.tensor_files import DTYPE_NAMES
from fastlora.formats.peft import dora
from fastlora.formats.peft.alike import remember
from fastlora.formats.peft.config import Fields, PeftConfig, read_config
from fastlora.formats.peft.experts import with_settled_order
from fastlora.formats.peft.keys import Keys, read_keys, without_base
from fastlora.formats.peft.kinds import MERGE_FIRST, VARIANTS
from fastlora.formats.peft.missing import note_on_scalings
from fastlora.formats.peft.names import HEADS, REGISTRATION_ORDER, WRAPPED, saved_module
from fastlora.formats.peft.weights import read_tensors

PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
}
TRAINING_STATE = re.compile(r"\.lora_(velora_embed$|monteclora_sampler\.)")
MARKS = {
    ".lora_magnitude_vector": ("DoRA magnitudes, which rescale the rows of the base weight", MERGE_FIRST),
    ".lora_diag": ("a KaSA diagonal between the factors", MERGE_FIRST),
    ".lora_arrow": ("an Arrow router", VARIANTS["arrow_config"][1]),
    ".token_adapter.": ("trained token embeddings, which replace rows of the base model's embedding", MERGE_FIRST),
}
"""Tensors that only adapters have that are no ``s·B·A``, whatever their configuration says."""

DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})

MOST_ABOVE_SIDES = 2048
"""A rank above both sides of a module together is possible and useless. Up to here it is computed with like any other;
beyond, matrices of rank × rank would be out of proportion to the file."""

MOST_EXPERTS = 8192
"""Of one parameter; each becomes a module of its own."""


@dataclass(slots=True)
class _StoredModule:
    """The tensors of one module, by part, and their full names."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    embedding: bool = False

    def add(self, part: str, key: str, tensor: Tensor, file: Path) -> None:
        if part in self.tensors:
            raise InputError(f"{file}: tensors {self.keys[part]!r} and {key!r} are the same factor; remove one")
        self.tensors[part], self.keys[part] = tensor, key


def read(directory: Path, name: str, fields: Fields) -> LoraData | DoraData:
    """The LoRA adapter or DoRA in a PEFT directory; its factors are views of the mapped file.

    Raises :class:`InputError` for missing or damaged files and tensors, and :class:`UnsupportedAdapter` for
    adapters that are no plain low-rank update, each with the way out.
    """
    config = read_config(fields, name)
    file, tensors = read_tensors(directory)
    tensors, magnitudes = dora.taken(tensors, fields)
    keys = read_keys(tensors, file, name, fields.values)
    if keys.notes:
        config = config.of_wrapped(keys.as_trained)
    modules, others, notes = _sort(tensors, keys, file, name)
    if not modules:
        raise InputError(
            f"{file} has no lora_A and lora_B tensors, so adapter {name!r} is empty; "
            "it was saved before it was trained, or from a model that is no PEFT model"
        )
    updates: dict[str, Update] = {}
    extras: dict[str, Extra] = {}
    for container, wrappers in _group(modules, file).items():
        for path, module in _name_wrappers(container, wrappers, config, file):
            _check_factors(path, module, file)
            if path in modules:
                updates[path] = _update(path, module, config, file)
                if "bias" in module.tensors:
                    shift = module.tensors["bias"].double() * updates[path].scaling
                    if not bool(shift.isfinite().all()):
                        raise NonFiniteError(f"{file}: tensor {module.keys['bias']!r} holds NaN or Inf; save it again")
                    extras[f"{path}.bias"] = Extra("delta", shift.to(_at_least_float32(module.tensors["bias"])))
            else:
                updates.update(_experts(path, module, config, file))
    others, left_out = without_base(others, modules, keys, config.base, name)
    add_values(extras, others, modules, config.base, file)
    updates, told = with_settled_order(updates, name)
    adapter = LoraData(
        name,
        updates,
        extras=extras,
        base=config.base,
        dtype=functools.reduce(torch.promote_types, (d for u in updates.values() for d in u.dtypes())),
        notes=(*config.notes, *keys.notes, *notes, *left_out, *told, *note_on_scalings(name, config.alpha_pattern)),
    )
    if not config.dora:
        remember(fields.raw, adapter, tensors)
        return adapter
    names = {path: module.keys.get("A", "") for path, module in modules.items()}
    return dora.with_magnitudes(adapter, names, magnitudes, file)


def _sort(
    tensors: Mapping[str, Tensor], keys: Keys, file: Path, name: str
) -> tuple[dict[str, _StoredModule], dict[str, Tensor], list[str]]:
    """Tensors by module, tensors that are no factors, and what is worth telling."""
    modules: dict[str, _StoredModule] = {}
    others: dict[str, Tensor] = {}
    dropped = 0
    for plain, key in keys.names.items():
        tensor = tensors[key]
        path, part = _split(plain)
        if part in PARTS and path:
            module = modules.get(path)
            if module is None:
                module = modules[path] = _StoredModule()
            module.add(PARTS[part], key, tensor, file)
            if part.startswith("lora_embedding"):
                module.embedding = True
        elif TRAINING_STATE.search(plain):
            dropped += 1
        else:
            mark = next((what for sign, what in MARKS.items() if sign in plain), None)
            if mark is not None:
                raise UnsupportedAdapter(
                    f"adapter {name!r}: tensor {key!r} in {file} is {mark[0]}, so its change is not s·B·A; {mark[1]}"
                )
            others[plain] = tensor
    return (
        modules,
        others,
        [f"adapter {name!r}: {dropped} tensors of training state are not kept"] if dropped else [],
    )


@functools.lru_cache(maxsize=2**14)
def _split(plain: str) -> tuple[str, str]:
    """``(module, part)`` of a tensor; adapters of one model have the same names."""
    path, _, part = plain.rpartition(".")
    if part in ("weight", "bias"):
        path, _, owner = path.rpartition(".")
        part = f"{owner}.{part}"
    return path, part


def _group(modules: Mapping[str, _StoredModule], file: Path) -> dict[str, list[_StoredModule]]:
    """Modules by path, each as a list from the outermost wrapper inwards."""
    groups: dict[str, dict[int, _StoredModule]] = {}
    for path, module in modules.items():
        depth, container = 0, path
        while container.endswith(WRAPPED):
            depth, container = depth + 1, container.removesuffix(WRAPPED)
        if WRAPPED + "." in container:
            key = next(iter(module.keys.values()))
            raise UnsupportedAdapter(
                f"{file}: tensor {key!r} adapts a part inside a wrapped module, as peft does for "
                f"nn.MultiheadAttention, whose fused projections are not supported; {MERGE_FIRST}"
            )
        groups.setdefault(container, {})[depth] = module
    return {container: [by_depth[d] for d in sorted(by_depth)] for container, by_depth in groups.items()}


def _name_wrappers(
    container: str, wrappers: list[_StoredModule], config: PeftConfig, file: Path
) -> list[tuple[str, _StoredModule]]:
    """``(path, tensors)``: the module itself, or its parameters where ``target_parameters`` names some."""
    named: list[str] = []
    anywhere: list[str] = []
    for target in config.target_parameters:
        parent, _, parameter = target.rpartition(".")
        if not parent:
            anywhere.append(parameter)
        elif container == parent or container.endswith("." + parent):
            named.append(parameter)
    plain = len(wrappers) == 1 and _has_rank(wrappers[0], config.rank_of(container))
    if not named and not plain:
        named = anywhere
    if not named:
        if len(wrappers) == 1:
            return [(container, wrappers[0])]
        raise InputError(
            f"{file}: module {container!r} is wrapped {len(wrappers)} times, which is how parameters are "
            f"adapted, but 'target_parameters' in {config.path} names none of it; restore that field"
        )
    names = list(dict.fromkeys(named))
    known = all(n in REGISTRATION_ORDER for n in names)
    if len(names) != len(wrappers) or (len(names) > 1 and not known):
        raise UnsupportedAdapter(
            f"{file}: module {container!r} has factors for {len(wrappers)} parameters and "
            f"'target_parameters' in {config.path} allows {', '.join(names)}: the file does not say which "
            f"factors belong to which; {MERGE_FIRST}"
        )
    outermost_first = sorted(names, key=lambda n: -REGISTRATION_ORDER.index(n)) if len(names) > 1 else names
    return [(f"{container}.{n}", w) for n, w in zip(outermost_first, wrappers, strict=True)]


def _has_rank(module: _StoredModule, rank: int) -> bool:
    return "A" in module.tensors and module.tensors["A"].shape[:1] == (rank,)


def _check_factors(path: str, module: _StoredModule, file: Path) -> None:
    tensors = module.tensors
    if len(tensors) == 2 and "A" in tensors and "B" in tensors:
        a, b = tensors["A"], tensors["B"]
        if a.dim() == b.dim() == 2 and a.dtype in DTYPES and b.dtype in DTYPES:
            (r, m), (n, columns) = a.shape, b.shape
            if 0 < r == columns and r <= max(n + m, MOST_ABOVE_SIDES) and n and m:
                return
    for part, partner in (("A", "B"), ("B", "A"), ("bias", "B")):
        if part in module.tensors and partner not in module.tensors:
            raise InputError(
                f"{file}: tensor {module.keys[part]!r} has no lora_{partner} beside it; the file is "
                "incomplete: save or download the adapter again"
            )
    for part, tensor in module.tensors.items():
        check_tensor(module.keys[part], tensor, file)
    a, b = module.tensors["A"], module.tensors["B"]
    if a.dim() != b.dim() or a.dim() not in ((2,) if module.embedding else (2, 3, 4, 5)):
        raise InputError(
            f"{file}: module {path!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; needed are "
            "[rank, in] and [out, rank], with the kernel after them for a convolution"
        )
    if a.dim() > 2 and b.shape[1] != a.shape[0] and a.shape[0] % b.shape[1] == 0 and set(b.shape[2:]) == {1}:
        raise UnsupportedAdapter(
            f"{file}: module {path!r} is a grouped convolution (lora_A {list(a.shape)}, lora_B "
            f"{list(b.shape)}): its update is block-diagonal and not B·A; leave it out of `target_modules` "
            "and train again"
        )
    if b.shape[1] != a.shape[0] or any(k != 1 for k in b.shape[2:]):
        raise InputError(
            f"{file}: module {path!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}: their ranks "
            f"{a.shape[0]} and {b.shape[1]} must agree; save or download the adapter again"
        )
    if a.shape[0] > max(b[:, 0].numel() + a[0].numel(), MOST_ABOVE_SIDES):
        raise InputError(
            f"{file}: module {path!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}: its rank is far above "
            f"both sides of the module together, and above {MOST_ABOVE_SIDES}; store its update as one dense matrix, "
            "lora_B · lora_A, beside an identity"
        )
    shift = module.tensors.get("bias")
    if shift is not None and shift.shape != b.shape[:1]:
        raise InputError(
            f"{file}: tensor {module.keys['bias']!r} is {list(shift.shape)}, needed is [{b.shape[0]}] as lora_B has it"
        )


def check_tensor(key: str, tensor: Tensor, file: Path) -> None:
    """Refuses what cannot be computed with: other dtypes than those of weights, and tensors without elements."""
    if tensor.dtype not in DTYPES:
        raise InputError(
            f"{file}: tensor {key!r} is {str(tensor.dtype)[6:]}, needed is float32, float16, bfloat16 "
            "or float64; save the adapter in one of these"
        )
    if 0 in tensor.shape:
        raise InputError(
            f"{file}: tensor {key!r} is empty ({list(tensor.shape)}): a sharded model was saved "
            "without gathering its parameters; gather them (DeepSpeed ZeRO-3, FSDP) and save again"
        )


def _update(path: str, module: _StoredModule, config: PeftConfig, file: Path) -> Update:
    a, b = module.tensors["A"], module.tensors["B"]
    rank, expected = a.shape[0], config.rank_of(path)
    if rank != expected:
        raise InputError(
            f"module {path!r} has rank {rank} in {file} and rank {expected} in {config.path} ('r' or "
            "'rank_pattern'); its scaling is unknown: restore the configuration it was saved with"
        )
    layout = EMBEDDING if module.embedding else LINEAR
    if a.dim() > 2:
        layout = Layout("conv", kernel=tuple(a.shape[2:]))
        a, b = a.reshape(rank, -1), b.reshape(-1, rank)
    return Update(Factor.of("B", b), Factor.of("A", a), config.scaling_of(path, rank), layout)


def _experts(path: str, module: _StoredModule, config: PeftConfig, file: Path) -> dict[str, Update]:
    """``{path[e]: update}``, from ``A [experts·r, in]``, expert by expert, and ``B [out, r·experts]``, whose
    fastest index is the expert."""
    a, b = module.tensors["A"], module.tensors["B"]
    rank = config.rank_of(path)
    if rank < 1 or a.dim() != 2 or a.shape[0] % rank or "bias" in module.tensors:
        raise InputError(
            f"parameter {path!r} has lora_A {list(a.shape)} in {file}, needed is [experts·{rank}, in] for "
            f"rank {rank} of {config.path} ('r' or 'rank_pattern') and no bias; restore the configuration "
            "it was saved with"
        )
    experts = a.shape[0] // rank
    if experts > MOST_EXPERTS:
        raise InputError(
            f"parameter {path!r} has lora_A {list(a.shape)} in {file}, which at rank {rank} of {config.path} is "
            f"{experts} experts, more than {MOST_EXPERTS}; restore the configuration it was saved with"
        )
    scaling = config.scaling_of(path, rank)
    # The columns of one expert are strided on disk; kernels need rows that lie together.
    left = b.reshape(-1, rank, experts).permute(2, 0, 1).contiguous()
    right = a.reshape(experts, rank, -1)
    order = config.expert_order if experts > 1 else "out-in"
    return {
        f"{path}[{e}]": Update(
            Factor.of("B", left[e]),
            Factor.of("A", right[e]),
            scaling,
            Layout("expert", container=path, expert=e, experts=experts, order=order),
        )
        for e in range(experts)
    }


def add_values(
    extras: dict[str, Extra],
    others: Mapping[str, Tensor],
    modules: Container[str],
    base: BaseInfo,
    file: Path,
) -> None:
    """Adds the trained parameters of the base model to ``extras``, or refuses by name what they could be."""
    unknown: list[str] = []
    for key, tensor in others.items():
        wrapped, _, parameter = key.rpartition(WRAPPED + ".")
        path = f"{wrapped}.{parameter}" if wrapped in modules else key
        if not _is_trained(path, wrapped in modules, base):
            unknown.append(key)
        elif tensor.dtype not in DTYPE_NAMES:
            raise InputError(
                f"{file}: tensor {key!r} is {str(tensor.dtype)[6:]}, which cannot be written again; save it as float32"
            )
        elif path in extras and tensor.shape != extras[path].tensor.shape:
            raise InputError(
                f"{file}: tensor {key!r} is {list(tensor.shape)}, needed is {list(extras[path].tensor.shape)} as "
                "lora_B.bias has it"
            )
        elif path in extras:
            # lora_bias shifts a bias that is itself replaced: both are known, so their sum is the new value.
            extras[path] = Extra("value", tensor + extras[path].tensor.to(tensor.dtype))
        else:
            extras[path] = Extra("value", tensor)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UnsupportedAdapter(
            f"{file} has tensors of an unknown kind: {', '.join(map(repr, unknown[:3]))}{more}; they would "
            "be lost. Trained modules must be named by 'modules_to_save' and trained biases by 'bias' in "
            f"{CONFIG_NAME}; remove the tensors if they carry nothing"
        )


def _is_trained(path: str, wrapped: bool, base: BaseInfo) -> bool:
    module, _, parameter = path.rpartition(".")
    if ".modules_to_save." in path or ".original_module." in path or WRAPPED + "." in path:
        return False
    if parameter == "bias" and base.bias != "none":
        return True
    if parameter == "weight" and (wrapped or module.rpartition(".")[2] in EMBEDDINGS):
        return True
    return saved_module(path, (*base.modules_to_save, *HEADS.get(base.task_type or "", ()))) is not None


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
