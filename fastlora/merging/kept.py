"""What a cut keeps of every adapter that was merged."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fastlora import ops
from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.engine import shares
from fastlora.engine.blocks import PairBlocks, read_pair_blocks

# Directions of a factor of the result below it, relative to the largest, are rounding (in squares).
NULL = 1e-12
CUTS = ("rank", "energy")


def was_cut(merged: Adapter) -> bool:
    """Whether a merge was cut to a rank or an energy, given or the method's default."""
    given = merged.provenance.get("parameters")
    told = given if isinstance(given, dict) else {}
    return "retained_energy" in merged.provenance or any(told.get(name) is not None for name in CUTS)


def with_kept(pool: Pool, merged: Adapter) -> tuple[Adapter, dict[str, float]]:
    """A merge with what its cut has kept of every adapter in its provenance, and that, :func:`kept_of_each`; nothing
    where nothing was cut."""
    kept = kept_of_each(pool, merged) if was_cut(merged) else {}
    told = {name: share for name, share in kept.items() if not math.isnan(share)}
    if not told:
        return merged, kept
    return replace(merged, provenance={**merged.provenance, "retained_energy_by_adapter": told}), kept


def kept_of_each(pool: Pool, merged: Adapter) -> dict[str, float]:
    """The share of ``‖ΔW_i‖²`` of every adapter that lies in the column and row spaces of the merged updates.

    ``Σ ‖U Uᵀ ΔW_i V Vᵀ‖² / Σ ‖ΔW_i‖²`` over all modules, where ``U`` and ``V`` are orthonormal bases of the merged
    ``B`` and ``Aᵀ``. NaN for an adapter that is zero. Cost: two passes over the factors of all.
    """
    name = "merged"
    while name in pool.names:
        name += "'"
    both = Pool([replace(merged, name=name), *pool.adapters])

    def work() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for blocks in read_pair_blocks(both, "energy kept of every adapter", shared=True):
            members = torch.tensor(blocks.members[1:], dtype=torch.int64) - 1
            energies = torch.zeros(len(blocks.modules), 2, len(pool), dtype=torch.float64)
            energies[:, 0, members] = _inside(blocks)
            energies[:, 1, members] = blocks.inner().diagonal(dim1=1, dim2=2)[:, 1:]
            found |= dict(zip(blocks.modules, energies.unbind(), strict=True))
        return found

    energies = shares.each("energy kept of every adapter", work, both.adapters)
    kept, total = torch.stack([energies[m] for m in both.modules]).sum(0)
    return dict(zip(pool.names, (kept / total).clamp(max=1.0).tolist(), strict=True))


def _inside(blocks: PairBlocks) -> Tensor:
    """``‖Uᵀ ΔW_i V‖²`` of every module, ``U`` and ``V`` of the first adapter, ``ΔW_i`` of the others: ``[g, k]``."""
    left, right = (
        _inverse_root(gram[:, 0, 0])[:, None] @ gram[:, 0, 1:] for gram in (blocks.left, blocks.right)
    )  # [g, k, r, r]
    inside = (left @ right.mT).square().sum((2, 3))
    return inside * blocks.scaling[:, 1:].square()


def _inverse_root(gram: Tensor) -> Tensor:
    """``T`` with orthonormal ``X Tᵀ`` for ``gram = XᵀX [g, r, r]``; rows of zeros for what is not there."""
    values, vectors = ops.eigh(gram.contiguous())
    there = values > NULL * values[:, -1:].clamp(min=0)
    return torch.where(there, values.clamp(min=1e-300).rsqrt(), 0.0)[:, :, None] * vectors.mT
