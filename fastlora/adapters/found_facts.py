"""What is to be known of a model so that an adapter of its change fits it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from fastlora.adapters.differences import ParameterChange
from fastlora.adapters.model_names import shares_embedding
from fastlora.core.architectures import (
    BIAS,
    EXPERT_NUMBER,
    FUSED_SINCE,
    LOOKS_LIKE_CONV1D,
    NO_MODULES,
    ROUTERS,
    TRANSLATED,
    TRANSPOSED_EXPERTS,
    WEIGHT,
    is_conv1d,
    is_embedding,
    is_head,
    task_type,
)
from fastlora.core.model_facts import ModelFacts
from fastlora.files.model_config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]


def found_facts(deltas: Mapping[str, ParameterChange], shapes: Shapes, configs: Sequence[ModelConfig]) -> ModelFacts:
    """What the shapes of a base model's parameters and the configurations say about what changed."""
    types = {t for c in configs for t in c.model_types}
    in_out, assumed = [], []
    for parameter, delta in deltas.items():
        module = parameter.removesuffix(WEIGHT)
        if module == parameter or len(delta.shape) != 2 or is_head(module) or is_embedding(module):
            continue
        shape = _is_in_out(module, delta.shape, shapes)
        if shape if shape is not None else any(is_conv1d(module, t) for t in types):
            in_out.append(module)
        elif shape is None and (not configs or (LOOKS_LIKE_CONV1D.fullmatch(module) and not types)):
            assumed.append(module)
    last = {m.rpartition(".")[2] for m in in_out}
    if not types and any(LOOKS_LIKE_CONV1D.fullmatch(m) for m in in_out):
        # Square weights of the same class: only the others show how they lie.
        in_out += [m for m in assumed if LOOKS_LIKE_CONV1D.fullmatch(m) or m.rpartition(".")[2] in last]
    tasks = (task_type(c.architectures, c.encoder_decoder and shares_embedding(c)) for c in configs)
    matrices = [n.removesuffix(WEIGHT) for n, d in deltas.items() if n.endswith(WEIGHT) and len(d.shape) >= 2]
    return ModelFacts(
        configured=bool(configs),
        in_out=tuple(in_out),
        assumed=tuple(m for m in assumed if m not in in_out),
        in_out_experts=bool(types & TRANSPOSED_EXPERTS),
        by_parameter=tuple(m for m in matrices if _is_by_parameter(m, types, shapes)),
        unsuited=tuple(m for m in matrices if any(m.rpartition(".")[2] in NO_MODULES.get(t, ()) for t in types)),
        fused_later=bool(types & FUSED_SINCE),
        task_type=next((t for t in tasks if t is not None), None),
        still=_still(deltas, shapes),
    )


def _is_by_parameter(module: str, types: Collection[str], shapes: Shapes) -> bool:
    """Whether PEFT adapts a module by its parameter ``weight`` alone."""
    if EXPERT_NUMBER.fullmatch(module):
        return False
    parent, _, last = module.rpartition(".")
    translated = [TRANSLATED[t] for t in types if t in TRANSLATED]
    if translated:
        return any(last in names for names in translated)
    return last in ROUTERS and any(n.startswith(f"{parent}.experts.") for n in shapes)


def _still(deltas: Mapping[str, ParameterChange], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Modules with a weight matrix that does not take part, and its shape."""
    others = {n: s for n, s in shapes.items() if n.endswith(WEIGHT) and n not in deltas}
    return {n.removesuffix(WEIGHT): s for n, s in others.items() if len(s) >= 2}


def _is_in_out(module: str, shape: torch.Size, shapes: Shapes) -> bool | None:
    """Whether a weight is ``[in, out]``, which the length of the bias tells where the weight is not square."""
    bias = shapes.get(module + BIAS)
    if bias is None or shape[0] == shape[1]:
        return None
    return None if bias not in ((shape[0],), (shape[1],)) else bias[0] == shape[1]
