"""Directions that are zero, rounding, opposite, in the span of others or not unique."""

from __future__ import annotations

from pathlib import Path

import pools
import pytest
import torch
from builders import gaussian
from pools import MODULE, Part
from test_dipm import CHAINS, GRANULARITIES, SIDES, Chain, M, N, R, adapters, close, expected, got, part
from tolerances import SUMS32
from torch import Tensor

import fastlora as fl
from fastlora.reference import dipm as dense

pytestmark = pytest.mark.portable


@pytest.mark.parametrize("seed", range(4))  # the rounding is positive for some of them
def test_columns_in_the_kernel_of_b_are_zero(seed: int) -> None:
    """What is left of such a column is rounding, which no operator may blow up to a direction."""
    left, right, s = part(1, dtype=torch.float64)
    kernel = torch.cat([gaussian(3, seed=seed, dtype=torch.float64), -torch.ones(1, dtype=torch.float64)])
    left[:, 3] = left[:, :3] @ kernel[:3]
    right[:, 5:] = kernel[:, None] * gaussian(M - 5, seed=8, dtype=torch.float64)
    own, other, third = adapters((left, right, s), part(3), part(5))
    mu = fl.dipm.decouple(own).magnitudes[MODULE]
    assert mu[5:].tolist() == [0.0] * (M - 5) and bool((mu[:5] > 0).all())
    assert float(pools.exact(fl.dipm.decouple(own).directions().update(MODULE))[:, 5:].norm()) == 0.0
    shifted = pools.exact(fl.modulate(own, fl.dipm.shift(other, own, 0.5)).update(MODULE))
    assert float(shifted[:, 5:].norm()) == 0.0
    towards = pools.exact(fl.modulate(third, fl.dipm.shift(other, own, 0.5)).update(MODULE))[:, 5:]
    end, start = (pools.dense(part(i))[:, 5:] for i in (5, 3))
    wanted = end / end.norm(dim=0) - 0.5 * start / start.norm(dim=0)
    close(towards, wanted / wanted.norm(dim=0) * end.norm(dim=0))


DEGENERATE = ["deficient_left", "deficient_right", "duplicates", "with_zero", "identical"]


# The components of `wide` have close singular values, so they are ill-conditioned by themselves.
@pytest.mark.parametrize(
    ("kind", "granularity"),
    [(k, g) for k in DEGENERATE for g in GRANULARITIES] + [("wide", "column"), ("wide", "matrix")],
)
def test_degenerate_inputs(kind: str, granularity: str) -> None:
    parts = pools.cast(pools.POOLS[kind](3), torch.float32)
    pool = pools.make_pool(parts).adapters
    for chain in (CHAINS["shift"], CHAINS["interpolate"], CHAINS["remove-one"]):
        wanted = _rank_aware(parts, chain, granularity)
        found = pools.exact(got(pool, chain, granularity, "product").update(MODULE))
        assert bool(found.isfinite().all())
        assert float((found - wanted).norm()) <= SUMS32 * float(pools.dense(parts[0]).norm())


def _rank_aware(parts: list[Part], chain: Chain, granularity: str) -> Tensor:
    """The dense definition, in which components of rounding size count as none."""
    if granularity != "component":
        return expected(parts, chain, granularity, "product")
    rank = max(p[0].shape[1] for p in parts)
    found = []
    for p in parts:
        x, _, _ = dense.components(pools.dense(p), "product", rank)
        norms = x.flatten(1).norm(dim=1)
        found.append(dense.decouple(x * (norms > 1e-6 * norms[0])[:, None, None]))
    (name, strength, others), *_ = chain
    given = [found[i] for i in others]
    if name == "remove":
        return dense.recombine(dense.remove(found[0], given, strength)).sum(0)
    return dense.recombine(getattr(dense, name)(found[0], *given, strength)).sum(0)


def test_a_direction_in_the_removed_span_becomes_zero() -> None:
    own, twin, other = adapters(part(1), part(1, scaling=9.0), part(5))
    for granularity in GRANULARITIES:
        gone = fl.modulate(own, fl.dipm.remove([other, twin]), granularity=granularity)
        assert float(pools.exact(gone.update(MODULE)).norm()) == 0.0
        assert any("nothing is left of them" in n for n in gone.notes)


