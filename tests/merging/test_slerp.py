"""``slerp`` against its definition on dense matrices."""

from __future__ import annotations

import math

import mixed
import pools
import pytest
import torch
from builders import gaussian
from pools import MODULE, Part
from torch import Tensor

import fastlora as fl

pytestmark = pytest.mark.portable

FIRST: Part = (gaussian(20, 3, seed=1, dtype=torch.float64), gaussian(3, 14, seed=2, dtype=torch.float64), 2.0)
SECOND: Part = (gaussian(20, 5, seed=3, dtype=torch.float64), gaussian(5, 14, seed=4, dtype=torch.float64), -0.5)


def definition(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Of two dense matrices as vectors."""
    one, two = first.flatten(), second.flatten()
    sizes = float(one.norm()), float(two.norm())
    if min(sizes) == 0:
        return (1 - t) * first + t * second
    cosine = float(one @ two) / sizes[0] / sizes[1]
    if abs(cosine) > 0.9995:
        return (1 - t) * first + t * second
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * first + math.sin(t * theta) * second) / math.sin(theta)


def merged(parts: list[Part], t: float, weights: dict[str, float] | None = None) -> fl.Adapter:
    return fl.merge(pools.make_pool(parts), weights, method="slerp", t=t)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", pools.POOLS)
def test_it_is_the_definition(kind: str, t: float) -> None:
    parts = pools.POOLS[kind](2)
    weights = {"a0": 0.5, "a1": -3.0}
    found = merged(parts, t, weights)
    expected = definition(*mixed.dense(pools.make_pool(parts), MODULE, weights), t)
    # Inner products of float64 factors are exact to about 1e-14, and an angle to a few times that over its sine.
    assert mixed.distance(found, MODULE, expected) <= 1e-11


def test_every_module_has_its_own_angle() -> None:
    """Ragged ranks, mixed dtypes, a zero update, modules that one of two lacks."""
    whole = mixed.mixed_pool()
    for names in (("first", "brain"), ("half", "first"), ("zero", "first"), ("first", "again"), ("half", "brain")):
        pool = whole.subset(names)
        found = fl.merge(pool, method="slerp", t=0.3)
        for module in pool.modules:
            # Gram blocks of half and single precision factors are summed in float64 from exact products.
            expected = definition(*mixed.dense(pool, module), 0.3)
            assert mixed.distance(found, module, expected) <= 1e-7, (names, module)


def test_the_ends_are_the_adapters() -> None:
    for t, part in ((0.0, FIRST), (1.0, SECOND)):
        found = merged([FIRST, SECOND], t)
        assert mixed.distance(found, MODULE, pools.dense(part)) <= 1e-15  # a factor of sin θ / sin θ
        assert found.updates[MODULE].rank == part[0].shape[1]  # what counts nothing is left out


def test_the_middle_keeps_the_norm() -> None:
    size = float(pools.dense(FIRST).norm() / pools.dense(SECOND).norm())
    found = merged([FIRST, (SECOND[0], SECOND[1], SECOND[2] * size)], 0.5)
    assert found.updates[MODULE].rank == 8
    assert float(pools.exact(found.updates[MODULE]).norm()) == pytest.approx(
        float(pools.dense(FIRST).norm()), rel=1e-12
    )
    assert merged([FIRST, SECOND], 0.5).provenance["parameters"] == {"t": 0.5}


@pytest.mark.parametrize("factor", [3.0, 1.0, -1.0, -0.25])
def test_on_a_line_the_way_is_straight(factor: float) -> None:
    """Collinear updates, duplicates and opposite ones, in other factors."""
    mix = pools.mixing(3, seed=9)
    other = (FIRST[0] @ mix, torch.linalg.inv(mix) @ FIRST[1], factor * FIRST[2])
    for t in (0.0, 0.5, 0.75, 1.0):
        found = pools.exact(merged([FIRST, other], t).updates[MODULE])
        expected = ((1 - t) + t * factor) * pools.dense(FIRST)
        assert (
            float((found - expected).norm()) <= 1e-14 * float(pools.dense(FIRST).norm()) * 20
        )  # terms that may cancel


def test_next_to_the_line_nothing_jumps_far() -> None:
    """On both sides of the cosine from which on the way is straight, the two ways differ by less than ``θ²``."""
    side = gaussian(3, 14, seed=7, dtype=torch.float64)
    for share in (0.02, 0.03, 0.05, 0.08):
        near = (FIRST[0], FIRST[1] + share * side, FIRST[2])
        one, two = pools.dense(FIRST), pools.dense(near)
        cosine = float((one * two).sum() / one.norm() / two.norm())
        error = mixed.distance(merged([FIRST, near], 0.5), MODULE, (one + two) / 2)
        assert error <= 1 - cosine**2


@pytest.mark.parametrize("position", [0, 1])
def test_a_zero_update_has_no_angle(position: int) -> None:
    parts = [FIRST, SECOND]
    parts[position] = (torch.zeros_like(parts[position][0]), *parts[position][1:])
    found = merged(parts, 0.25)
    assert mixed.distance(found, MODULE, (0.25, 0.75)[position] * pools.dense(parts[1 - position])) <= 1e-15
    assert merged(parts, 0.25, {"a0": 0.0, "a1": 0.0}).updates[MODULE].rank == 0


def test_it_can_be_cut() -> None:
    found = fl.merge(pools.make_pool([FIRST, SECOND]), method="slerp", rank=2)
    expected = mixed.truncated(definition(pools.dense(FIRST), pools.dense(SECOND), 0.5), 2)
    assert mixed.distance(found, MODULE, expected) <= 1e-10 and found.updates[MODULE].rank == 2


def test_what_is_refused() -> None:
    for count in (1, 3):
        with pytest.raises(fl.InputError, match=f"slerp: goes between two adapters, not {count}"):
            merged([FIRST] * count, 0.5)
    for t in (-0.1, 1.5):
        with pytest.raises(fl.InputError, match=f"slerp: t={t:g} must be between 0 and 1"):
            merged([FIRST, SECOND], t)
    with pytest.raises(fl.InputError, match="method 'slerp' does not take s: it takes rank, energy, t"):
        fl.merge(pools.make_pool([FIRST, SECOND]), method="slerp", s=1)
