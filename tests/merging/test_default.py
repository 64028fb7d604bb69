"""How adapters are merged when no method was named: scale, norms, cosines, and what a cut keeps of each."""

from __future__ import annotations

import math

import mixed
import pools
import pytest
import torch
from pools import MODULE
from tolerances import FLOAT32

import fastlora as fl
from fastlora.merging.default import choose
from fastlora.merging.kept import kept_of_each


def of_size(size: float, part: pools.Part) -> pools.Part:
    left, right, scaling = part
    return size / float(pools.dense(part).norm()) * left, right, scaling


def test_without_weights_the_sum_has_the_mean_norm() -> None:
    pool = mixed.mixed_pool()
    choice = choose(pool, None, rank=None, energy=None)
    deltas = {m: mixed.dense(pool, m) for m in pool.modules}
    vectors = torch.cat([x.flatten(1) for x in deltas.values()], 1)  # [k, all elements]
    norms = vectors.norm(dim=1)
    assert choice.norms == pytest.approx(norms.tolist(), rel=FLOAT32)
    for i, j in ((0, 2), (0, 4), (3, 2)):
        cosine = float(vectors[i] @ vectors[j] / norms[i] / norms[j])
        assert choice.cosine[i][j] == pytest.approx(cosine, abs=FLOAT32)
    assert math.isnan(choice.cosine[0][1])  # of the adapter that is zero
    scale = float(norms[norms > 0].mean() / vectors.sum(0).norm())
    assert choice.method == "cat" and choice.scale == pytest.approx(scale, rel=FLOAT32)
    assert choice.weights == dict.fromkeys(pool.names, choice.scale)
    merged = fl.merge(pool, choice.weights, method=choice.method)
    whole = sum(float(pools.exact(u).square().sum()) for u in merged.updates.values()) ** 0.5
    assert whole == pytest.approx(float(norms[norms > 0].mean()), rel=FLOAT32)
    assert choice.scale == pytest.approx(
        float(fl.merge(pool, method="matched_norm").provenance["coefficients"]["first"])
    )  # type: ignore[index]


@pytest.mark.parametrize(("cut", "method"), [({}, "cat"), ({"rank": 4}, "svd"), ({"energy": 0.5}, "svd")], ids=str)
def test_given_weights_stay(cut: dict[str, float], method: str) -> None:
    choice = choose(mixed.mixed_pool(), mixed.WEIGHTS, **{"rank": None, "energy": None, **cut})  # type: ignore[arg-type]
    assert (choice.method, choice.weights, choice.scale) == (method, mixed.WEIGHTS, None)


@pytest.mark.parametrize(("ratio", "method"), [(1.0, "svd"), (1.9, "svd"), (2.1, "ctm"), (4.0, "ctm")])
def test_adapters_of_unlike_norms_share_the_directions(ratio: float, method: str) -> None:
    parts = [of_size(size, part) for size, part in zip((1.0, ratio, 1.0), pools.planted(3), strict=True)]
    pool = pools.make_pool(parts)
    choice = choose(pool, None, rank=4, energy=None)
    assert choice.method == method and bool(choice.notes) == (ratio > 3)
    if choice.notes:
        assert "4.0 times as long as the shortest" in choice.notes[0] and "equal_energy" in choice.notes[0]
    merged = fl.merge(pool, choice.weights, method=choice.method, rank=4, **choice.parameters)
    kept = kept_of_each(pool, merged)
    assert merged.updates[MODULE].rank == 4
    largest = kept_of_each(pool, fl.merge(pool, choice.weights, method="svd", rank=4))
    assert method == "svd" or min(kept.values()) > min(largest.values())
    assert choose(pool, None, rank=None, energy=None).method == "cat"
    assert choose(pool, None, rank=None, energy=0.9).method == "svd"


def test_one_adapter_nothing_and_opposite_ones() -> None:
    part = pools.planted(1)[0]
    assert choose(pools.make_pool([part]), None, rank=None, energy=None).scale == 1.0
    assert choose(pools.make_pool([(0 * part[0], part[1], 1.0)] * 2), None, rank=2, energy=None).scale == 1.0
    with pytest.raises(fl.InputError, match=r"cancel each other.* give weights"):
        choose(pools.make_pool([part, (-part[0], *part[1:])]), None, rank=None, energy=None)
