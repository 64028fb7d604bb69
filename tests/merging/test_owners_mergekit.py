"""Our methods beside mergekit's on the same ``ΔW_i``, as models whose base is zero."""

from __future__ import annotations

from typing import Any

import mixed
import owners
import pools
import pytest
import torch
from pools import MODULE
from tolerances import FLOAT32, SUBSPACE64
from torch import Tensor

import fastlora as fl

WEIGHTS = (0.5, 1.3, 2.0)
NEGATIVE = (0.5, -1.0, 2.0)
SEED = 7
CUT = {"rank": 40}

# (method, its parameters, mergekit's method, its parameters, weights)
CASES: list[tuple[str, dict[str, Any], str, dict[str, Any], tuple[float, ...]]] = [
    ("mean", {}, "linear", {}, NEGATIVE),
    ("cat", {}, "linear", {"normalize": False}, NEGATIVE),
    ("sum", {"strength": 0.7}, "task_arithmetic", {"lambda": 0.7}, NEGATIVE),
    *[("ties", {"density": d, "convention": "mergekit", **CUT}, "ties", {"density": d}, w)
      for d in (0.1, 0.6) for w in (WEIGHTS, NEGATIVE)],
    ("ties", {"density": 0.3, "convention": "mergekit", "combine": "sum", **CUT}, "ties",
     {"density": 0.3, "normalize": False}, NEGATIVE),
    ("dare", {"density": 0.4, "convention": "mergekit", "seed": SEED, **CUT}, "dare_linear", {"density": 0.4},
     NEGATIVE),
    ("dare", {"density": 0.4, "convention": "mergekit", "elect": "total", "seed": SEED, **CUT}, "dare_ties",
     {"density": 0.4}, NEGATIVE),
    *[("breadcrumbs", {"density": d, "gamma": g, "elect": e, **CUT}, name, {"density": d, "gamma": g}, NEGATIVE)
      for d, g in ((0.5, 0.05), (0.5, 0.0), (0.9, 0.3)) for e, name in (("none", "breadcrumbs"),
                                                                       ("total", "breadcrumbs_ties"))],
    ("della", {"density": 0.5, "epsilon": 0.2, "seed": SEED, **CUT}, "della", {"density": 0.5, "epsilon": 0.2},
     WEIGHTS),
    ("della", {"density": 0.5, "epsilon": 0.2, "seed": SEED, "elect": "none", "combine": "sum", **CUT}, "della_linear",
     {"density": 0.5, "epsilon": 0.2}, NEGATIVE),
    *[("sce", {"select_topk": t, **CUT}, "sce", {"select_topk": t}, ()) for t in (0.3, 1.0)],
    ("multislerp", {}, "multislerp", {}, WEIGHTS),
    ("karcher", {}, "karcher", {}, ()),
    ("model_stock", {}, "model_stock", {}, ()),
]  # fmt: skip
BASELESS = ("linear", "multislerp", "karcher")
# mergekit draws masks and rescales in float32, and adds 1e-8 to norms.
COARSE = ("dare_linear", "dare_ties", "della", "della_linear", "multislerp")


def theirs(deltas: Tensor, method: str, **parameters: Any) -> Tensor:
    merge_tensors = owners.module("mergekit.merge_methods.api").merge_tensors
    tensors = list(deltas.unbind()) if method in BASELESS else [torch.zeros_like(deltas[0]), *deltas]
    base = {} if method in BASELESS else {"base_index": 0}
    result: Tensor = merge_tensors(tensors, method, parameters=parameters, **base)
    return result


@pytest.mark.parametrize("kind", ["planted", "ragged", "scalings"])
@pytest.mark.parametrize(
    ("method", "given", "name", "parameters", "weights"), CASES, ids=[f"{c[2]}-{i}" for i, c in enumerate(CASES)]
)
def test_it_is_that_of_mergekit(
    kind: str,
    method: str,
    given: dict[str, Any],
    name: str,
    parameters: dict[str, Any],
    weights: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owners.module("mergekit.merge_methods.api")
    if (kind, method) == ("scalings", "model_stock"):
        kind = "ragged"  # updates that point apart: below
    pool = pools.make_pool(pools.POOLS[kind](3))
    found = fl.merge(pool, dict(zip(pool.names, weights, strict=True)) if weights else None, method=method, **given)
    monkeypatch.setattr(torch, "bernoulli", owners.drawn(pool.names, MODULE, SEED))
    if weights:
        base = [] if name in BASELESS else [0.0]
        parameters = {**parameters, "weight": [*base, *weights] if name == "linear" else list(weights)}
    expected = theirs(mixed.dense(pool, MODULE), name, **parameters)
    assert mixed.distance(found, MODULE, expected) <= (FLOAT32 if name in COARSE else SUBSPACE64)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["planted", "ragged", "identical"])
