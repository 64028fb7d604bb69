"""Methods on cores against the same rule on dense matrices; ``iso_c`` against its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mixed
import pools
import pytest
import torch
from pools import MODULE
from torch import Tensor

import fastlora as fl
from fastlora.core.data import Extra
from fastlora.engine.blocks import read_pair_blocks
from fastlora.errors import NonFiniteError
from fastlora.merging.forms import cores
from fastlora.merging.forms.frames import Cut, Frames
from fastlora.runtime import memory

RULE = cores.method(summary="an example", source="this test")
WHOLE = {"energy": 1.0}

# Frames of ε²-graded Gram matrices are orthonormal to 1e-16/ε²; what is kept here has ε ≥ 1e-4 (see the pools), and
# float64 sums of a few hundred terms lose two digits more.
TOLERANCE = 1e-7


def rotation_free(stack: Tensor) -> Tensor:
    """``M_1 M_2ᵀ M_3 + ΣM_i − 2 M_4``: it commutes with rotations of rows and columns, and is not linear."""
    return stack[:, 0] @ stack[:, 1].mT @ stack[:, 2] + stack.sum(1) - 2 * stack[:, 3]


def summed(stack: Tensor, *, factor: float = 1.0) -> Tensor:
    """The scaled sum.

    Args:
        factor: of the sum
    """
    return factor * stack.sum(1)


def iso_by_definition(matrix: Tensor, rank: int | None, energy: float | None, noise: float) -> Tensor:
    """``σ̄ U_q V_qᵀ`` of one dense matrix, restricted to what is kept."""
    U, sigma, Vt = torch.linalg.svd(matrix, full_matrices=False)
    count = int((sigma > noise * sigma[0]).sum())
    if energy is not None:
        shares = sigma.square().cumsum(0) / sigma.square().sum()
        count = min(count, int((shares < energy * (1 - 1e-12)).sum()) + 1)
    count = min(count, rank or count)
    return sigma[:count].mean() * U[:, :count] @ Vt[:count] if count else torch.zeros_like(matrix)


def test_a_rule_on_cores_is_the_rule_on_dense_matrices() -> None:
    """Ragged ranks, gaps, a zero, a duplicate, all dtypes; a rank that keeps everything but noise."""
    pool = mixed.mixed_pool()
    with mixed.registered(RULE, rotation_free) as name:
        merged = fl.merge(pool, mixed.WEIGHTS, method=name, **WHOLE)
        assert merged.modules == pool.modules and merged.dtype == torch.float32 and merged.name == name
    for module in pool.modules:
        expected = rotation_free(mixed.dense(pool, module, mixed.WEIGHTS)[None])[0]
        dtypes = [d for a in pool.adapters if module in a for d in a.updates[module].dtypes()]
        # What a cut at the noise of the dtypes takes away is at most that, in every direction.
        bound = mixed.noise(dtypes) * float(torch.linalg.matrix_norm(expected, 2)) * min(expected.shape) ** 0.5
        assert float((pools.exact(merged.updates[module]) - expected).norm()) <= bound


@pytest.mark.parametrize("kind", pools.POOLS)
def test_rules_on_float64_pools(kind: str) -> None:
    pool = pools.make_pool(pools.POOLS[kind](4))
    weights = {"a0": 0.5, "a1": -1.0, "a2": 2.0, "a3": 0.0}
    expected = rotation_free(mixed.dense(pool, MODULE, weights)[None])[0]
    with mixed.registered(RULE, rotation_free) as name:
        assert mixed.distance(fl.merge(pool, weights, method=name, **WHOLE), MODULE, expected) <= TOLERANCE
        cut = fl.merge(pool, weights, method=name, rank=3)
    sigma = torch.linalg.svdvals(expected)
    best = float(sigma[3:].square().sum().sqrt())
    error = float((pools.exact(cut.updates[MODULE]) - expected).norm())
    # No matrix of rank 3 is nearer, and a gap between σ_3 and σ_4 is not needed for this.
    assert cut.updates[MODULE].rank <= 3 and best - 1e-9 <= error <= best + TOLERANCE * float(sigma[0])
    share = cut.details["retained_energy"][MODULE]  # type: ignore[index]
    assert share == pytest.approx(1 - best**2 / float(sigma.square().sum()), abs=1e-9)
    assert cut.provenance["retained_energy"] == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("kind", pools.POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_sum_of_the_cores_is_svd(kind: str, dtype: torch.dtype) -> None:
    pool = pools.make_pool(pools.cast(pools.POOLS[kind](3), dtype))
    weights = {"a0": 0.3, "a1": -2.0}
    with mixed.registered(RULE, summed) as name:
        for cut in ({}, {"rank": 2}, {"rank": 50}, {"energy": 0.6}):
            found, expected = (fl.merge(pool, weights, method=m, **cut) for m in (name, "svd"))
            assert found.updates[MODULE].rank == expected.updates[MODULE].rank
            assert mixed.distance(found, MODULE, pools.exact(expected.updates[MODULE])) <= TOLERANCE
            assert found.details["retained_energy"] == pytest.approx(expected.details["retained_energy"], abs=1e-9)
        doubled = fl.merge(pool, weights, method=name, factor=2.0, rank=2)
    assert (
        mixed.distance(doubled, MODULE, 2 * pools.exact(fl.merge(pool, weights, rank=2).updates[MODULE])) <= TOLERANCE
    )


@pytest.mark.parametrize("kind", pools.POOLS)
@pytest.mark.parametrize("cut", [{}, {"rank": 2}, {"energy": 1.0}, {"energy": 0.7}], ids=str)
def test_iso_c(kind: str, cut: dict[str, Any]) -> None:
    pool = pools.make_pool(pools.POOLS[kind](3))
    weights = {"a0": 0.5, "a1": -1.0, "a2": 2.0}
    rank = cut.get("rank") or (None if cut else max(u.rank for a in pool.adapters for u in a.updates.values()))
    total = mixed.dense(pool, MODULE, weights).sum(0)
    expected = iso_by_definition(total, rank, cut.get("energy"), 1e-6)
    merged = fl.merge(pool, weights, method="iso_c", **cut)
    assert merged.updates[MODULE].rank == int(torch.linalg.matrix_rank(expected))
    assert mixed.distance(merged, MODULE, expected) <= TOLERANCE
    sigma = torch.linalg.svdvals(pools.exact(merged.updates[MODULE]))[: merged.updates[MODULE].rank]
    assert float(sigma.max() - sigma.min()) <= TOLERANCE * float(sigma.max())
    assert "retained_energy" not in merged.provenance and "retained_energy" not in merged.details


def test_iso_c_of_all_dtypes_ranks_and_gaps() -> None:
    pool = mixed.mixed_pool()
    merged = fl.merge(pool, mixed.WEIGHTS, method="iso_c", rank=2)
    for module in pool.modules:
        total = mixed.dense(pool, module, mixed.WEIGHTS).sum(0)
        # Two leading directions, which lie far above the rounding of any dtype.
        assert mixed.distance(merged, module, iso_by_definition(total, 2, None, 1e-2)) <= TOLERANCE


def test_iso_c_of_what_is_zero_or_cancels() -> None:
    first = pools.make_adapter("a", {"wide": mixed.part("wide", 3, 1), "tall": mixed.part("tall", 2, 5)})
    opposite = pools.make_adapter("b", {"wide": mixed.part("wide", 3, 1, scaling=-1.0)})
    merged = fl.merge(fl.Pool([first, opposite]), method="iso_c")
    expected = iso_by_definition(mixed.dense(fl.Pool([first]), "tall").sum(0), 3, None, 1e-6)
    assert mixed.distance(merged, "tall", expected) <= TOLERANCE
    # Of a matrix minus itself rounding is left, and a flat spectrum would not make it a direction.
    assert merged.updates["wide"].rank == 0
    nothing = fl.merge(fl.Pool([first]), {"a": 0.0}, method="iso_c")
    assert [u.rank for u in nothing.updates.values()] == [0, 0]


def test_frames_are_orthonormal_and_cores_give_the_updates_back() -> None:
    pool = mixed.mixed_pool(dtype=torch.float64)
    weights = [mixed.WEIGHTS[n] for n in pool.names]
    seen = []
    for blocks in read_pair_blocks(pool):
        frames = Frames.of(blocks)
        stack = frames.cores(frames.scales(weights), len(pool))
        torch.testing.assert_close(stack.sum(1), frames.total(frames.scales(weights)), rtol=0, atol=1e-12)
        for g, module in enumerate(blocks.modules):
            seen.append(module)
            matrices = mixed.dense(pool, module, mixed.WEIGHTS)
            # Rotations of rows and columns change no inner product of two updates.
            inner, expected = (torch.einsum("iab,jab->ij", x, x) for x in (stack[g], matrices))
            torch.testing.assert_close(inner, expected, rtol=1e-10, atol=1e-10 * float(expected.max()))
    assert sorted(seen) == sorted(pool.modules)


@pytest.mark.parametrize("method", [name for name, m in fl.methods().items() if m.form == "cores"])
def test_results_do_not_depend_on_how_much_is_computed_at_once(method: str) -> None:
    shapes = {f"layer{i}": (9, 7) for i in range(20)}
    parts = [
        {m: (*mixed_factors(n, k, 60 * i + j), 1.0) for j, (m, (n, k)) in enumerate(shapes.items())} for i in range(3)
    ]
    pool = fl.Pool(pools.make_adapter(f"a{i}", p) for i, p in enumerate(parts))
    whole = fl.merge(pool, method=method, rank=2)
    with memory.bounded(1):
        parted = fl.merge(pool, method=method, rank=2)
    for module in shapes:
        assert torch.equal(pools.exact(whole.updates[module]), pools.exact(parted.updates[module]))


def mixed_factors(n: int, m: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randn(4, m, generator=generator)


def test_cuts() -> None:
    sigma = torch.tensor([[4.0, 2.0, 1.0, 1e-9], [3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)

    def counts(floor: float = 0.0, **cut: Any) -> list[int]:
        rows = torch.full((3,), 1e-6, dtype=torch.float64), torch.full((3,), floor, dtype=torch.float64)
        found: list[int] = Cut(*rows, **cut)(sigma).tolist()
        return found

    assert counts() == [3, 1, 0] and counts(floor=1.0) == [2, 1, 0] and counts(rank=2) == [2, 1, 0]
    assert counts(energy=16 / 21) == [1, 1, 0] and counts(energy=0.77) == [2, 1, 0] and counts(energy=1.0) == [3, 1, 0]
    assert counts(floor=3.5, energy=1.0) == [1, 0, 0]
    empty = torch.zeros(1, dtype=torch.float64)
    assert Cut(empty, empty, energy=0.5)(torch.zeros(1, 0, dtype=torch.float64)).tolist() == [0]


def wrong_shape(stack: Tensor) -> Tensor:
    return stack


def wrong_dtype(stack: Tensor) -> Tensor:
    return stack.sum(1).float()


def undefined(stack: Tensor) -> Tensor:
    return stack.sum(1) / 0.0


@pytest.mark.parametrize(("program", "error", "said"), [
    (wrong_shape, TypeError, r"method 'wrong_shape': a float64 \[1, 18, 18\] is needed, not torch.float64 \[1, 3,"),
    (wrong_dtype, TypeError, "a float64 .* is needed, not torch.float32"),
    (undefined, fl.InputError, f"method 'undefined': the result for {MODULE} is too large or not finite"),
])  # fmt: skip
def test_results_that_are_refused(program: Callable[..., Tensor], error: type[Exception], said: str) -> None:
    with mixed.registered(RULE, program) as name, pytest.raises(error, match=said):
        fl.merge(pools.make_pool(pools.planted(3)), method=name)


def test_inputs_that_are_refused() -> None:
    pool = pools.make_pool(pools.planted(3))
    for cut, said in (({"rank": 0}, "rank=0 must be at least 1"), ({"energy": 1.5}, "energy=1.5 must be above 0")):
        with pytest.raises(fl.InputError, match=said):
            fl.merge(pool, method="iso_c", **cut)
    with pytest.raises(fl.InputError, match="a rank or a share of the energy, not both"):
        fl.merge(pool, method="iso_c", rank=1, energy=0.5)
    with pytest.raises(fl.InputError, match="overflow: lower the weights"):
        fl.merge(pool, {"a0": 1e308, "a1": 1e308}, method="iso_c")
    for method in ("iso_c", "core", "knots"):
        with pytest.raises(
            fl.InputError, match=r"the weighted updates overflow: lower the weights \[1e\+200, 0.0, 0.0"
        ):
            fl.merge(pool, {"a0": 1e200}, method=method, **({"rank": 3} if method == "iso_c" else {}))
    with pytest.raises(fl.InputError, match=f"method 'knots': the result for {MODULE} is too large or not finite"):
        fl.merge(pool, {"a0": 1e149}, method="knots", rule="dare", density=0.01)
    with pytest.raises(fl.InputError, match="the weighted sum overflows: lower the weights"):
        fl.PoolGram(pool).merge({"a0": 1e200})
    bad = pools.planted(3)
    bad[1][1][2, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=f"adapter 'a1': lora_A of {MODULE} holds NaN or Inf"):
        fl.merge(pools.make_pool(bad), method="iso_c")


def test_what_stands_beside_the_updates_is_summed() -> None:
    pool = mixed.mixed_pool()
    biased = [
        fl.Adapter(a.name, a.updates, extras={"wide.bias": Extra("delta", torch.full((12,), i + 1.0))}, notes=(a.name,))
        for i, a in enumerate(pool.adapters)
    ]
    merged = fl.merge(fl.Pool(biased), {"first": 1.0, "half": 0.5}, method="iso_c")
    assert merged.extras["wide.bias"].tensor.tolist() == [1.0 + 1.5] * 12
    assert merged.notes[:5] == tuple(pool.names) and "zero has no weight and counts 0" in merged.notes
    assert merged.provenance["merge"] == "iso_c" and merged.provenance["parameters"] == {"rank": 9}
