"""Adapters of fastlora into a live model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import IA3Config, LoraConfig
from peft.functional import set_adapter
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fastlora.adapters.ia3 import IA3
from fastlora.adapters.lora import Adapter
from fastlora.core.data import BaseInfo, ModulesData
from fastlora.core.dtypes import parse_dtype
from fastlora.core.patterns import path_tails
from fastlora.core.updates import sources, with_rank, zero_factors
from fastlora.core.vector_space import VectorSpace
from fastlora.errors import InputError, UnsupportedAdapter
from fastlora.formats.peft.names import HEADS, exact_pattern
from fastlora.formats.peft.selection import exclude_pattern
from fastlora.integrations.peft.injection import inject, place_of, unchanged_otherwise
from fastlora.integrations.peft.live import Host, host_of, require_new


@dataclass(frozen=True)
class ReadyFactors:
    """A LoRA adapter as the layers of a model take it: ``{path: (B, A)}`` with the scaling inside, in memory of its
    own; ``shifts``: ``{path: bias of lora_B}``."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    embeddings: frozenset[str]
    base: BaseInfo
    shifts: Mapping[str, Tensor]


@dataclass(frozen=True)
class ReadyVectors:
    """An (IA)³ adapter as the layers of a model take it: ``{path: vector}``, and which scale inputs."""

    vectors: Mapping[str, Tensor]
    feedforward: frozenset[str]
    base: BaseInfo


Ready = ReadyFactors | ReadyVectors


def write(
    model: nn.Module,
    adapter: VectorSpace,
    name: str | None = None,
    dtype: torch.dtype | str | None = None,
    uniform_rank: int | bool = False,
    activate: bool = False,
) -> None:
    """Puts an adapter into a live model under a new name, frozen. What was active stays active.

    The scaling is inside ``B``, so that ``lora_alpha = r`` and saved files mean the same to every reader. Modules of
    rank 0 get no layer; where all are, one module gets zeros.

    Args:
        model: a ``PeftModel``, its tuner, or a module, with adapters or without.
        adapter: a LoRA or (IA)³ adapter for this model.
        name: of the new adapter; by default its own.
        dtype: of the factors, ``"float32"``, ``"bfloat16"`` or ``"float16"``; by default that of the adapter.
        uniform_rank: ``True`` fills all modules with zeros up to the largest rank, a number up to that, so that the
            configuration has no patterns: what hot-swapping and servers of one rank need.
        activate: make it the one active adapter, still frozen.

    Raises:
        InputError: a name that the model has, modules that it does not have or of other shapes, a model whose
            adapters are merged into it, NaN or Inf. The model is as it was.
        UnsupportedAdapter: an adapter that replaces modules, adapts experts, or is neither LoRA nor (IA)³.

    Cost: one read of the factors and one write; peft's layers are made without initialising them.
    """
    host = host_of(model)
    made = ready(adapter, dtype, uniform_rank)
    put(host, {adapter.name if name is None else name: made}, activate=activate)


def ready(adapter: VectorSpace, dtype: torch.dtype | str | None, uniform_rank: int | bool = False) -> Ready:
    """The tensors of an adapter, computed. Raises for what layers of a live model cannot take."""
    if not isinstance(adapter, Adapter | IA3):
        raise UnsupportedAdapter(
            f"{adapter.name!r} is {adapter.kind}; a live model takes LoRA and (IA)³ adapters"
            if isinstance(adapter, VectorSpace)
            else f"an adapter is needed, not {type(adapter).__name__}"
        )
    _refuse_values(adapter)
    if isinstance(adapter, IA3):
        target = parse_dtype(dtype, adapter.dtype)
        vectors = {path: s.vector.to(target, copy=True) for path, s in adapter.vectors.items()}
        require_finite_tensors(adapter.name, vectors)
        feedforward = frozenset(path for path, s in adapter.vectors.items() if s.feedforward)
        return ReadyVectors(vectors, feedforward, adapter.base)
    refuse_experts([adapter])
    pairs = _pairs(adapter, parse_dtype(dtype, adapter.dtype), uniform_rank)
    shifts = {p.removesuffix(".bias"): e.tensor for p, e in adapter.extras.items() if e.kind == "delta"}
    unheld = shifts.keys() - pairs.keys()
    if unheld:
        raise UnsupportedAdapter(f"adapter {adapter.name!r} changes the bias of {min(unheld)!r}, and no factors of it")
    embeddings = frozenset(p for p in pairs if adapter.updates[p].layout.kind == "embedding")
    return ReadyFactors(pairs, embeddings, adapter.base, shifts)


def refuse_experts(adapters: Sequence[Adapter]) -> None:
    """Refuses adapters of experts, with the way that goes by files."""
    for adapter in adapters:
        experts = [path for path, u in adapter.updates.items() if u.layout.kind == "expert"]
        if experts:
            raise UnsupportedAdapter(
                f"adapter {adapter.name!r} adapts parameters ({experts[0]!r}, target_parameters), which are not added "
                "to a live model in place; save the result and load it: `fastlora.merge(pool(model), …).save(path)`, "
                "`model.load_adapter(path, name)`"
            )


