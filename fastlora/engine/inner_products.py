"""Inner products of the updates of a pool, ``⟨ΔW_i, ΔW_j⟩``, module by module and of all modules together."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.engine import shares
from fastlora.engine.blocks import PairBlocks, read_pair_blocks
from fastlora.engine.contracts import PoolView


def inner_products(pool: PoolView, label: str = "inner products") -> dict[str, Tensor]:
    """MATH (13) for every module of a pool, in its order: float64 ``[k, k]``, zero for adapters that lack the module.

    Two passes over the factors, less what the Gram cache in use has; ranks that work together share the modules.
    """

    def work() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for blocks in read_pair_blocks(pool, label, shared=True):
            found |= dict(zip(blocks.modules, of_pool(blocks, len(pool.adapters)).unbind(), strict=True))
        return found

    products = shares.each(label, work, pool.adapters)
    return {m: products[m] for m in pool.modules}


def summed(pool: PoolView, label: str = "inner products") -> Tensor:
    """:func:`inner_products` of all modules together, added up in the order of the pool: float64 ``[k, k]``."""
    found = list(inner_products(pool, label).values())
    return torch.stack(found).sum(0) if found else torch.zeros(len(pool.adapters), len(pool.adapters)).double()


def of_pool(blocks: PairBlocks, count: int) -> Tensor:
    """The inner products of blocks in the places of the ``count`` adapters of the pool: ``[g, k, k]``."""
    members = torch.tensor(blocks.members)
    inner = torch.zeros(len(blocks.modules), count, count, dtype=torch.float64)
    inner[:, members[:, None], members] = blocks.inner()
    return inner
