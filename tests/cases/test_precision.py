"""What stored numbers say is not lost: columns, small directions, small terms, small entries, unbalanced factors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pools
import pytest
import torch
from builders import gaussian
from command import done
from pools import MODULE, Part, make_adapter
from tolerances import FLOAT32, GRAM64
from torch import Tensor

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.core.data import Extra

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = DTYPES[1:]
# Both factors rounded to float16 once, 2⁻¹¹ of every entry, and as much again for entries below its normal numbers.
FLOAT16 = 2e-3


def relative(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


def dense(adapter: Adapter) -> Tensor:
    return pools.exact(adapter.update(MODULE))


# ---- columns of parts -----------------------------------------------------------------------------------------------


def with_common_columns(dtype: torch.dtype, n: int, m: int, rank: int = 8) -> fl.Pool:
    """Two adapters with two common directions, whose other directions grow weaker and weaker."""
    common = gaussian(n, 2, seed=1, dtype=torch.float64)
    strength = torch.logspace(0, -1.3, rank, dtype=torch.float64)
    parts = []
    for i in range(2):
        left = gaussian(n, rank, seed=10 + i, dtype=torch.float64)
        left[:, :2] = common + 0.1 * left[:, :2]
        right = gaussian(rank, m, seed=20 + i, dtype=torch.float64) / m**0.5
        parts.append((0.01 * left * strength, right, 2.0))
    return pools.make_pool(pools.cast(parts, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 2048), (300, 40), (40, 300)], ids=str)
def test_columns_of_a_part_are_its_columns(dtype: torch.dtype, shape: tuple[int, int], tmp_path: Path) -> None:
    """A column of a wide module is far shorter than the singular values whose rounding says what is a direction."""
    parts = fl.decompose(with_common_columns(dtype, *shape), 0.5)
    unique = parts.unique_of("a0")
    assert parts.report.rows[0].shared > 0
    columns = dense(unique).norm(dim=0)
    found = fl.dipm.decouple(unique, "column").magnitudes[MODULE]
    assert float((found / columns - 1).abs().max()) < GRAM64 * 1e3  # of columns that the removal made ten times shorter
    other = make_adapter("c", {MODULE: (gaussian(shape[0], 8, seed=5), gaussian(8, shape[1], seed=6), 1.0)})
    operator = fl.dipm.shift(other, parts.pool["a1"], 1e-9)  # next to nothing
    assert relative(dense(fl.modulate(unique, operator)), dense(unique)) < FLOAT32
    saved = fl.load(unique.save(tmp_path / "unique", dtype=torch.float32))
    assert relative(dense(fl.modulate(saved, operator)), dense(unique)) < FLOAT32


def test_columns_that_are_rounding_stay_zero() -> None:
    """Everything is shared: what is left of the columns is the rounding of what they were computed from."""
    part = (gaussian(60, 4, seed=1), gaussian(4, 90, seed=2), 1.0)
    unique = fl.decompose(pools.make_pool([part, part]), 0.5).unique_of("a0")
    assert not fl.dipm.decouple(unique, "column").magnitudes[MODULE].any()
    assert not fl.dipm.decouple(unique, "matrix").magnitudes[MODULE].any()
    assert not fl.dipm.decouple(unique, "component").magnitudes[MODULE].any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("granularity", ["column", "component", "matrix"])
def test_small_parts_of_large_adapters_have_magnitudes(dtype: torch.dtype, granularity: str) -> None:
    """What is unique is below the rounding of the dtype, relative to the largest direction, and stored exactly."""
    u, v = pools.orthonormal(80, 4, 1), pools.orthonormal(120, 4, 2)
    sigma = torch.tensor([1.0, *[0.3 * torch.finfo(dtype).eps] * 3], dtype=torch.float64)
    pool = pools.make_pool(pools.cast([(u * sigma, v.mT, 1.0), (u[:, :1], v[:, :1].mT, 1.0)], dtype))
    unique = fl.decompose(pool, 0.5).unique_of("a0")
    sizes = fl.dipm.decouple(unique, granularity).magnitudes[MODULE]
    assert float(sizes.norm()) == pytest.approx(float(dense(unique).norm()), rel=FLOAT32)


# ---- best approximations of half-precision adapters -----------------------------------------------------------------


def long_tail(dtype: torch.dtype, rank: int = 24) -> Part:
    """A few large directions, many below the rounding of the dtype."""
    sigma = torch.full((rank,), 0.6 * max(1e-6, torch.finfo(dtype).eps), dtype=torch.float64)
    sigma[:3] = torch.tensor([1.0, 0.5, 0.3])
    u, v = pools.orthonormal(90, rank, 1), pools.orthonormal(70, rank, 2)
    return pools.cast([(u * sigma, v.mT.contiguous(), 3.0)], dtype)[0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_rank_that_is_large_enough_keeps_everything(dtype: torch.dtype) -> None:
    part = long_tail(dtype)
    cut = make_adapter("a", {MODULE: part}).compress(24)
    assert relative(dense(cut), pools.dense(part)) < FLOAT32
    assert cut.provenance["retained_energy"] == pytest.approx(1.0, abs=1e-12)  # what is below 1e-6 of the largest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_least_the_share_of_the_energy_is_kept(dtype: torch.dtype) -> None:
    part = long_tail(dtype)
    squares = torch.linalg.svdvals(pools.dense(part)).square()
    tail = squares[3:].sum() / squares.sum()
    for share in (float(1 - 0.5 * tail), 0.999, 1.0):
        cut = make_adapter("a", {MODULE: part}).compress(energy=share)
        kept = 1 - relative(dense(cut), pools.dense(part)) ** 2
        assert kept >= share - 1e-10  # rounding below 1e-6 of the largest, 24 times
        assert cut.details["retained_energy"][MODULE] == pytest.approx(kept, abs=1e-10)  # type: ignore[index]


SUMS: dict[str, Callable[[fl.Pool, dict[str, float]], Adapter]] = {
    "merge": lambda pool, w: fl.merge(pool, w, rank=12),
    "PoolGram.merge": lambda pool, w: fl.PoolGram(pool).merge(w, rank=12),
    "sum": lambda pool, w: Adapter.weighted_sum([(w[n], pool[n]) for n in pool.names]).compress(12),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("way", SUMS)
def test_terms_of_a_small_weight_are_in_the_sum(dtype: torch.dtype, way: str) -> None:
    parts = pools.cast([(gaussian(90, 6, seed=i), gaussian(6, 70, seed=9 + i), 2.0) for i in range(2)], dtype)
    pool, weight = pools.make_pool(parts), 0.5 * torch.finfo(dtype).eps
    found = dense(SUMS[way](pool, {"a0": 1.0, "a1": weight}))
    first, second = (pools.dense(p) for p in parts)
    assert relative(found - first, weight * second) < FLOAT32  # nothing is rounded yet


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_part_compressed_is_the_part(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also where it lies below the rounding of the dtype, relative to what it came from."""
    u, v = pools.orthonormal(80, 4, 1), pools.orthonormal(70, 4, 2)
    sigma = torch.tensor([1.0, *[0.4 * torch.finfo(dtype).eps] * 3], dtype=torch.float64)
    pool = pools.make_pool(pools.cast([(u * sigma, v.mT, 1.0), (u[:, :1], v[:, :1].mT, 1.0)], dtype))
    unique = fl.decompose(pool, 0.5).unique_of("a0")
    saved = fl.load(unique.save(tmp_path / "unique", dtype=torch.float32))
    for cut in (unique.compress(4), saved.compress(4), unique.compress(energy=1.0), (1e-5 * unique).compress(4) * 1e5):
        lost = (dense(cut) - dense(unique)).norm()
        assert float(lost) < 1e-7  # of the largest singular value that it came from: rounding of the arithmetic
    # As a direction of its own it is not significant: in bfloat16 it may be the rounding of the whole.
    assert fl.decompose(fl.Pool([unique, pool["a1"]]), 0.5).report.rows[0].directions == (0, 1)


