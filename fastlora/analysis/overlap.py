"""How similar the adapters of a pool are: cosines of updates (13) and overlap of their column spaces (14)."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora import ops
from fastlora.adapters.pool import Pool, on_device
from fastlora.core.data import LoraData
from fastlora.engine.blocks import ChainBlocks, read_chain_blocks, read_pair_blocks
from fastlora.engine.checks import raise_for_info
from fastlora.engine.gram import read_gram
from fastlora.engine.schedule import one_adapter, parts, rtol_or_default
from fastlora.engine.stream import current
from fastlora.ops.gram import blocks_of


def overlap(pool: Pool, *, device: str | torch.device | None = None) -> Overlap:
    """Compares every pair of adapters: the cosine of their updates and the overlap of their column spaces.

    With ``⟨X, Y⟩ = Σ_ab X_ab Y_ab`` and orthonormal bases ``U_i [n, q_i]`` of the column spaces, MATH (13) and (14):

        cosine(i, j)   = ⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖ ‖ΔW_j‖)       in [-1, 1]
        subspace(i, j) = ‖U_iᵀ U_j‖_F² / min(q_i, q_j)         in [0, 1]

    Args:
        pool: the ``k`` adapters. A pair is compared in the modules that both have.
        device: where to compute: ``"cuda"``, ``"cuda:1"``, ``"cpu"``; by default where the pool is.

    Returns:
        An object with ``names`` and, in their order, ``cosine`` and ``subspace``: float64 ``[k, k]`` over all modules,
        NaN where a pair has no module in common or a zero update; 1 of an adapter that is not zero with itself.
        ``cosine`` sums its three products over the modules first; ``subspace`` is the mean over the modules.
        ``modules`` is ``{module: (cosine, subspace)}``, of modules that two adapters have. ``notices`` are those of the
        pool and the notes of its adapters.

    Raises:
        InputError: adapters on different devices, a device that cannot be used.
        NonFiniteError: a factor that holds NaN or Inf, by adapter and module.

    Cost: one read of all factors and ``O(k² r³)`` operations a module.
    """
    return pool_overlap(on_device(pool, device))


@dataclass(frozen=True, slots=True, eq=False)
class Overlap:
    """Similarity matrices in the order of ``names``; NaN where a pair has no module in common or a zero update.

    ``cosine [k, k]``: ``⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖·‖ΔW_j‖)`` over the modules that both have. ``subspace [k, k]``: mean
    over those modules of ``‖U_iᵀU_j‖_F² / min(q_i, q_j)``. ``modules``: the same two matrices for every module.
    ``notices``: what a user should know about the pool and its adapters.
    """

    names: list[str]
    cosine: Tensor
    subspace: Tensor
    modules: dict[str, tuple[Tensor, Tensor]]
    notices: tuple[str, ...] = ()


def pool_overlap(pool: Pool) -> Overlap:
    """Both similarities of every pair, from one read of the factors, or of the blocks that the Gram cache in use
    has."""
    k = len(pool)
    products = torch.zeros(k, k, dtype=torch.float64)
    squares = torch.zeros(k, k, dtype=torch.float64)  # Σ‖ΔW_i‖² over the modules that j has too
    shares = torch.zeros(k, k, dtype=torch.float64)
    counts = torch.zeros(k, k, dtype=torch.float64)
    modules = {}
    for part in parts(pool, "comparing", rtol_of=rtol_or_default(None), least=2, stream=current()):
        blocks = read_chain_blocks(part, "left", "pairs")
        inner, subspace = (x.cpu() for x in _similarities(blocks, part.group.rtols))
        index = torch.tensor(part.group.members)
        for g, module in enumerate(part.modules):
            norms = inner[g].diagonal().sqrt()
            cosine, space = (torch.full((k, k), torch.nan, dtype=torch.float64) for _ in range(2))
            cosine[index[:, None], index] = inner[g] / (norms[:, None] * norms)
            space[index[:, None], index] = subspace[g]
            modules[module] = (cosine, space)
            products[index[:, None], index] += inner[g]
            squares[index[:, None], index] += inner[g].diagonal()[:, None].expand_as(inner[g])
            known = subspace[g].isfinite()
            shares[index[:, None], index] += torch.where(known, subspace[g], 0.0)
            counts[index[:, None], index] += known
    cosine, subspace = products / (squares.sqrt() * squares.mT.sqrt()), shares / counts
    for i, adapter in enumerate(pool.adapters):
        if products[i, i] > 0 or _changes_something(adapter, modules):
            cosine[i, i] = subspace[i, i] = 1.0
    ordered = {m: modules[m] for m in pool.modules if m in modules}
    return Overlap(list(pool.names), cosine, subspace, ordered, tuple(pool.told))


def _changes_something(adapter: LoraData, compared: Container[str]) -> bool:
    """Whether an adapter has an update that is not zero beside the modules that were compared; reads those that it has
    alone until there is one."""
    alone = {module: update for module, update in adapter.updates.items() if module not in compared}
    return any(bool((blocks.inner() > 0).any()) for blocks in read_pair_blocks(one_adapter(adapter.name, alone)))


def _similarities(blocks: ChainBlocks, rtols: Sequence[float]) -> tuple[Tensor, Tensor]:
    """``⟨ΔW_i, ΔW_j⟩`` and ``‖U_iᵀU_j‖²/min(q_i, q_j)`` of every module: ``[g, k, k]`` each.

    Reads the other side's factors, except for blocks that the Gram cache in use has."""
    k = len(blocks.group.members)
    device = blocks.projected.device
    upper = torch.ones(k, k, dtype=torch.bool, device=device).triu()
    full = torch.where(upper[:, :, None, None], blocks.projected, blocks.projected.transpose(1, 2).mT)
    r = full.shape[-1]
    other = read_gram([[u.A for u in row] for row in blocks.updates], r, blocks_of("pairs", k))
    other = torch.where(upper[:, :, None, None], other, other.transpose(1, 2).mT)
    scaling = torch.tensor([[u.scaling for u in row] for row in blocks.updates], dtype=torch.float64).to(device)
    inner = (full * other).sum((-1, -2)) * scaling[:, :, None] * scaling[:, None]

    # Each adapter alone, with its own noise floor: its whitening T_i [r, r], columns beyond the kept directions zero.
    chains = [
        ops.chain(
            full[:, i, i, None, None].contiguous(), blocks.other[:, i, None].contiguous(), threshold=0.0,
            rtol=rtols[i], floor=blocks.floor[:, i, None].contiguous(),
        )
        for i in range(k)
    ]  # fmt: skip
    for chain in chains:
        raise_for_info(blocks.modules, chain.info)
    T = torch.stack([chain.basis[:, 0] for chain in chains], 1)  # [g, k, r, r]
    kept = torch.cat([chain.kept for chain in chains], 1).double()  # [g, k]
    cosines = T[:, :, None].mT @ full @ T[:, None]  # U_iᵀU_j
    smaller = torch.minimum(kept[:, :, None], kept[:, None])
    return inner, cosines.square().sum((-1, -2)) / smaller
