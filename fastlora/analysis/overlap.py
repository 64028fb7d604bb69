"""How similar the adapters of a pool are: cosines of updates (13) and overlap of their column spaces (14)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastlora import ops
from fastlora.adapters.pool import Pool, on_device
from fastlora.analysis.all_pairs import ModulePairs, all_pairs
from fastlora.analysis.similar import Overlap
from fastlora.core.updates import sources
from fastlora.engine import shares as among_ranks
from fastlora.engine.blocks import ChainBlocks, read_chain_blocks
from fastlora.engine.checks import raise_for_info
from fastlora.engine.contracts import PoolView
from fastlora.engine.gram import read_gram
from fastlora.engine.gram_cache import entered
from fastlora.engine.schedule import PART_BYTES, parts, rtol_or_default, split_to_fit
from fastlora.engine.stream import PoolPart, current
from fastlora.ops.gram import blocks_of
from fastlora.runtime import ranks
from fastlora.runtime.cpython import paused_collector
from fastlora.runtime.memory import MappedFiles

# A pool with more adapters is compared by tiles of stacked factors in float32: the Gram blocks of all pairs would be k
# times larger than the factors.
MOST_IN_PAIRS = 32
RESULTS_BYTES = 6 * 2**20  # of modules that wait for others before them in the pool
MAPPED_BYTES = 128 * 2**20  # of files that may come to be in memory before they are given back
AROUND = 64 * 2**10  # what the system maps around a place that is touched


def overlap(pool: Pool, *, modules: bool = False, device: str | torch.device | None = None) -> Overlap:
    """Compares every pair of adapters: the cosine of their updates and the overlap of their column spaces.

    With ``⟨X, Y⟩ = Σ_ab X_ab Y_ab`` and orthonormal bases ``U_i [n, q_i]`` of the column spaces, MATH (13) and (14):

        cosine(i, j)   = ⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖ ‖ΔW_j‖)       in [-1, 1]
        subspace(i, j) = ‖U_iᵀ U_j‖_F² / min(q_i, q_j)         in [0, 1]

    Args:
        pool: the ``k`` adapters. A pair is compared in the modules that both have.
        modules: keep both matrices of every module, too.
        device: where to compute: ``"cuda"``, ``"cuda:1"``, ``"cpu"``; by default where the pool is.

    Returns:
        :class:`Overlap`: ``names`` and, in their order, ``cosine`` and ``subspace``: float64 ``[k, k]`` over all
        modules, NaN where a pair has no module in common or a zero update; 1 of an adapter that is not zero with
        itself. ``cosine`` sums its three products over the modules first; ``subspace`` is the mean over the modules.
        ``norms [k]`` are the ``‖ΔW_i‖`` of all modules. ``modules`` is ``{module: (cosine, subspace)}`` if asked for,
        of modules that two adapters have. ``notices`` are those of the pool and the notes of its adapters.

    Up to 32 adapters are compared in float64. More are compared by products of orthonormal float32 columns: both
    numbers of a pair are then known to 1e-6. (Inside ``with gram:`` of a :class:`fastlora.PoolGram` its blocks serve
    pools of any size.)

    Raises:
        InputError: adapters on different devices, a device that cannot be used.
        NonFiniteError: a factor that holds NaN or Inf, by adapter and module.

    Cost: one read of all factors and ``(n + m)(Σr)²`` operations a module, memory ``O(k²)`` and the stacked factors of
    one module (up to 32 adapters: Gram blocks ``(Σr)²``).
    """
    return pool_overlap(on_device(pool, device), modules)


@paused_collector()
def pool_overlap(pool: Pool, modules: bool = False) -> Overlap:
    """Both similarities of every pair, from one read of the factors, or of the blocks that the Gram cache in use
    has."""
    k = len(pool)
    products, shares, counts = (torch.zeros(k, k, dtype=torch.float64) for _ in range(3))
    squares = torch.zeros(k, k, dtype=torch.float64)  # Σ‖ΔW_i‖² over the modules that j has too
    norms = torch.zeros(k, dtype=torch.float64)
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for found in _compared(pool):
        index, own = torch.tensor(found.members), found.inner.diagonal()
        at = (index[:, None], index)
        known = found.subspace.isfinite()
        norms[index] += found.norms.square()
        for total, own_part in (
            (products, found.inner),
            (squares, own[:, None]),
            (shares, torch.where(known, found.subspace, 0.0)),
            (counts, known),
        ):
            if len(index) < k:
                total[at] += own_part
            else:  # in place: places of all would be copied to and fro
                total += own_part
        if modules and len(found.members) > 1:
            cosine, space = (torch.full((k, k), torch.nan, dtype=torch.float64) for _ in range(2))
            lengths = own.sqrt()
            cosine[at], space[at] = found.inner / (lengths[:, None] * lengths), found.subspace
            kept[found.module] = (cosine, space)
    cosine, subspace = products / (squares.sqrt() * squares.mT.sqrt()), shares / counts
    changes = (norms > 0).nonzero().flatten()
    cosine[changes, changes] = subspace[changes, changes] = 1.0
    ordered = {m: kept[m] for m in pool.modules if m in kept}
    bases = {a.name: a.base.model for a in pool.adapters if a.base.model is not None}
    return Overlap(list(pool.names), cosine, subspace, norms.sqrt(), ordered, tuple(pool.told), bases)


def _compared(pool: Pool) -> Iterator[ModulePairs]:
    """Every module, in the order of the pool; ranks that work together share some modules at a time, of which all get
    the results. What was mapped of the files is given back now and then."""
    k = len(pool)
    compare = _in_pairs if k <= MOST_IN_PAIRS or entered() else all_pairs
    most = RESULTS_BYTES if ranks.current() is None else PART_BYTES
    files: MappedFiles | None = None
    mapped = 0
    for some in split_to_fit([2 * 8 * k * k] * len(pool.modules), most):
        part = PoolPart(pool.names, list(pool.adapters), [pool.modules[i] for i in some])

        def work(part: PoolPart = part) -> dict[str, ModulePairs]:
            return {found.module: found for found in compare(part)}

        pairs = among_ranks.each("comparing", work, pool.adapters)
        yield from (pairs.pop(m) for m in part.modules)
        touched = sources(a.updates[m] for m in part.modules for a in pool.adapters if m in a.updates)
        mapped += sum(max(x.nbytes, AROUND) for x in touched)
        if mapped > MAPPED_BYTES:
            if files is None:
                files = MappedFiles(sources(u for a in pool.adapters for u in a.updates.values()))
            files.give_back()
            mapped = 0


def _in_pairs(pool: PoolView) -> Iterator[ModulePairs]:
    """Every module of this rank from float64 Gram blocks of all pairs."""
    for part in parts(pool, "comparing", rtol_of=rtol_or_default(None), least=1, stream=current(), shared=True):
        blocks = read_chain_blocks(part, "left", "pairs")
        inner, subspace = (x.cpu() for x in _similarities(blocks, part.group.rtols))
        for g, module in enumerate(part.modules):
            norms = inner[g].diagonal().clamp(min=0).sqrt()
            yield ModulePairs(module, part.group.members, inner[g], subspace[g], norms)


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
