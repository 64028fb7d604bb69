"""A LoRA adapter from a task vector: the truncated singular value decomposition of every weight's change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.core.data import BaseInfo, DeltaData, Extra
from fastlora.core.dtypes import parse_dtype
from fastlora.core.factors import Factor
from fastlora.core.names import EMBEDDINGS
from fastlora.core.updates import MIN_RTOL, Layout, Update
from fastlora.errors import InputError
from fastlora.runtime.progress import track

WEIGHT, BIAS = ".weight", ".bias"


def extract(
    vector: DeltaData,
    rank: int | None = None,
    *,
    energy: float | None = None,
    embeddings: Sequence[str] | None = None,
    fan_in_fan_out: bool = False,
    biases: bool = False,
    base_model: str | None = None,
) -> Adapter:
    """The best approximation ``B A`` of the change of every weight matrix, at most of ``rank`` or with at least the
    share ``energy`` of ``Σσ²`` (Eckart–Young); ``B = U√Σ``, ``A = √ΣVᵀ``.

    embeddings: ends of the paths of modules that are embeddings, whose weight is ``[vocabulary, dim]``; by default the
        usual names and what ends in ``embeddings``.
    fan_in_fan_out: weights are ``[in, out]`` (GPT-2).
    biases: keep the changes of the biases of these modules (``lora_bias`` of PEFT).
    base_model: what the adapter names as its base model.

    Only ``<module>.weight`` of two dimensions or more (convolutions) can be approximated; a note says what was left
    out, and ``provenance`` what share of ``‖τ‖²`` is kept. Costs a dense decomposition of every weight.
    """
    if (rank is None) == (energy is None):
        raise InputError("extract: give rank=N or energy=X (the share of Σσ² to keep), one of the two")
    if rank is not None and rank < 1:
        raise InputError(f"extract: rank={rank} must be at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise InputError(f"extract: energy={energy} must be above 0 and at most 1")
    updates: dict[str, Update] = {}
    extras: dict[str, Extra] = {}
    lost: list[str] = []
    kept = 0.0
    for parameter, delta in track(list(vector.deltas.items()), "extracting"):
        module = parameter.removesuffix(WEIGHT)
        if module == parameter or not 2 <= delta.dim() <= 5:
            continue
        layout = _layout(module, delta, embeddings)
        updates[module], share = _cut(_matrix(delta, layout, fan_in_fan_out), layout, rank, energy)
        kept += share
    for parameter, delta in vector.deltas.items():
        module = parameter.removesuffix(BIAS)
        if biases and module in updates and delta.dim() == 1 and module != parameter:
            extras[parameter] = Extra("delta", delta)
            kept += float(delta.double().square().sum())
        elif parameter.removesuffix(WEIGHT) not in updates:
            lost.append(parameter)
    if not updates:
        raise InputError(f"extract: task vector {vector.name!r} changes no weight matrix; there is nothing to extract")
    total = vector.norm**2
    notes = list(vector.notes)
    if lost:
        size = sum(float(vector.deltas[p].double().square().sum()) for p in lost) / total
        notes.append(
            f"extract: the changes of {len(lost)} parameters that are no weight matrices ({lost[0]}, …) are left out, "
            f"{100 * size:.2g} % of ‖τ‖²" + ("" if biases else "; biases=True keeps biases")
        )
    return Adapter(
        vector.name,
        updates,
        extras=extras,
        base=BaseInfo(model=base_model, fan_in_fan_out=fan_in_fan_out),
        dtype=parse_dtype(None, torch.float32),
        provenance={"extract": vector.provenance, "rank": rank, "energy": energy, "retained_energy": kept / total},
        notes=tuple(notes),
    )


def _layout(module: str, delta: Tensor, embeddings: Sequence[str] | None) -> Layout:
    if delta.dim() > 2:
        return Layout("conv", kernel=tuple(delta.shape[2:]))
    last = module.rpartition(".")[2]
    if embeddings is None:
        is_embedding = last.endswith("embeddings") or (last in EMBEDDINGS and last not in ("lm_head", "embed_out"))
    else:
        is_embedding = module.endswith(tuple(embeddings))
    return Layout("embedding") if is_embedding else Layout()


def _matrix(delta: Tensor, layout: Layout, fan_in_fan_out: bool) -> Tensor:
    """``ΔW [out, in]`` as adapters have it, float64."""
    matrix = delta.double().reshape(delta.shape[0], -1)
    flipped = layout.kind == "embedding" or (layout.kind == "linear" and fan_in_fan_out)
    return matrix.mT if flipped else matrix


def _cut(matrix: Tensor, layout: Layout, rank: int | None, energy: float | None) -> tuple[Update, float]:
    """The update, and the ``Σσ²`` that it keeps."""
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    squares = sigma.square()
    count = int((sigma > MIN_RTOL * sigma[0]).sum())  # the rest is rounding of the two models
    if energy is not None:
        shares = squares.cumsum(0) / squares.sum()
        rank = int((shares < energy).sum()) + 1
    assert rank is not None
    count = min(count, rank)
    root = sigma[:count].sqrt()
    b = (left[:, :count] * root).float().contiguous()
    a = (root[:, None] * right[:count]).float().contiguous()
    return Update(Factor.of("B", b), Factor.of("A", a), 1.0, layout), float(squares[:count].sum())
