"""The backend `torch` where no compiled kernel takes a call on a device: no tensor is made on the CPU by accident."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import gaussian
from pools import MODULE
from simulated import OnDevice
from test_plan import ragged_pool
from tolerances import FLOAT32
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastlora as fl
from fastlora.ops import dispatch, merge_tiles
from fastlora.ops.add_products import ProductTask, Segment, add_products
from fastlora.ops.difference_products import DifferenceProducts, difference_products
from fastlora.ops.merge_tiles import TileOutputs, TileRule, TileTask
from fastlora.ops.similarity import similarity
from fastlora.ops.tucker import tucker

TALL = gaussian(3, 2, 37, 5, seed=0)
SQUARE = torch.einsum("bina,bjnc->bijac", TALL.double(), TALL.double()).contiguous()
RIGHT = SQUARE.diagonal(dim1=1, dim2=2).movedim(-1, 1).contiguous()

Put = Callable[[Tensor], Tensor]


def tiles(put: Put, rule: str) -> tuple[Tensor, ...]:
    pairs = [(put(gaussian(40, r, seed=r)), put(gaussian(r, 70, seed=9 + r))) for r in (3, 5)]
    task = TileTask(pairs, [1.0, -0.5], (40, 70), torch.float32)
    keys = [merge_tiles.key_of(7, i) for i in range(2)]
    ties = {"elect": "total", "votes": [1.0, 1.0], "gains": [1.0, 1.0], "shares": [1.0, 1.0]}
    cuts = merge_tiles.select(task, [(0, 900), (1, 900)])
    given: dict[str, Any] = {
        "ties": lambda: TileRule("magnitude", cuts, **ties),
        "dare": lambda: TileRule("random", keep=[2**31] * 2, keys=keys, gains=[1.0, 1.0]),
        "della": lambda: TileRule("bits", bits=merge_tiles.row_masks(task, [(0.1, 0.4)] * 2, keys, 3), **ties),
        "sce": lambda: TileRule("variance", merge_tiles.select(task, [(0, 900)], "variance"), **ties),
    }
    dense = put(torch.zeros(40, 70))
    made = given[rule]()
    told = merge_tiles.merge(task, made, TileOutputs(dense=dense, sums=True))
    right = merge_tiles.merge(task, made, TileOutputs(right=put(gaussian(70, 3, seed=1).double())))
    assert merge_tiles.count_varied(task) == 2800
    assert told.sums is not None and right.product is not None
    return dense, told.sums, right.product


def products(put: Put) -> Tensor:
    W, L, R = put(gaussian(9, 12, seed=1)), put(gaussian(9, 2, seed=2)), put(gaussian(2, 7, seed=3))
    task = ProductTask((9, 12), [Segment(0, 5), Segment(5, 7, [(L, R)], [0.5])], torch.float32, torch.float32)
    assert add_products(task, W, W) is None
    return W


def all_pairs(put: Put) -> tuple[Tensor, Tensor]:
    left, right = (put(gaussian(n, 12, seed=n)) for n in (30, 20))
    return similarity(left, right, torch.tensor([0, 3, 3, 8, 12]), torch.tensor([3, 0, 4, 4]))


def subspaces(put: Put) -> tuple[Tensor, ...]:
    left, right = (gaussian(2, 3, 2, n, seed=n).double() / 30 for n in (9, 7))
    U, V = (torch.linalg.qr(gaussian(2, n, 2, seed=n).double())[0] for n in (9, 7))
    return tucker(put(left), put(right), put(U), put(V), iterations=4, tolerance=0.0)


def changes(put: Put) -> DifferenceProducts:
    old, new = (put(gaussian(300, 40, seed=s)) for s in (1, 2))
    right, left = (put(gaussian(n, 3, seed=n).double()) for n in (40, 300))
    return difference_products(old, new, right, left, square=True)


CALLS: dict[str, Callable[[Put], Any]] = {
    "gram": lambda put: fl.ops.gram(put(TALL), put(torch.tensor([[5, 2], [0, 3], [1, 5]]))),
    "gram, a chain of rows": lambda put: fl.ops.gram(put(TALL), blocks="chain", rows=True),
    "combine": lambda put: fl.ops.combine(put(TALL), put(gaussian(3, 2, 5, 4, seed=2))),
    "eigh": lambda put: fl.ops.eigh_ex(put(SQUARE[:, 0, 0])),
    "svd": lambda put: fl.ops.svd_ex(put(TALL)),
    "chain": lambda put: fl.ops.chain(put(SQUARE), put(RIGHT), threshold=0.3),
    "chain, palindrome": lambda put: fl.ops.chain(put(SQUARE), put(RIGHT), threshold=0.3, kind="palindrome"),
    "chain, mean": lambda put: fl.ops.chain(put(SQUARE), put(RIGHT), threshold=0.3, kind="mean"),
    "finite": lambda put: dispatch.run("finite", put(TALL)),
    **{f"tiles, {rule}": lambda put, rule=rule: tiles(put, rule) for rule in ("ties", "dare", "della", "sce")},
    "similarity": all_pairs,
    "tucker": subspaces,
    "difference_products": changes,
    "add_products": products,
}


def numbers(found: Any) -> list[Tensor]:
    return [t.held if isinstance(t, OnDevice) else t for t in tree_leaves(found) if isinstance(t, Tensor)]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_ops(call: Callable[[Put], Any], device: None) -> None:
    with fl.use_backend("torch"):
        wanted, found = call(lambda x: x.clone()), call(lambda x: OnDevice(x.clone()))
    for one, two in zip(numbers(wanted), numbers(found), strict=True):
        assert torch.equal(one.isnan(), two.isnan())
        torch.testing.assert_close(two.nan_to_num(), one.nan_to_num(), rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("chain", ["product", "mean"])
def test_whole_plans(chain: str, device: None) -> None:
    pool = ragged_pool()
    wanted = fl.decompose(pool, 0.5, chain=chain).adapters()
    with fl.use_backend("torch"):
        plan = fl.DecompositionPlan(pool.to("cuda"), 0.5, chain=chain)
        plan.run()
        found = {place: adapter.to("cpu") for place, adapter in plan.adapters().items()}
        merged = fl.merge(pool, rank=3, device="cuda").to("cpu")
    for place, adapter in wanted.items():
        for module in adapter.modules:
            size = float(pool["a0"].delta(MODULE).norm())
            assert float((found[place].delta(module) - adapter.delta(module)).norm()) < 10 * FLOAT32 * size, place
    assert merged.modules == fl.merge(pool, rank=3).modules
