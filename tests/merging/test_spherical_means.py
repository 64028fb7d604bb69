"""``multislerp``, ``karcher``, ``model_stock`` against their definitions on dense vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import mixed
import pools
import pytest
import torch
from pools import MODULE
from tolerances import FLOAT32, SUBSPACE64
from torch import Tensor

import fastlora as fl


def slerp_of_many(deltas: Tensor, weights: Tensor) -> Tensor:
    """With mergekit's way over the tangent space, which adds nothing."""
    shares = weights / weights.sum()
    sizes = deltas.flatten(1).norm(dim=1)
    units = deltas / torch.where(sizes > 0, sizes, 1.0)[:, None, None]
    mean = torch.einsum("i,iab->ab", shares, units)
    if float(mean.norm()) < 1e-8:
        return torch.einsum("i,iab->ab", shares, deltas)
    mean = mean / mean.norm()
    tangent = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(shares, units, strict=True))
    length = float(tangent.norm()) + 1e-8  # type: ignore[union-attr]
    direction = mean * math.cos(length) + tangent * (math.sin(length) / length)
    return direction * float((shares * sizes).sum())


def karcher_mean(deltas: Tensor, weights: Tensor, iterations: int = 10, tolerance: float = 1e-5) -> Tensor:
    shares = weights / weights.sum()
    sizes = deltas.flatten(1).norm(dim=1)
    present = [i for i in range(len(deltas)) if float(sizes[i]) > 0]
    if not present:
        return torch.zeros_like(deltas[0])
    units = {i: deltas[i] / sizes[i] for i in present}
    total = float(sum(shares[i] for i in present))
    mean = sum((float(shares[i]) / total * units[i] for i in present), torch.zeros_like(deltas[0]))
    first = next(i for i in present if float(shares[i]))
    mean = units[first] if float(mean.norm()) < tolerance else mean / mean.norm()
    for _ in range(iterations):
        tangent = torch.zeros_like(mean)
        for i in present:
            cosine = float((mean * units[i]).sum().clamp(-1, 1))
            angle = math.acos(cosine)
            if math.sin(angle) > tolerance:
                tangent += float(shares[i]) / total * angle / math.sin(angle) * (units[i] - cosine * mean)
        length = float(tangent.norm())
        if length < tolerance:
            break
        mean = math.cos(length) * mean + math.sin(length) * tangent / length
        mean = mean / mean.norm()
    return float((shares * sizes).sum()) * mean


def stock(deltas: Tensor, weights: Tensor) -> Tensor:
    vectors = [x.flatten() for x in weights[:, None, None] * deltas]
    vectors = [x for x in vectors if float(x.norm())]
    count = len(vectors)
    if not count:
        return torch.zeros_like(deltas[0])
    pairs = [(a, b) for i, a in enumerate(vectors) for b in vectors[:i]]
    cosine = sum(float(a @ b / a.norm() / b.norm()) for a, b in pairs) / len(pairs) if pairs else 1.0
    cosine = max(cosine, 0.0)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return (ratio / count * sum(vectors)).view_as(deltas[0])  # type: ignore[union-attr]


DEFINITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multislerp": slerp_of_many, "karcher": karcher_mean, "model_stock": stock,
}  # fmt: skip


@pytest.mark.parametrize("method", DEFINITIONS)
@pytest.mark.parametrize("kind", pools.POOLS)
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -1.0, 2.0)], ids=str)
def test_float64_pools(method: str, kind: str, weights: tuple[float, ...]) -> None:
    pool = pools.make_pool(pools.POOLS[kind](3))
    merged = fl.merge(pool, dict(zip(pool.names, weights, strict=True)), method=method)
    deltas = mixed.dense(pool, MODULE)
    expected = DEFINITIONS[method](deltas, torch.tensor(weights, dtype=torch.float64))
    # Angles from cosines next to 1 lose a few digits; the stock of orthogonal updates is the rounding of a cosine.
    error = float((pools.exact(merged.updates[MODULE]) - expected).norm())
    assert error <= SUBSPACE64 * float(deltas.flatten(1).norm(dim=1).max())
    assert merged.updates[MODULE].rank <= sum(a.updates[MODULE].rank for a in pool.adapters)


@pytest.mark.parametrize("method", DEFINITIONS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_every_module_of_a_ragged_pool(method: str, dtype: torch.dtype | None) -> None:
    pool = mixed.mixed_pool(dtype=dtype)
    merged = fl.merge(pool, mixed.WEIGHTS, method=method)
    given = torch.tensor([mixed.WEIGHTS[n] for n in pool.names], dtype=torch.float64)
    for module in pool.modules:
        expected = DEFINITIONS[method](mixed.dense(pool, module), given)
        assert mixed.distance(merged, module, expected) <= FLOAT32, module


def test_karcher_is_where_the_angles_balance() -> None:
    """The gradient of ``Σ ω θ²`` vanishes there; with two adapters of one norm it is the middle of `slerp`."""
    pool = pools.make_pool(pools.planted(3))
    deltas = mixed.dense(pool, MODULE)
    merged = pools.exact(fl.merge(pool, method="karcher", iterations=50, tolerance=1e-7).updates[MODULE])
    mean, pull = merged / merged.norm(), torch.zeros_like(merged)
    for unit in (x / x.norm() for x in deltas):
        cosine = (mean * unit).sum()
        pull += cosine.arccos() / (1 - cosine**2).sqrt() * (unit - cosine * mean)
    assert float(pull.norm()) <= 3e-7
    two = pools.make_pool([(b / x.norm(), a, s) for (b, a, s), x in zip(pools.planted(2), deltas, strict=False)])
    middle = pools.exact(fl.merge(two, method="slerp").updates[MODULE])
    assert mixed.distance(fl.merge(two, method="karcher"), MODULE, middle) <= SUBSPACE64


def test_directions_that_balance_out() -> None:
    """Opposite updates: the weighted mean for `multislerp`; `karcher` stays where it starts; no stock."""
    b, a, s = pools.planted(1)[0]
    pool = pools.make_pool([(b, a, s), (-3 * b, a, s)])
    delta = pools.dense((b, a, s))
    assert mixed.distance(fl.merge(pool, method="multislerp"), MODULE, -delta) <= SUBSPACE64
    assert mixed.distance(fl.merge(pool, method="karcher"), MODULE, 2 * delta) <= SUBSPACE64
    assert not pools.exact(fl.merge(pool, method="model_stock").updates[MODULE]).any()


def test_what_is_refused() -> None:
    pool = pools.make_pool(pools.planted(2))
    for method in ("multislerp", "karcher"):
        with pytest.raises(fl.InputError, match=f"method '{method}': the weights .* add up to 0"):
            fl.merge(pool, {"a0": 1.0, "a1": -1.0}, method=method)
    for given in ({"iterations": -1}, {"tolerance": 0.0}):
        with pytest.raises(fl.InputError, match=r"karcher: iterations=.* must be at least 0, tolerance=.* above 0"):
            fl.merge(pool, method="karcher", **given)