def _refuse_values(adapter: ModulesData) -> None:
    replaced = [path for path, extra in adapter.extras.items() if extra.kind == "value"]
    if replaced:
        raise UnsupportedAdapter(
            f"adapter {adapter.name!r} replaces {replaced[0]!r} of the model (modules_to_save), which cannot be "
            "written into a live model; take `.without_extras()`, or save it and load it with `model.load_adapter`"
        )


def _pairs(adapter: Adapter, dtype: torch.dtype, uniform_rank: int | bool) -> dict[str, tuple[Tensor, Tensor]]:
    """``{path: (B, A)}`` in memory of their own: factors that nothing changed are the model's or a file's."""
    shifted = {p.removesuffix(".bias") for p, e in adapter.extras.items() if e.kind == "delta"}
    kept = {p: with_rank(u, 1) if p in shifted and not u.rank else u for p, u in adapter.updates.items()}
    kept = {p: u for p, u in kept.items() if u.rank}
    if not kept:
        pairs = {p: (b.to(adapter.device), a.to(adapter.device)) for p, (b, a) in zeros(adapter, dtype).items()}
    else:
        pairs = Adapter(adapter.name, kept, dtype=adapter.dtype).tensors(dtype, uniform_rank or None)
    require_finite_tensors(
        adapter.name, {f"{p}.lora_{s}": t for p, pair in pairs.items() for s, t in zip("BA", pair, strict=True)}
    )
    stored = {source.untyped_storage().data_ptr() for source in sources(adapter.updates.values())}
    return {p: (_own(b, stored), _own(a, stored)) for p, (b, a) in pairs.items()}


