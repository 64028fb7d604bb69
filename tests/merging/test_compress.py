"""Best low-rank approximation against the dense truncated SVD."""

from __future__ import annotations

import pools
import pytest
import torch
from builders import gaussian
from pools import MODULE, Part
from tolerances import FLOAT64, ROOT64, SUBSPACE64, WEAK64
from torch import Tensor

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.engine import spectrum
from fastlora.engine.spectrum import singular_forms


def graded(r: int = 8, base: float = 10.0, dtype: torch.dtype = torch.float64) -> Part:
    """Singular values ``1, 1/base, …`` in factors that show nothing of it."""
    sigma = base ** -torch.arange(r, dtype=torch.float64)
    x = pools.mixing(r, seed=3)
    left = pools.orthonormal(60, r, 1) * sigma.sqrt() @ x
    right = torch.linalg.inv(x) @ (sigma.sqrt()[:, None] * pools.orthonormal(45, r, 2).mT)
    return left.to(dtype), right.to(dtype), 3.0


def random(r: int = 9) -> Part:
    return gaussian(60, r, seed=7), gaussian(r, 45, seed=8), -0.5


PARTS: dict[str, Part] = {
    "random": random(),
    "graded": graded(6, 4.0),
    "graded float32": graded(6, 4.0, torch.float32),
    "deficient left": pools.deficient_left(1)[0],
    "deficient right": pools.deficient_right(1)[0],
    "wide": pools.wide(1)[0],
    "repeated": (pools.orthonormal(30, 5, 1), pools.orthonormal(20, 5, 2).mT.contiguous(), 1.0),
    "rank one": (gaussian(20, 1, seed=1), gaussian(1, 12, seed=2), 2.0),
}


def adapter(part: Part) -> Adapter:
    return pools.make_adapter("a", {MODULE: part})


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_rank(part: Part, rank: int) -> None:
    """As near as the best one of this rank, by Eckart and Young; the subspace itself may not be unique."""
    dense = pools.dense(part)
    result = fl.compress(adapter(part), rank)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    real = s[s > 1e-6 * s[0]]
    assert result.update(MODULE).rank == min(rank, len(real))
    got = pools.exact(result.update(MODULE))
    best = float(s[rank:].norm())
    assert float((dense - got).norm()) <= best * (1 + SUBSPACE64) + SUBSPACE64 * float(s[0])
    if rank >= len(real) or float(s[rank - 1] - s[rank]) > 1e-3 * float(s[0]):
        torch.testing.assert_close(got, (u[:, :rank] * s[:rank]) @ vh[:rank], rtol=0, atol=SUBSPACE64 * float(s[0]))
    retained = float(s[:rank].square().sum() / s.square().sum())
    assert result.details["retained_energy"][MODULE] == pytest.approx(retained, abs=FLOAT64)  # type: ignore[index]
    assert result.provenance["retained_energy"] == pytest.approx(retained, abs=FLOAT64)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("energy", [0.3, 0.77, 0.9, 1.0])
