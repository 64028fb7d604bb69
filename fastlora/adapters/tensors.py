"""Low-rank adapters from tensors in memory, and back: what other toolkits hand over and take."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from fastlora.core.data import LoraData
from fastlora.core.dtypes import WIDTHS
from fastlora.core.factors import Factor
from fastlora.core.updates import EMBEDDING, LINEAR, Layout, Update, chosen_rank
from fastlora.engine.balance import balanced
from fastlora.engine.materialise import materialise_groups
from fastlora.errors import InputError

FactorPair = tuple[Tensor, Tensor]
"""``B`` and ``A`` of one module."""


def updates_of(
    tensors: Mapping[str, FactorPair | tuple[Tensor, Tensor, float]], embeddings: Collection[str]
) -> dict[str, Update]:
    """The updates of :meth:`fastlora.Adapter.from_tensors`, on the given tensors where their rows are contiguous."""
    if not tensors:
        raise InputError("from_tensors: no module was given; an adapter needs one at least")
    unknown = [name for name in embeddings if name not in tensors]
    if unknown:
        raise InputError(f"from_tensors: embeddings name {unknown[0]!r}, for which there are no tensors")
    updates = {module: _update(module, given, module in embeddings) for module, given in tensors.items()}
    devices = {u.B.terms[0].source.device: module for module, u in updates.items()}
    if len(devices) > 1:
        where = ", ".join(f"{module!r} on {device}" for device, module in devices.items())
        raise InputError(f"from_tensors: the modules are on different devices ({where}); move them to one")
    return updates


def _update(module: str, given: Sequence[object], is_embedding: bool) -> Update:
    if not isinstance(module, str) or not module:
        raise InputError(f"from_tensors: {module!r} is no path of a module, such as 'model.layers.0.self_attn.q_proj'")
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        raise InputError(f"from_tensors: {module!r} needs (B, A) or (B, A, scaling), not {_shown(given)}")
    B, A, scaling = (*given, 1.0)[:3]
    for name, tensor in (("B", B), ("A", A)):
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in WIDTHS:
            raise InputError(
                f"from_tensors: {name} of {module!r} is {_shown(tensor)}; needed is a dense tensor of float16, "
                "bfloat16, float32 or float64"
            )
    assert isinstance(B, Tensor) and isinstance(A, Tensor)
    if not isinstance(scaling, Real) or not math.isfinite(scaling):
        raise InputError(f"from_tensors: the scaling of {module!r} is {scaling!r}: it must be a finite number")
    fits = B.dim() == A.dim() and B.dim() in ((2,) if is_embedding else (2, 3, 4, 5))
    if not fits or B.shape[1] != A.shape[0] or any(size != 1 for size in B.shape[2:]) or not all(A.shape[1:]):
        raise InputError(
            f"from_tensors: {module!r} has B {list(B.shape)} and A {list(A.shape)}; needed are [out, rank] and "
            "[rank, in], with the kernel after them for a convolution: [out, rank, 1, …] and [rank, in, *kernel]"
        )
    if B.device != A.device:
        raise InputError(f"from_tensors: {module!r} has B on {B.device} and A on {A.device}; move them to one device")
    layout = EMBEDDING if is_embedding else Layout("conv", kernel=tuple(A.shape[2:])) if A.dim() > 2 else LINEAR
    left, right = (x.detach().flatten(1) for x in (B, A))
    stored = (x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous() for x in (left, right))
    return Update(Factor.of("B", next(stored)), Factor.of("A", next(stored)), float(scaling), layout)


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.layout)[6:]} tensor of {str(value.dtype)[6:]}"
    return f"of type {type(value).__name__}" if not isinstance(value, tuple | list) else f"{len(value)} values"


def tensors_of(
    updates: Mapping[str, Update], dtype: torch.dtype, uniform_rank: int | bool | None
) -> dict[str, FactorPair]:
    """``(B, A)`` of every module for :meth:`fastlora.Adapter.tensors`."""
    whole, lost = balanced({None: LoraData("adapter", updates)}, {None: dtype})
    for loss in lost.values():
        warnings.warn(loss.told("adapter.tensors", dtype), stacklevel=3)
    baked = [u.baked() for u in whole[None].updates.values()]
    pairs = [pair for [pair] in materialise_groups([[u] for u in baked], dtype)]
    rank = chosen_rank(baked, uniform_rank)
    if rank is not None:
        pairs = [(_widened(B, 1, rank), _widened(A, 0, rank)) for B, A in pairs]
    return {m: _shaped(pair, u.layout) for (m, u), pair in zip(updates.items(), pairs, strict=True)}


def _widened(factor: Tensor, axis: int, rank: int) -> Tensor:
    """The factor with zeros up to ``rank``, or itself where it has that rank."""
    if factor.shape[axis] == rank:
        return factor
    shape = (factor.shape[0], rank) if axis else (rank, factor.shape[1])
    wide = factor.new_zeros(shape)
    wide.narrow(axis, 0, factor.shape[axis]).copy_(factor)
    return wide


def _shaped(pair: FactorPair, layout: Layout) -> FactorPair:
    """A convolution's factors with their kernel: ``B [out, r, 1, …]``, ``A [r, in, *kernel]``."""
    if layout.kind != "conv":
        return pair
    B, A = pair
    ones = (1,) * len(layout.kernel)
    return B.reshape(*B.shape, *ones), A.reshape(A.shape[0], A.shape[1] // math.prod(layout.kernel), *layout.kernel)