# ---- float16 results ------------------------------------------------------------------------------------------------


def small(size: float, dtype: torch.dtype, count: int = 2, rank: int = 6) -> list[Part]:
    """Updates whose ``B`` has entries of this size beside an ordinary ``A``, with the scaling of image trainers."""
    parts = []
    for i in range(count):
        left = size * gaussian(48, rank, seed=i, dtype=torch.float64)
        parts.append((left, 0.2 * gaussian(rank, 36, seed=9 + i, dtype=torch.float64), 1 / 128))
    return pools.cast(parts, dtype)


def merged(method: str, **given: object) -> Callable[[fl.Pool], Adapter]:
    return lambda pool: fl.merge(pool, {"a0": 0.1, "a1": 0.3}, method=method, **given)  # type: ignore[arg-type]


RESULTS: dict[str, Callable[[fl.Pool], Adapter]] = {
    "cat": merged("cat"),
    "svd": merged("svd", rank=12),
    "slerp": merged("slerp"),
    "pem": merged("pem"),
    "iso_c": merged("iso_c", rank=4),
    "ties": merged("ties", rank=20),
    "PoolGram": lambda pool: fl.PoolGram(pool).merge({"a0": 0.1, "a1": 0.3}, rank=12),
    "compose": lambda pool: fl.compose("0.1*a - 0.2*b", {"a": pool["a0"], "b": pool["a1"]}),
    "compress": lambda pool: pool["a0"].compress(3),
    "itself": lambda pool: pool["a0"],
    "scaled": lambda pool: -0.1 * pool["a0"],
    "unique": lambda pool: fl.decompose(pool, 0.1).unique_of("a0"),
    "shared": lambda pool: fl.decompose(pool, 0.1).shared,
    "columns": lambda pool: fl.modulate(pool["a0"], fl.dipm.interpolate(pool["a1"], 0.3)),
    "components": lambda pool: fl.modulate(pool["a0"], fl.dipm.interpolate(pool["a1"], 0.3), granularity="component"),
    "factor": lambda pool: fl.modulate(pool["a0"], fl.dipm.interpolate(pool["a1"], 0.3), on="B"),
}


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-5], ids=str)
@pytest.mark.parametrize("way", RESULTS)
def test_float16_results_have_their_digits(way: str, size: float, tmp_path: Path) -> None:
    pool = pools.make_pool(small(size, torch.bfloat16))
    result = RESULTS[way](pool)
    right = dense(result)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = fl.load(result.save(tmp_path / "out", dtype="float16"))
        B, A = result.tensors("float16")[MODULE]
    assert {t.source.dtype for f in (saved.update(MODULE).B, saved.update(MODULE).A) for t in f.terms} == {B.dtype}
    assert relative(dense(saved), right) < FLOAT16
    assert relative(B.double() @ A.double(), right) < FLOAT16


