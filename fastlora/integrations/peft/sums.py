"""Exact sums on live layers, bit for bit as peft makes them where it is right."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastlora.core.dtypes import widest
from fastlora.integrations.peft.reading import LiveFactors

Pair = tuple[Tensor, Tensor]


def side_by_side(
    factors: Mapping[str, Mapping[str, LiveFactors]], weights: Mapping[str, float], dtype: torch.dtype | None
) -> dict[str, Pair]:
    """``B = [B_1 | B_2 | …]`` and ``A = [w_1 s_1 A_1; …]`` of every module: ``ΔW = Σ_i w_i ΔW_i``.

    One adapter alone has ``B = √|w s| B_1`` and ``A = ±√|w s| A_1``, as peft has it. Each product is rounded as peft
    rounds it; ``dtype`` is the one that it is computed in, by default the widest of all factors.
    """
    stored = [tensor.dtype for layers in factors.values() for f in layers.values() for tensor in (f.B, f.A)]
    target = dtype or widest(stored)
    modules = dict.fromkeys(path for layers in factors.values() for path in layers)
    if len(factors) == 1:
        [(name, layers)] = factors.items()
        return {path: _alone(layers[path], weights[name], target) for path in modules}
    return {
        path: _joined([(f[path], weights[name]) for name, f in factors.items() if path in f], target)
        for path in modules
    }


def _alone(factors: LiveFactors, weight: float, dtype: torch.dtype) -> Pair:
    total = weight * factors.scaling
    root = torch.tensor([math.sqrt(abs(total))]).to(factors.A.device)  # float32, as peft has it
    A = (factors.A.to(dtype)[None] * _broad(root if total >= 0 else -root, factors.A)).sum(dim=0)
    B = (factors.B.to(dtype)[None] * _broad(root, factors.B)).sum(dim=0)
    return B.to(dtype), A.to(dtype)


def _broad(root: Tensor, like: Tensor) -> Tensor:
    return root.view(-1, *(1 for _ in like.shape))


def _joined(terms: list[tuple[LiveFactors, float]], dtype: torch.dtype) -> Pair:
    A = torch.cat([f.A.to(dtype) * weight * f.scaling for f, weight in terms], dim=0)
    return torch.cat([f.B.to(dtype) for f, _ in terms], dim=1), A
