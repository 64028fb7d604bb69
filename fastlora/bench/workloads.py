"""Seeded pools with the shapes of real models, for benchmarks: decaying spectra and a planted shared subspace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.adapter import Adapter, Factor, Update
from fastlora.errors import InputError
from fastlora.pool import Pool

SHARED = 4  # planted common directions, strongest in every adapter
DECAY = 0.85  # ratio of neighbouring singular values


@dataclass(frozen=True, slots=True)
class Workload:
    """``layers`` copies of the modules ``{name: (out, in)}``, ``adapters`` of rank ``rank``."""

    modules: Mapping[str, tuple[int, int]]
    layers: int
    adapters: int
    rank: int
    dtype: torch.dtype

    @property
    def names(self) -> list[str]:
        return [f"model.layers.{i}.{m}" for i in range(self.layers) for m in self.modules]

    @property
    def bytes(self) -> int:
        values = sum(n + m for n, m in self.modules.values()) * self.layers * self.adapters * self.rank
        return values * self.dtype.itemsize


LLAMA_7B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}

WORKLOADS = {
    "llama2-7b-8x16": Workload(LLAMA_7B, 32, 8, 16, torch.bfloat16),
    "llama2-7b-8x16-fp32": Workload(LLAMA_7B, 32, 8, 16, torch.float32),
    "one-1024-8x16": Workload({"dense": (1024, 1024)}, 1, 8, 16, torch.float32),
}


def find(name: str) -> Workload:
    if name not in WORKLOADS:
        raise InputError(f"workload {name!r} does not exist: use one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def make_pool(workload: Workload, seed: int = 0) -> Pool:
    """The pool of a workload; the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    updates: list[dict[str, Update]] = [{} for _ in range(workload.adapters)]
    for layer in range(workload.layers):
        for name, (n, m) in workload.modules.items():
            common = torch.randn(n, SHARED, generator=generator) / n**0.5
            for own in updates:
                B, A = _factors(n, m, workload.rank, common, generator)
                own[f"model.layers.{layer}.{name}"] = Update(
                    Factor.of("B", B.to(workload.dtype)), Factor.of("A", A.to(workload.dtype)), 2.0
                )
    return Pool(Adapter(f"adapter{i}", own, dtype=workload.dtype) for i, own in enumerate(updates))


def _factors(n: int, m: int, r: int, common: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``B [n, r]`` whose first columns are near the common ones, ``A [r, m]``; singular values of ``BA`` decay."""
    B = torch.randn(n, r, generator=generator) / n**0.5
    B[:, :SHARED] = common[:, :r] + 0.05 * B[:, :SHARED]
    A = torch.randn(r, m, generator=generator) / m**0.5
    return B * DECAY ** torch.arange(r), A
