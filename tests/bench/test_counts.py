"""What a decomposition must at least move and compute, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from builders import gaussian

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.bench import counts
from fastlora.bench.workloads import WORKLOADS, make_pool
from fastlora.core.factors import Factor
from fastlora.core.updates import Update
from fastlora.ops.gram import blocks_of

SHAPES = {"x": (10, 7), "y": (4, 3)}
RANKS = {"a": {"x": 2, "y": 2}, "b": {"x": 3}, "c": {"x": 1, "y": 1}}
SHARED = {"x": 1, "y": 0}


def adapter(name: str, ranks: dict[str, int], dtype: torch.dtype) -> Adapter:
    updates = {}
    for module, r in ranks.items():
        n, m = SHAPES[module]
        updates[module] = Update(
            Factor.of("B", gaussian(n, r, seed=1, dtype=dtype)),
            Factor.of("A", gaussian(r, m, seed=2, dtype=dtype)),
            1.0,
        )
    return Adapter(name, updates, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_small_pool_by_hand(dtype: torch.dtype) -> None:
    pool = fl.Pool(adapter(name, ranks, dtype) for name, ranks in RANKS.items())
    moved, operations = counts.decomposition(pool, adapter("shared", SHARED, dtype))
    # x: ranks 2, 3, 1. Read 6·10 of B and 6·7 of A, written 6·10 unique and 10 + 7 shared. y: ranks 2, 1, all alone.
    elements = (60 + 42 + 60 + 17) + (12 + 9)
    # A row of x: triangles 2·3 + 3·4 + 1·2, the first row 2·2·3 + 2·2·1, and neighbours 2·3·1. Of y: 6 + 2 and 4.
    gram = 10 * (20 + 16 + 6) + 7 * 20 + 4 * (8 + 4) + 3 * 8
    # One shared direction: B_1 T takes 2·2 a row, its products with H_i 2·6, the shared A 2·6 a column.
    combined = 10 * (4 + 12) + 7 * 12
    assert moved == elements * dtype.itemsize
    half = dtype == torch.float16
    assert operations == ({torch.float64: gram, torch.float32: combined} if half else {torch.float64: gram + combined})


def test_the_blocks_of_eight_adapters_of_rank_16() -> None:
    ranks = [16] * 8
    assert counts.gram_operations(1, ranks, blocks_of("chain", 8)) == 2 * (8 * 16 * 17 // 2 + 13 * 256) == 2 * 4416
    assert counts.gram_operations(1, ranks, blocks_of("diagonal", 8)) == 2 * 1088


def test_what_is_shared_is_what_was_planted() -> None:
    workload = WORKLOADS["llama2-7b-8x16"].head(1)
    moved, operations = counts.decomposition(pool := make_pool(workload), fl.decompose(pool, threshold=0.85).shared)
    n, wide = 4096, 8 * 16
    assert moved == 2 * n * (3 * wide + 2 * 4)
    assert operations == {torch.float64: 2 * n * (4416 + 1088), torch.float32: 2 * n * 4 * (16 + 2 * wide)}