def test_a_whole_decomposition_has_its_digits_in_float16(tmp_path: Path) -> None:
    parts = fl.decompose(pools.make_pool(small(1e-4, torch.float16)), 0.1, mode="pairs")
    parts.save(tmp_path / "out", dtype="float16")
    for place, part in parts.adapters().items():
        assert relative(dense(fl.load(tmp_path / "out" / place)), dense(part)) < FLOAT16


def test_experts_embeddings_and_convolutions_have_their_digits_in_float16() -> None:
    B, A, s = small(1e-5, torch.float32, 1)[0]
    given = {"embed": (B, A, s), "conv": (B[:, :, None, None], A.reshape(6, 4, 3, 3), s), "linear": (B, A, s)}
    adapter = Adapter.from_tensors(given, embeddings=["embed"])
    for left, right in adapter.tensors("float16").values():
        assert relative(left.flatten(1).double() @ right.flatten(1).double(), pools.dense((B, A, s))) < FLOAT16


@pytest.mark.parametrize("rows", ["all", "sparse", "uneven"])
def test_long_factors_have_their_digits_in_float16(rows: str) -> None:
    """Of which a few rows are looked at first: what these do not show is found all the same."""
    n, m = 3001, 2000
    left, right = gaussian(n, 5, seed=1), gaussian(5, m, seed=2)
    if rows == "sparse":  # nothing is where a sample may look
        left[1:] *= (torch.arange(1, n) % 64 == 63)[:, None]
        left[0] = 0.0
    if rows == "uneven":
        left *= torch.where(torch.arange(n) % 500 == 0, 1e3, 1.0)[:, None]
    for size in (1.0, 1e-4, 1e-6):
        B, A = Adapter.from_tensors({MODULE: (size * left, 0.01 * right)}).tensors("float16")[MODULE]
        assert relative(B.double() @ A.double(), pools.dense((size * left, 0.01 * right, 1.0))) < FLOAT16