def test_slerp(kind: str, t: float) -> None:
    merge_tensors = owners.module("mergekit.merge_methods.api").merge_tensors
    pool = pools.make_pool(pools.POOLS[kind](2))
    expected = merge_tensors(list(mixed.dense(pool, MODULE)), "slerp", parameters={"t": t}, base_index=0)
    assert mixed.distance(fl.merge(pool, method="slerp", t=t), MODULE, expected) <= SUBSPACE64


def test_karcher_with_weights() -> None:
    """The method knows none; its function does."""
    function = owners.module("mergekit.merge_methods.karcher").karcher_merge_tensors
    pool = pools.make_pool(pools.planted(3))
    expected = function(list(mixed.dense(pool, MODULE)), [w / sum(WEIGHTS) for w in WEIGHTS])
    found = fl.merge(pool, dict(zip(pool.names, WEIGHTS, strict=True)), method="karcher")
    assert mixed.distance(found, MODULE, expected) <= SUBSPACE64


# ---- Where we differ, and why: docs/methods.md has the table.


def test_one_element_at_the_least() -> None:
    """``⌊density·N⌋`` may be 0; mergekit then keeps one element."""
    pool = pools.make_pool(pools.planted(3))
    given = {"density": 1e-4, "convention": "mergekit", **CUT}
    assert fl.merge(pool, method="ties", **given).updates[MODULE].rank == 0
    weight = {"weight": [1.0] * 3}
    expected = theirs(mixed.dense(pool, MODULE), "ties", density=1e-4, **weight)
    assert 1 <= int((expected != 0).sum()) <= 3


def test_updates_that_point_apart_have_no_stock() -> None:
    """A negative cosine turns mergekit's mean around; here nothing is left."""
    (B, A, s), other = pools.planted(2)
    turned = (-B + 0.3 * other[0], A, s)
    pool = pools.make_pool([(B, A, s), turned])
    deltas = mixed.dense(pool, MODULE)
    expected = theirs(deltas, "model_stock")
    assert float((expected * deltas.mean(0)).sum()) < 0
    assert not pools.exact(fl.merge(pool, method="model_stock").updates[MODULE]).any()


def test_directions_that_balance_out_give_the_mean() -> None:
    """mergekit has this rule for two adapters and refuses more."""
    B, A, s = pools.planted(1)[0]
    angles = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64) * torch.pi / 3
    other = pools.orthonormal(*B.shape, 5)
    B = pools.orthonormal(*B.shape, 6)
    A = pools.orthonormal(A.shape[1], A.shape[0], 7).mT
    other = other - B @ (B.mT @ other)
    other = torch.linalg.qr(other).Q
    parts = [(c * B + d * other, A, s) for c, d in zip(angles.cos(), angles.sin(), strict=True)]
    pool = pools.make_pool(parts)
    deltas = mixed.dense(pool, MODULE)
    with pytest.raises(ValueError, match="weighted sum of the input tensors is zero"):
        theirs(deltas, "multislerp", weight=[1.0] * 3)
    found = pools.exact(fl.merge(pool, method="multislerp").updates[MODULE])
    assert float((found - deltas.mean(0)).norm()) <= SUBSPACE64 * float(deltas.norm())


def test_a_zero_update_has_no_direction_and_counts_in_the_norm() -> None:
    """As in mergekit."""
    pool = pools.make_pool(pools.with_zero(3))
    for method in ("karcher", "multislerp"):
        weight = {"weight": [1.0] * 3} if method == "multislerp" else {}
        expected = theirs(mixed.dense(pool, MODULE), method, **weight)
        assert mixed.distance(fl.merge(pool, method=method), MODULE, expected) <= FLOAT32, method