def zeros(adapter: Adapter, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Zeros of rank 1 for the first module, in peft's shapes, so that an empty result has a place."""
    module, pair = next(iter(zero_factors(adapter.name, adapter.updates, dtype).items()))
    shapes = Adapter(adapter.name, {module: with_rank(adapter.updates[module], 1)}).tensors(dtype)
    return {module: (pair[0].reshape(shapes[module][0].shape), pair[1].reshape(shapes[module][1].shape))}


def _own(tensor: Tensor, stored: set[int]) -> Tensor:
    shared = tensor.untyped_storage().data_ptr() in stored
    return tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()


def require_finite_tensors(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises :class:`InputError` for NaN and Inf. One wait for a device."""
    ends = [end.double() for tensor in tensors.values() for end in torch.aminmax(tensor)]  # NaN where one is
    finite = torch.stack(ends).isfinite().tolist()
    if all(finite):
        return
    bad = list(tensors)[finite.index(False) // 2]
    raise InputError(
        f"{bad} of {name!r} would hold NaN or Inf: an adapter holds them, or the result overflows; look for them with "
        "`fastlora.overlap`, or take dtype='float32'"
    )


def put(host: Host, adapters: Mapping[str, Ready], *, activate: bool = False) -> None:
    """Adds computed adapters to a model, all or none."""
    require_new(host, list(adapters))
    merged = [path for path, layer in host.tuner_layers() if layer.merged]
    if merged:
        raise InputError(
            f"adapters are merged into the model ({merged[0]!r}), so that its layers would not apply another; unmerge "
            "them first (`model.unmerge_adapter()`, of diffusers `pipe.unfuse_lora()`)"
        )
    paths = dict.fromkeys(host.module_paths())
    for name, adapter in adapters.items():
        _require_modules(host, name, list(_tensors(adapter)), paths)
    with unchanged_otherwise(host):
        for name, adapter in adapters.items():
            if isinstance(adapter, ReadyVectors):
                _put_vectors(host, name, adapter, paths)
            else:
                _put_factors(host, name, adapter, paths)
    if activate:
        (name,) = adapters
        set_adapter(host.root, name, inference_mode=True)
        if host.tuner is not None:
            host.tuner.active_adapter = name
        if host.model is not host.root and host.model is not host.tuner:  # a PeftModel
            host.model.active_adapter = name  # type: ignore[assignment]


def _tensors(adapter: Ready) -> Mapping[str, Any]:
    return adapter.vectors if isinstance(adapter, ReadyVectors) else adapter.pairs


def _require_modules(host: Host, name: str, modules: list[str], paths: Mapping[str, None]) -> None:
    absent = [m for m in modules if m not in paths]
    if not absent:
        return
    tail = absent[0].rpartition(".")[2]
    close = [p for p in paths if p.rpartition(".")[2] == tail][:2]
    hint = f"; there are {' and '.join(map(repr, close))}" if close else ""
    raise InputError(
        f"adapter {name!r} adapts {absent[0]!r}, and {len(absent) - 1} others, which the model does not have{hint}: it "
        "belongs to another base model, or its modules have other names (`Pool(…, rename=…)`)"
        if len(absent) > 1
        else f"adapter {name!r} adapts {absent[0]!r}, which the model does not have{hint}: it belongs to another base "
        "model, or its modules have other names (`Pool(…, rename=…)`)"
    )


def _put_factors(host: Host, name: str, adapter: ReadyFactors, paths: Mapping[str, None]) -> None:
    ranks = {path: a.shape[0] for path, (_, a) in adapter.pairs.items()}
    top = max(ranks.values())
    patterns = {exact_pattern(path): rank for path, rank in ranks.items() if rank != top}
    config = LoraConfig(
        r=top,
        lora_alpha=top,
        lora_dropout=0.0,
        rank_pattern=dict(patterns),
        alpha_pattern=dict(patterns),
        fan_in_fan_out=adapter.base.fan_in_fan_out,
        lora_bias=bool(adapter.shifts),
        **_selection(list(ranks), paths),
        **_identity(adapter.base),
    )
    inject(host, name, config, [f"{path}.lora_A.weight" for path in ranks])
    for path, pair in adapter.pairs.items():
        layer = host.root.get_submodule(path)
        if not isinstance(layer, LoraLayer) or not (name in layer.lora_A or name in layer.lora_embedding_A):
            raise InputError(f"module {path!r} is {type(layer).__name__}, which peft gives no LoRA layer")
        _fill(path, layer, name, pair, path in adapter.embeddings)
        if adapter.shifts:
            bias = adapter.shifts.get(path, torch.zeros(pair[0].shape[0]))
            layer.lora_B[name].bias = _frozen(bias.to(pair[0].dtype), place_of(layer))


def _fill(path: str, layer: Any, name: str, pair: tuple[Tensor, Tensor], is_embedding: bool) -> None:
    B, A = pair
    if is_embedding != (name in layer.lora_embedding_A):
        kind = "an embedding" if not is_embedding else "no embedding"
        raise InputError(f"module {path!r} is {kind} in the model; the adapter belongs to another base model")
    if is_embedding:
        there = layer.lora_embedding_B[name].shape, layer.lora_embedding_A[name].shape
    else:
        there = layer.lora_B[name].weight.shape, layer.lora_A[name].weight.shape
    if there != (B.shape, A.shape):
        raise InputError(
            f"module {path!r} has B {list(B.shape)} and A {list(A.shape)} in the adapter, and the model takes "
            f"{list(there[0])} and {list(there[1])}: it belongs to another base model"
        )
    place = place_of(layer)
    if place.type == "meta":
        raise InputError(f"module {path!r} has no memory (it is offloaded); load the model on a device")
    b, a = _frozen(B, place), _frozen(A, place)
    if is_embedding:
        layer.lora_embedding_A[name], layer.lora_embedding_B[name] = a, b
    else:
        layer.lora_A[name].weight, layer.lora_B[name].weight = a, b


def _put_vectors(host: Host, name: str, adapter: ReadyVectors, paths: Mapping[str, None]) -> None:
    fields = _selection(list(adapter.vectors), paths)
    config = IA3Config(
        feedforward_modules=[p for p in adapter.vectors if p in adapter.feedforward],
        fan_in_fan_out=adapter.base.fan_in_fan_out,
        **fields,
        **_identity(adapter.base),
    )
    inject(host, name, config, [f"{path}.ia3_l" for path in adapter.vectors])
    for path, vector in adapter.vectors.items():
        layer: Any = host.root.get_submodule(path)
        there = getattr(layer, "ia3_l", {}).get(name)
        if there is None or there.shape != vector.shape or layer.is_feedforward != (path in adapter.feedforward):
            raise InputError(
                f"module {path!r} takes {'nothing' if there is None else list(there.shape)} in the model, and the "
                f"adapter has {list(vector.shape)}: it belongs to another base model, or scales inputs where that "
                "scales outputs"
            )
        layer.ia3_l[name] = _frozen(vector, place_of(layer))


def _frozen(tensor: Tensor, place: torch.device) -> nn.Parameter:
    return nn.Parameter(tensor.to(place), requires_grad=False)


def _selection(modules: list[str], paths: Mapping[str, None]) -> dict[str, Any]:
    """The fields that select exactly these modules of the model, also when the saved adapter is loaded again."""
    wanted = dict.fromkeys(modules)
    tails = {tail for path in paths if path not in wanted for tail in path_tails(path)}
    also = [path for path in modules if path in tails]
    fields: dict[str, Any] = {"target_modules": modules}
    if also:
        fields["exclude_modules"] = exclude_pattern(also, modules)
    return fields


def _identity(base: BaseInfo) -> dict[str, Any]:
    """What the adapter belongs to. Of tasks that peft wants a trained head for there is no task: none is written."""
    return {
        "base_model_name_or_path": base.model,
        "revision": base.revision,
        "task_type": None if base.task_type in HEADS else base.task_type,
        "inference_mode": True,
    }