def test_removing_a_direction_twice_is_removing_it_once() -> None:
    own, other, twin, third = adapters(part(1), part(3), part(3, scaling=-9.0), part(5, rank=2))
    for granularity in GRANULARITIES:
        once = fl.modulate(own, fl.dipm.remove([third, other]), granularity=granularity)
        twice = fl.modulate(own, fl.dipm.remove([twin, third, other]), granularity=granularity)
        close(pools.exact(twice.update(MODULE)), pools.exact(once.update(MODULE)))


@pytest.mark.parametrize("granularity", ["column", "matrix"])
def test_directions_that_differ_by_rounding_span_no_plane(granularity: str) -> None:
    # The second direction is the first, turned by ε towards the modulated update's own. At ε = 1e-7 that is rounding:
    # only the first is removed. At 1e-3 the two span a plane that the update lies in, and nothing of it is left.
    left, right = gaussian(N, R, seed=1, dtype=torch.float64), gaussian(R, M, seed=2, dtype=torch.float64)
    away = gaussian(N, R, seed=3, dtype=torch.float64)
    for epsilon, kept in ((1e-7, True), (1e-3, False)):
        first, turned = (away, right, 1.0), (away + epsilon * left, right, 1.0)
        own, other, near = adapters((left, right, 1.0), first, turned)
        found = pools.exact(fl.modulate(own, fl.dipm.remove([other, near]), granularity=granularity).update(MODULE))
        if kept:
            close(found, expected([(left, right, 1.0), first], [("remove", 1.0, (1,))], granularity, "product"))
        else:
            assert float(found.norm()) == 0.0


def test_opposite_directions_keep_the_nearer_end() -> None:
    own, opposite = adapters(part(1), part(1, scaling=-6.0))
    x = pools.dense(part(1))
    for granularity in GRANULARITIES:
        near = fl.modulate(own, fl.dipm.interpolate(opposite, 0.25), granularity=granularity)
        far = fl.modulate(own, fl.dipm.interpolate(opposite, 0.75), granularity=granularity)
        close(pools.exact(near.update(MODULE)), x * (0.75 + 0.25 * 3))
        close(pools.exact(far.update(MODULE)), -x * (0.25 + 0.75 * 3))
        assert any("opposite directions" in n for n in near.notes)


def test_zero_updates_stay_zero_and_are_saved(tmp_path: Path) -> None:
    zero = (torch.zeros(N, R), part(1)[1], 1.0)
    own, other, third = adapters(zero, part(3), part(5))
    for granularity in GRANULARITIES:
        for on in SIDES:
            result = fl.modulate(
                own, [fl.dipm.shift(other, third, 1.0), fl.dipm.reverse(2)], granularity=granularity, on=on
            )
            assert float(pools.exact(result.update(MODULE)).norm()) == 0.0
    assert float(fl.load(result.save(tmp_path / "zero")).delta(MODULE).norm()) == 0.0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_rounding_of_lazy_updates_has_no_direction(granularity: str) -> None:
    """Nothing is unique in two equal adapters: what is left of the factors is rounding."""
    unique = fl.decompose(pools.make_pool(pools.cast(pools.identical(2), torch.float32)), 0.5).unique_of("a0")
    assert float(pools.exact(unique.update(MODULE)).norm()) > 0
    parts = fl.dipm.decouple(unique, granularity)
    assert not parts.magnitudes[MODULE].any()
    third = pools.make_adapter("third", {MODULE: pools.cast(pools.planted(2), torch.float32)[1]})
    shifted = fl.dipm.recombine(parts.apply(fl.dipm.shift(unique, third, 0.5)))
    assert float(pools.exact(shifted.update(MODULE)).norm()) == 0.0


def test_equal_singular_values_are_noted() -> None:
    left, right = pools.orthonormal(N, 3, 1).float(), pools.orthonormal(M, 3, 2).mT.contiguous().float()
    own, other = adapters((left, right, 1.0), part(3, rank=3))
    result = fl.modulate(own, fl.dipm.shift(own, other, 0.3), granularity="component")
    assert any("equal singular values" in n for n in result.notes)
    again = fl.modulate(own, fl.dipm.shift(own, other, 0.3), granularity="component")
    assert torch.equal(result.delta(MODULE), again.delta(MODULE))