@pytest.mark.parametrize("power", [4, 14, 24])
def test_columns_of_many_sizes_have_their_digits_in_float16(power: int) -> None:
    """Every column is balanced by itself where one power of two does not serve them all."""
    B, A, s = small(1e-3, torch.float32, 1)[0]
    balance = torch.logspace(-power, power, B.shape[1], base=2.0)
    found = Adapter.from_tensors({MODULE: (B * balance, A / balance[:, None], s)}).tensors("float16")[MODULE]
    assert relative(found[0].double() @ found[1].double(), pools.dense((B, A, s))) < FLOAT16


def test_large_weights_no_longer_overflow_beside_small_factors() -> None:
    B, A, _ = small(1.0, torch.float32, 1)[0]
    left, right = Adapter.from_tensors({MODULE: (1e5 * B, 1e-5 * A)}).tensors("float16")[MODULE]
    assert relative(left.double() @ right.double(), pools.dense((B, A, 1.0))) < FLOAT16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_inside_the_range_keeps_its_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    parts = small(1.0, dtype)
    total = 0.5 * pools.make_pool(parts)["a0"] + pools.make_pool(parts)["a1"]
    B, A = total.tensors(dtype)[MODULE]
    assert torch.equal(A, torch.cat([a for _, a, _ in parts]))
    expected = torch.cat([w * s * b.double() for w, (b, _, s) in zip((0.5, 1.0), parts, strict=True)], 1)
    assert torch.equal(B, expected.to(dtype))
    for narrow in (torch.float32, torch.bfloat16):  # their range is that of the inputs, so nothing is looked at
        tiny = Adapter.from_tensors({MODULE: (1e-8 * parts[0][0].to(narrow), parts[0][1].to(narrow), 0.5)})
        assert torch.equal(tiny.tensors(narrow)[MODULE][1], parts[0][1].to(narrow))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_weights_leave_the_digits_of_every_dtype(dtype: torch.dtype) -> None:
    B, A, _ = small(1.0, torch.float32, 1)[0]
    left, right = (1e-42 * Adapter.from_tensors({MODULE: (B, 1e38 * A)})).tensors(dtype)[MODULE]
    assert relative(left.double() @ right.double(), 1e-4 * pools.dense((B, A, 1.0))) < 4 * torch.finfo(dtype).eps


def test_digits_that_are_lost_all_the_same_are_told(tmp_path: Path) -> None:
    B, A, s = small(1e-5, torch.float32, 1)[0]
    tiny = Adapter.from_tensors({MODULE: (B, 1e-5 * A, s), "other": (1e5 * B, A, s)}, name="tiny")
    with pytest.warns(UserWarning, match=rf"tiny: {MODULE} is too small for float16.*change its ΔW by .* %; save"):
        saved = fl.load(tiny.save(tmp_path / "out", dtype="float16"))
    assert relative(pools.exact(saved.update("other")), pools.dense((1e5 * B, A, s))) < FLOAT16
    with pytest.warns(UserWarning, match="too small for float16"):
        tiny.tensors("float16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.save(tmp_path / "wide", dtype="bfloat16")


def test_numbers_without_a_second_factor_are_told_in_float16(tmp_path: Path) -> None:
    """Task vectors, and what modules add to their outputs: nothing can share their size."""
    change = gaussian(9, 5, seed=1)
    tau = fl.TaskVector("tau", {"w": 1e-7 * change, "v": change})
    with pytest.warns(UserWarning, match=r"tau: w is too small for float16, which changes it by .* numbers zero; save"):
        tau.save(tmp_path / "tau.safetensors", dtype="float16")
    B, A, s = small(1.0, torch.float32, 1)[0]
    shifts = {f"{MODULE}.bias": Extra("delta", 1e-7 * gaussian(48, seed=1))}
    adapter = replace(make_adapter("a", {MODULE: (B, A, s)}), extras=shifts)
    with pytest.warns(UserWarning, match=rf"a: {MODULE}.bias is too small"):
        adapter.save(tmp_path / "a", dtype="float16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tau.save(tmp_path / "wide.safetensors")
        replace(adapter, extras={}).save(tmp_path / "b", dtype="float16")


def test_the_command_tells_what_float16_does_not_hold(tmp_path: Path) -> None:
    B, A, s = small(1e-5, torch.float32, 1)[0]
    Adapter.from_tensors({MODULE: (B, 1e-5 * A, s)}, name="tiny").save(tmp_path / "tiny")
    options = ("--rank", "2", "--dtype", "float16", "--out", "out")
    result = done("compress", "tiny", *options, cwd=tmp_path)
    assert "is too small for float16" in " ".join((result.out + result.err).split())