def test_energy(part: Part, energy: float) -> None:
    """The fewest directions with this share."""
    s = torch.linalg.svdvals(pools.dense(part))
    shares = s.square().cumsum(0) / s.square().sum()
    result = fl.compress(adapter(part), energy=energy)
    if energy < 1:
        assert result.update(MODULE).rank == int((shares < energy - FLOAT64).sum()) + 1
        assert result.details["retained_energy"][MODULE] >= energy - FLOAT64  # type: ignore[index]
    else:
        assert result.update(MODULE).rank == int((s > 1e-6 * s[0]).sum())  # the noise floor of float32


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_the_left_factor_is_orthonormal(part: Part) -> None:
    left, _ = pools.materialise([fl.compress(adapter(part), 4).update(MODULE)], torch.float64)[0]
    torch.testing.assert_close(left.mT @ left, torch.eye(left.shape[1], dtype=torch.float64), rtol=0, atol=WEAK64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("base", [2.0, 10.0])
def test_singular_values(base: float, dtype: torch.dtype) -> None:
    """To 1e-12 of the largest where ``σ > 1e-3 σ_max``: ``σ²`` comes with an error of 1e-16, so ``σ`` with 1e-16/σ."""
    part = graded(8, base, dtype)
    exact = torch.linalg.svdvals(pools.dense(part))[:8]
    sigma = singular_forms("a", adapter(part).updates)[MODULE].sigma
    known = exact > 1e-3 * exact[0]
    assert float((sigma - exact)[known].abs().max()) <= FLOAT64 * float(exact[0])
    assert float((sigma - exact).abs().max()) <= ROOT64 * float(exact[0])


def test_singular_values_of_many_modules_are_those_of_each() -> None:
    shapes = {"x": (30, 3, 20), "y": (20, 5, 30), "z": (9, 3, 9)}
    parts = {m: (gaussian(n, r, seed=n), gaussian(r, c, seed=c), 1.5) for m, (n, r, c) in shapes.items()}
    forms = singular_forms("a", pools.make_adapter("a", parts).updates)
    assert list(forms) == list(shapes)
    for m, part in parts.items():
        alone = singular_forms("a", pools.make_adapter("a", {m: part}).updates)[m]
        assert torch.equal(forms[m].sigma, alone.sigma) and torch.equal(forms[m].T, alone.T)
        assert forms[m].norm == pytest.approx(float(pools.dense(part).norm()), rel=FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_modules_that_are_alike_are_cut_as_each_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of two adapters, three modules of one rank, which are cut together."""
    total = sum_of_two(dtype)
    together = fl.compress(total, 4)
    monkeypatch.setattr(spectrum, "_cut_alike", lambda *_: None)
    alone = fl.compress(total, 4)
    assert together.details == alone.details
    for m in total.modules:
        one, other = together.update(m), alone.update(m)
        assert (one.B.rank, one.A.rank, one.scaling, one.noise) == (4, 4, other.scaling, other.noise)
        for got, wanted in zip(pools.materialise([one], dtype)[0], pools.materialise([other], dtype)[0], strict=True):
            assert torch.equal(got, wanted)


def test_modules_that_are_cut_to_different_ranks() -> None:
    total = sum_of_two(torch.float32)
    result = fl.compress(total, energy=0.6)
    for m in total.modules:
        s = torch.linalg.svdvals(pools.exact(total.update(m)))
        shares = s.square().cumsum(0) / s.square().sum()
        assert result.update(m).rank == int((shares < 0.6 - FLOAT64).sum()) + 1
    assert len({result.update(m).rank for m in total.modules}) > 1


def sum_of_two(dtype: torch.dtype) -> Adapter:
    """Three modules, each with its own spectrum."""
    decays = {"x": 1.0, "y": 2.0, "z": 5.0}

    def part(seed: int, decay: float, r: int) -> Part:
        sizes = decay ** -torch.arange(r, dtype=torch.float64)
        return (gaussian(30, r, seed=seed) * sizes).to(dtype), gaussian(r, 20, seed=seed + 1).to(dtype), 1.5

    adapters = [
        pools.make_adapter(n, {m: part(10 * i + j, d, r) for j, (m, d) in enumerate(decays.items())})
        for i, (n, r) in enumerate((("a", 3), ("b", 5)))
    ]
    return adapters[0] - 2.0 * adapters[1]


@pytest.mark.parametrize("part", [
    (torch.zeros(20, 3), gaussian(3, 12, seed=2), 2.0), (gaussian(20, 3, seed=1), torch.zeros(3, 12), 2.0),
    (gaussian(20, 3, seed=1), gaussian(3, 12, seed=2), 0.0),
], ids=["zero B", "zero A", "zero scaling"])  # fmt: skip
def test_a_zero_update_has_no_direction(part: Part) -> None:
    result = fl.compress(adapter(part), 2)
    assert result.update(MODULE).rank == 0
    assert result.details["retained_energy"] == {MODULE: 1.0}
    assert float(result.delta(MODULE).abs().max()) == 0.0


def test_svd_merge_is_the_best_approximation_of_the_sum() -> None:
    parts = [random(), graded(6, 4.0, torch.float32), (gaussian(60, 2, seed=11), gaussian(2, 45, seed=12), 1.0)]
    weights = {"a0": 0.5, "a1": -2.0, "a2": 1.0}
    total = sum(
        (w * pools.dense(p) for w, p in zip(weights.values(), parts, strict=True)), torch.zeros(60, 45).double()
    )
    assert isinstance(total, Tensor)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    for rank in (None, 2, 12):
        merged = fl.merge(pools.make_pool(parts), weights, method="svd", rank=rank)
        q = rank or 9
        assert merged.update(MODULE).rank == q
        torch.testing.assert_close(
            pools.exact(merged.update(MODULE)), (u[:, :q] * s[:q]) @ vh[:q], rtol=0, atol=WEAK64 * float(s[0])
        )
    whole = fl.merge(pools.make_pool(parts), weights, method="svd", energy=1.0)
    torch.testing.assert_close(pools.exact(whole.update(MODULE)), total, rtol=0, atol=WEAK64 * float(s[0]))


@pytest.mark.parametrize(("arguments", "message"), [
    ({}, "give rank=N or energy=X"), ({"rank": 0}, "rank=0 must be at least 1"),
    ({"energy": 0.0}, "energy=0.0 must be above 0"), ({"energy": 1.1}, "energy=1.1 must be above 0"),
])  # fmt: skip
def test_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(fl.InputError, match=message):
        fl.compress(adapter(random()), **arguments)  # type: ignore[arg-type]


def test_non_finite_input_is_named() -> None:
    left, right, s = random()
    left[3, 3] = torch.nan
    with pytest.raises(fl.InputError, match=f"adapter 'a': lora_B of {MODULE} holds NaN or Inf"):
        fl.compress(adapter((left, right, s)), 2)
