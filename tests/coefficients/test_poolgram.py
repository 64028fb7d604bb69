"""Gram blocks kept in memory: the same bits as without, and no second read of any factor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pools
import pytest
import torch
from builders import gaussian
from compiled import COMPILED
from pools import MODULE
from tolerances import FLOAT32, FLOAT64, SUBSPACE64
from torch import Tensor

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.core import updates
from fastlora.core.factors import source_key
from fastlora.engine import gram, materialise
from fastlora.ops import dispatch
from fastlora.ops.dispatch import Kernel, resolve
from fastlora.ops.passes import GramJob


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[object]]:
    """How often each stored matrix is read by a Gram pass inside the block."""
    reads: Counter[object] = Counter()

    def spying(op: str, *arguments: object) -> Kernel:
        kernel = resolve(op, *arguments)
        if op != "gram_pass":
            return kernel

        def launch(jobs: list[GramJob]) -> None:
            reads.update(source_key(f) for job in jobs for f in job.factors)
            kernel.launch(jobs)

        return replace(kernel, launch=launch)

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "resolve", spying)
        patch.setattr(gram, "shortcut", lambda *_: None)  # else the core reads factors without any job
        yield reads


def ragged_pool(dtype: torch.dtype = torch.float32) -> fl.Pool:
    """Three adapters of unequal ranks; the second lacks a module, the third one has one alone."""
    first = pools.cast(pools.ragged(3), dtype)
    second = pools.cast(pools.planted(3, seed=9), dtype)
    alone = (gaussian(7, 3, seed=5, dtype=dtype), gaussian(3, 9, seed=6, dtype=dtype), -0.5)
    parts = [{MODULE: first[0], "other": second[0]}, {MODULE: first[1]}, {MODULE: first[2], "other": second[2]}]
    parts[2]["alone"] = alone
    return fl.Pool(pools.make_adapter(f"a{i}", p) for i, p in enumerate(parts))


def factors_of(adapter: Adapter) -> list[Tensor]:
    return [t for m in adapter.modules for t in materialise.materialise([adapter.updates[m].baked()], torch.float64)[0]]


def same_bits(one: Adapter, two: Adapter) -> None:
    assert one.modules == two.modules
    if not COMPILED:  # a block of torch's has other last bits beside others
        same_updates(one, two)
        return
    assert all(torch.equal(x, y) for x, y in zip(factors_of(one), factors_of(two), strict=True))


def same_updates(one: Adapter, two: Adapter, rtol: float = 1e-7) -> None:
    """Equal to rounding; of deficient factors, directions of size √u = 1e-8 beside the largest count too."""
    assert one.modules == two.modules
    for module in one.modules:
        x, y = pools.exact(one.update(module)), pools.exact(two.update(module))
        assert one.update(module).rank == two.update(module).rank
        assert float((x - y).norm()) <= rtol * float(y.norm()), module


WEIGHTS = [None, {"a0": 0.3, "a1": -2.0}, {"a2": 1.0}, {"a0": 1e-9, "a1": 1e9}, {}]
CUTS: list[dict[str, Any]] = [{}, {"rank": 2}, {"rank": 50}, {"energy": 0.6}, {"energy": 1.0}]


@pytest.mark.parametrize("kind", pools.POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_merges_with_many_weights_are_those_of_merge(kind: str, dtype: torch.dtype) -> None:
    pool = pools.make_pool(pools.cast(pools.POOLS[kind](3), dtype))
    gram = fl.PoolGram(pool)
    for weights in WEIGHTS:
        for cut in CUTS:
            found, expected = gram.merge(weights, **cut), fl.merge(pool, weights, **cut)
            same_updates(found, expected)
            for share in (lambda a: a.provenance["retained_energy"], lambda a: a.details["retained_energy"][MODULE]):
                assert share(found) == pytest.approx(share(expected), abs=SUBSPACE64)
            assert found.notes == expected.notes and found.dtype == expected.dtype and found.name == expected.name


def test_merges_of_modules_that_some_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ragged_pool()
    gram = fl.PoolGram(pool)
    with counted(monkeypatch) as reads:
        found = [gram.merge(w, rank=3) for w in ({"a0": 1.0, "a2": -0.5}, {"a1": 2.0})]
    assert not reads
    for one, weights in zip(found, ({"a0": 1.0, "a2": -0.5}, {"a1": 2.0}), strict=True):
        same_updates(one, fl.merge(pool, weights, rank=3))
    with pytest.raises(fl.InputError, match="weights name 'x'"):
        gram.merge({"x": 1.0})
    with pytest.raises(fl.InputError, match="a rank or a share"):
        gram.merge(rank=2, energy=0.5)
    with pytest.raises(fl.InputError, match="overflows: lower the weights"):
        gram.merge({"a0": 1e308, "a2": 1e308}, rank=2)


USES: list[Callable[[fl.Pool], Sequence[Adapter]]] = [
    lambda p: [fl.merge(p, {"a0": 0.3, "a1": -2.0, "a2": 0.0}, rank=3)],
    lambda p: [fl.merge(p, energy=0.8), fl.compress(p["a0"] + 0.5 * p["a2"], 2), fl.compress(p["a1"], 1)],
    lambda p: list(fl.decompose(p, 0.6).adapters().values()),
    lambda p: list(fl.decompose(p, 0.2, chain="mean", side="right").adapters().values()),
    lambda p: list(fl.decompose(p, 0.5, mode="pairs", rank=2).adapters().values()),
    lambda p: list(fl.decompose(p, 0.5, mode="iterative", target="a2").adapters().values()),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use", USES)
def test_cached_blocks_give_the_same_bits_and_read_nothing(
    use: Callable[[fl.Pool], Sequence[Adapter]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = ragged_pool(dtype)
    expected = use(pool)
    with counted(monkeypatch) as reads:
        gram = fl.PoolGram(pool)
    stored = {source_key(s) for s in updates.sources(u for a in pool.adapters for u in a.updates.values())}
    assert set(reads) == stored and set(reads.values()) == {1}
    with counted(monkeypatch) as reads, gram:
        found = use(pool)
    assert not reads
    for one, two in zip(found, expected, strict=True):
        same_bits(one, two)


def test_methods_use_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ragged_pool()
    gram = fl.PoolGram(pool)
    with counted(monkeypatch) as reads:
        gram.merge({"a0": 2.0}, rank=2)
        gram.decompose(0.3, mode="pairs")
        gram.overlap()
    assert not reads
    with counted(monkeypatch) as reads:
        fl.merge(pool)  # outside: no cache
    assert reads


def test_on_the_reference_backend() -> None:
    pool = ragged_pool()
    expected = fl.merge(pool, rank=3)
    with fl.use_backend("reference"):
        found = fl.PoolGram(pool).merge(rank=3)
    for module in pool.modules:
        x, y = found.delta(module), expected.delta(module)
        assert float((x - y).norm()) <= FLOAT32 * float(y.norm())


def test_inner_products_and_norms_are_the_dense_ones() -> None:
    pool = ragged_pool()
    gram = fl.PoolGram(pool)
    total = torch.zeros(3, 3, dtype=torch.float64)
    for module in pool.modules:
        shape = next(a.updates[module].shape for a in pool.adapters if module in a)
        deltas = [pools.exact(a.updates[module]) if module in a else torch.zeros(shape) for a in pool.adapters]
        dense = torch.tensor([[float((x * y).sum()) for x in deltas] for y in deltas], dtype=torch.float64)
        torch.testing.assert_close(gram.inner(module), dense, rtol=FLOAT64, atol=SUBSPACE64)
        total += dense
    torch.testing.assert_close(gram.inner(), total, rtol=FLOAT64, atol=SUBSPACE64)
    assert list(gram.norms().values()) == pytest.approx(total.diagonal().sqrt().tolist(), rel=FLOAT64)
    with pytest.raises(fl.InputError, match="has no module 'x'"):
        gram.inner("x")


def test_a_pool_of_lazy_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums and parts of decompositions share stored matrices, which are read once."""
    pool = ragged_pool()
    total = replace(pool["a0"] + 0.5 * pool["a1"], name="total")
    lazy = fl.Pool([total, fl.decompose(pool, 0.5).unique_of("a2"), pool["a0"]])
    expected = fl.merge(lazy, rank=2)
    gram = fl.PoolGram(lazy)
    with counted(monkeypatch) as reads:
        found = gram.merge(rank=2)
        with gram:
            inside = fl.merge(lazy, rank=2)
    assert not reads
    same_bits(inside, expected)
    same_updates(found, expected)


def test_nan_is_named() -> None:
    pool = ragged_pool()
    pool["a2"].updates["other"].A.terms[0].source[0, 0] = torch.nan
    with pytest.raises(fl.InputError, match="'a2': lora_A of other holds NaN"):
        fl.PoolGram(pool)


def test_blocks_of_other_factors_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed along the way would fill the memory: it is read again every time it is asked for."""
    gram, other = fl.PoolGram(ragged_pool()), ragged_pool()
    reads = []
    for _ in range(2):
        with counted(monkeypatch) as of_one, gram:
            fl.overlap(other)
        reads.append(of_one)
    assert reads[0] and reads[1] == reads[0]
