"""Pools of many adapters, compared by tiles: against float64 Gram blocks of all pairs, and against dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pools
import pytest
import torch
from builders import gaussian
from tolerances import FLOAT32
from torch import Tensor

import fastlora as fl
from fastlora.analysis import overlap as module
from fastlora.analysis.all_pairs import all_pairs
from fastlora.engine import stacks

Part = tuple[Tensor, Tensor, float]


def part(i: int, n: int = 40, m: int = 30, dtype: torch.dtype = torch.float32) -> Part:
    """Every fourth shares its columns; ranks, scalings, dtypes and sizes differ."""
    r = 1 + i % 5
    B, A = gaussian(n, r, seed=i, dtype=torch.float64), gaussian(r, m, seed=100 + i, dtype=torch.float64)
    if i % 4 == 0:
        B = gaussian(n, r, seed=7, dtype=torch.float64) + 0.3 * B
    return B.to(dtype), (A * 10.0 ** (i % 7 - 3)).to(dtype), (-1.0) ** i * 2.0


def crowd(count: int = 40) -> fl.Pool:
    """Ragged, some in half precision; one is zero, one a multiple, one ill conditioned, one has a module alone."""
    adapters = []
    for i in range(count):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        modules = {"x": part(i, dtype=torch.float32 if dtype == torch.float16 else dtype)}
        if i % 3:
            modules["y"] = part(i + 50, 20, 60)
        if i == 11:
            modules["alone"] = part(3, 12, 8)
        if i == 5:
            modules = {m: (b, a * 0, s) for m, (b, a, s) in modules.items()}
        if i == 6:
            b, a, s = part(2)
            modules["x"] = b, a, 3 * s
        if i == 8:
            b, a, s = part(9)
            close = b[:, :1] + 1e-4 * b  # nearly parallel columns
            modules["x"] = close, a, s
        adapters.append(pools.make_adapter(f"a{i}", modules))
    return fl.Pool(adapters)


def compared(pool: fl.Pool, monkeypatch: pytest.MonkeyPatch, most: int) -> fl.Overlap:
    monkeypatch.setattr(module, "MOST_IN_PAIRS", most)
    return fl.overlap(pool, modules=True)


@pytest.mark.parametrize("bytes", [2**28, 8000], ids=["one block", "many blocks"])
def test_equal_to_pairs(bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = crowd()
    wanted = compared(pool, monkeypatch, 100)
    monkeypatch.setattr(stacks, "STACK_BYTES", bytes)
    monkeypatch.setattr(stacks, "ADAPTERS_OF_JOB", 32 if bytes > 8000 else 3)
    found = compared(pool, monkeypatch, 1)
    for x, y in ((found.cosine, wanted.cosine), (found.subspace, wanted.subspace)):
        torch.testing.assert_close(x, y, rtol=0, atol=FLOAT32, equal_nan=True)
    torch.testing.assert_close(found.norms, wanted.norms, rtol=FLOAT32, atol=0)
    assert list(found.modules) == list(wanted.modules) == ["x", "y"]
    for name in wanted.modules:
        for x, y in zip(found.modules[name], wanted.modules[name], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=FLOAT32, equal_nan=True)


def test_norms_and_products_are_dense_ones() -> None:
    pool = crowd(36)
    found = {pairs.module: pairs for pairs in all_pairs(pool)}
    assert set(found) == {"x", "y", "alone"}
    for name, pairs in found.items():
        deltas = [pool.adapters[i].delta(name).double() for i in pairs.members]
        norms = torch.stack([d.norm() for d in deltas])
        torch.testing.assert_close(pairs.norms, norms, rtol=FLOAT32, atol=0)
        inner = torch.stack([torch.stack([(x * y).sum() for y in deltas]) for x in deltas])
        assert bool(((pairs.inner - inner).abs() <= FLOAT32 * norms[:, None] * norms).all())


def test_same_bits_for_any_number_of_threads(threads: Callable[[int], None]) -> None:
    pool = crowd()
    results = []
    for n in (1, 2):
        threads(n)
        results.append(fl.overlap(pool))
    assert torch.equal(results[0].cosine.nan_to_num(), results[1].cosine.nan_to_num())
    assert torch.equal(results[0].subspace.nan_to_num(), results[1].subspace.nan_to_num())


def test_sums_of_matrices_and_cached_blocks() -> None:
    pool = crowd(34)
    total = pool["a1"] + pool["a2"]
    joined = fl.Pool([*pool.adapters, replace(total, name="total")])
    with fl.PoolGram(joined):
        cached = fl.overlap(joined)
    torch.testing.assert_close(fl.overlap(joined).cosine, cached.cosine, rtol=0, atol=FLOAT32, equal_nan=True)


def test_non_finite_input_is_named() -> None:
    adapters = [pools.make_adapter(f"a{i}", {"x": part(i)}) for i in range(40)]
    b, a, s = part(3)
    b = b.clone()
    b[1, 0] = torch.inf
    adapters[17] = pools.make_adapter("a17", {"x": (b, a, s)})
    with pytest.raises(fl.InputError, match="adapter 'a17': lora_B of x holds NaN or Inf"):
        fl.overlap(fl.Pool(adapters))
