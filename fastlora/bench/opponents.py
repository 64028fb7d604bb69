"""The opponents: plain torch, which is the backend ``torch``, and what papers and tools do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastlora.adapters.pool import Pool
from fastlora.backends import torch as backend
from fastlora.ops.dispatch import Kernel, use_backend, use_kernels

PLAIN = "plain torch in factor space"
KERNELS: Mapping[str, Kernel] = backend.kernels(torch.float32)
"""Plain torch at its fastest: its passes sum in float32."""

Given = ParamSpec("Given")
Found = TypeVar("Found")


def in_plain_torch(run: Callable[Given, Found]) -> Callable[Given, Found]:
    """The same, computed by :data:`KERNELS`."""

    @functools.wraps(run)
    def plain(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        with use_kernels("torch", KERNELS), use_backend("torch"):
            return run(*args, **kwargs)

    return plain


def dense_projection(delta: Tensor, rtol: float = 1e-5) -> Tensor:
    """``P [n, n]``: the projection on the column space of a dense ``ΔW [n, m]``."""
    u, s, _ = torch.linalg.svd(delta, full_matrices=False)
    u = u[:, s > rtol * s[0]]
    projection: Tensor = u @ u.mT
    return projection


def shared_part(product: Tensor, threshold: float) -> Tensor:
    """``Z [n, q]``: orthonormal, spans the eigenvectors of a dense product of projections above the threshold."""
    values, vectors = torch.linalg.eig(product)
    span = vectors[:, values.real > threshold]
    left: Tensor = torch.linalg.svd(torch.cat([span.real, span.imag], 1), full_matrices=False)[0]
    return left[:, : span.shape[1]]


def dense_unique(deltas: list[Tensor], threshold: float) -> list[Tensor]:
    """The paper's algorithm on dense ``ΔW_i [n, m]``: SVD projections, their product, eigenvectors, projection."""
    product = dense_projection(deltas[0])
    for delta in deltas[1:]:
        product = product @ dense_projection(delta)
    Z = shared_part(product, threshold)
    return [delta - Z @ (Z.mT @ delta) for delta in deltas]


def _stacked(pool: Pool, module: str) -> tuple[Tensor, Tensor]:
    """``[s₁B₁ | s₂B₂ | …]`` and ``[A₁; A₂; …]``."""
    pairs = []
    for adapter in pool.adapters:
        update = adapter.updates[module]
        B, A = update.B.stored, update.A.stored
        assert B is not None and A is not None
        pairs.append((update.scaling * B, A))
    return torch.cat([B for B, _ in pairs], 1), torch.cat([A for _, A in pairs])


def merge_by_qr(pool: Pool, rank: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Best rank-``rank`` approximation of the sum: QR of the stacked factors, SVD of the small core."""
    results = []
    for module in pool.modules:
        B, A = _stacked(pool, module)
        qb, rb = torch.linalg.qr(B)
        qa, ra = torch.linalg.qr(A.mT)
        u, s, vh = torch.linalg.svd(rb @ ra.mT)
        results.append((qb @ (u[:, :rank] * s[:rank]), vh[:rank] @ qa.mT))
    return results


def merge_by_dense_svd(pool: Pool, rank: int = 16) -> list[tuple[Tensor, Tensor]]:
    """The same by SVD of the dense sum, as adapter tools do."""
    results = []
    for module in pool.modules:
        B, A = _stacked(pool, module)
        u, s, vh = torch.linalg.svd(B @ A, full_matrices=False)
        results.append((u[:, :rank] * s[:rank], vh[:rank]))
    return results


def peft_model(pool: Pool) -> Any:
    """A model of the pool's modules, which have plain names, with every adapter loaded, as ``peft`` merges them."""
    from peft import LoraConfig, get_peft_model

    base = torch.nn.Module()
    for module in pool.modules:
        n, m = pool.adapters[0].updates[module].shape
        base.add_module(module, torch.nn.Linear(m, n, bias=False))
    model: Any = None
    for adapter in pool.adapters:
        (rank,) = {u.rank for u in adapter.updates.values()}
        (scaling,) = {u.scaling for u in adapter.updates.values()}
        config = LoraConfig(r=rank, lora_alpha=int(scaling * rank), target_modules=pool.modules)
        if model is None:
            model = get_peft_model(base, config, adapter_name=adapter.name)
        else:
            model.add_adapter(adapter.name, config)
        for module, update in adapter.updates.items():
            layer = model.base_model.model.get_submodule(module)
            layer.lora_A[adapter.name].weight.data.copy_(update.A.stored)
            layer.lora_B[adapter.name].weight.data.copy_(update.B.stored)
    return model


def merge_by_peft(
    model: Any, names: list[str], kind: str = "svd", rank: int = 16, **more: float
) -> list[tuple[Tensor, Tensor]]:
    """The same by ``add_weighted_adapter``: dense SVD with the package's own settings."""
    merged = "merged"
    if merged in model.peft_config:
        model.delete_adapter(merged)
    model.add_weighted_adapter(names, [1.0] * len(names), merged, combination_type=kind, svd_rank=rank, **more)
    layers = [m for m in model.modules() if merged in getattr(m, "lora_A", {})]
    return [(x.scaling[merged] * x.lora_B[merged].weight.data, x.lora_A[merged].weight.data) for x in layers]
