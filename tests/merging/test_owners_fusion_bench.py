"""Our methods beside fusion-bench's functions, and tensorly's Tucker decomposition, on the same ``ΔW_i``.

fusion-bench works on full matrices, so updates here have full rank where its definition needs it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import mixed
import owners
import pools
import pytest
import torch
from builders import gaussian
from pools import MODULE
from tolerances import FLOAT32, GRAM64, SUBSPACE64, SUMS32
from torch import Tensor

import fastlora as fl
from fastlora.merging.input_rows import InputRows, Statistics

Parts = list[pools.Part]


def full(n: int, m: int, ranks: tuple[int, ...], dtype: torch.dtype = torch.float64) -> fl.Pool:
    """Updates whose ranks add up to at least ``min(n, m)``: their sum has full rank."""
    return pools.make_pool([
        (gaussian(n, r, seed=3 * i, dtype=dtype), gaussian(r, m, seed=50 + 3 * i, dtype=dtype), (0.5, 1.0, -0.7)[i])
        for i, r in enumerate(ranks)
    ])  # fmt: skip


def dicts(pool: fl.Pool) -> list[dict[str, Tensor]]:
    return [{MODULE: delta} for delta in mixed.dense(pool, MODULE)]


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)], ids=str)
def test_iso_c(shape: tuple[int, int]) -> None:
    owner = owners.file("fusion_bench", "method/isotropic_merging/iso_utils.py")
    pool = full(*shape, (3, 4, 2))
    expected = owner.iso_c(dicts(pool), accelerator="cpu")[MODULE]
    assert mixed.distance(fl.merge(pool, method="iso_c", rank=7), MODULE, expected) <= SUBSPACE64


@pytest.mark.parametrize("common", [0.8, 0.5, 0.3])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)], ids=str)
def test_iso_cts(shape: tuple[int, int], common: float) -> None:
    owner = owners.file("fusion_bench", "method/isotropic_merging/iso_utils.py")
    pool = full(*shape, (4, 5, 4))
    expected = owner.iso_cts(dicts(pool), common, accelerator="cpu")[MODULE]
    found = fl.merge(pool, method="iso_cts", rank=9, common=common)
    assert mixed.distance(found, MODULE, expected) <= SUBSPACE64


@pytest.mark.parametrize("shape", [(13, 5), (5, 13), (6, 6)], ids=str)
def test_tsv(shape: tuple[int, int]) -> None:
    owner = owners.file("fusion_bench", "method/task_singular_vector/utils/TSVM_utils.py")
    rank = min(shape)  # of every update, so that its code, which keeps all directions, takes none of rounding
    pool = full(*shape, (rank, rank))
    expected = owner.compute_and_sum_svd_mem_reduction_lossless(
        [{MODULE: x.float()} for x in mixed.dense(pool, MODULE)], accelerator="cpu"
    )[MODULE]
    assert mixed.distance(fl.merge(pool, method="tsv"), MODULE, expected.double()) <= SUMS32


@pytest.mark.parametrize("rule", ["sum", "ties"])
@pytest.mark.parametrize("kind", ["planted", "ragged", "scalings"])
def test_knots(kind: str, rule: str) -> None:
    """Its basis and rows; the rule between is PEFT's, on rows with the singular values inside as in the paper."""
    owner = owners.file("fusion_bench", "method/knots/knots_utils.py")
    rules = owners.module("peft.utils.merge_utils")
    pool = pools.make_pool(pools.POOLS[kind](3))
    U, S, rows = owner.subspace_alignment(list(mixed.dense(pool, MODULE)))
    one = torch.ones(3, dtype=torch.float64)
    inside = [S[:, None] * Vh for Vh in rows]
    merged = sum(inside) if rule == "sum" else rules.ties(inside, one, 0.3)
    found = fl.merge(pool, method="knots", rule=rule, **({} if rule == "sum" else {"density": 0.3}))
    assert mixed.distance(found, MODULE, U @ merged) <= SUBSPACE64


@pytest.mark.parametrize("function", [
    "subspace_consistency_spectral_calibration", "subspace_consistency_spectral_calibration_accelerated",
])  # fmt: skip
@pytest.mark.parametrize("given", [{}, {"strength": 1.0, "alpha": 0.6}], ids=str)
def test_svc(function: str, given: dict[str, float]) -> None:
    owner = owners.file("fusion_bench", "method/singular_value_calibration/utils.py")
    pool = full(8, 6, (6, 6, 6))
    deltas = mixed.dense(pool, MODULE)
    zero = torch.zeros_like(deltas[0])
    merged = given.get("strength", 0.3) * deltas.sum(0)
    expected = getattr(owner, function)(
        zero, list(deltas), merged, alpha=given.get("alpha", 0.1), accelerator=torch.device("cpu")
    )
    assert mixed.distance(fl.merge(pool, method="svc", **given), MODULE, expected) <= SUBSPACE64


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.5])
def test_regmean(gamma: float) -> None:
    owner = owners.file("fusion_bench", "method/regmean/regmean.py")
    pool = full(8, 6, (2, 3, 2), torch.float32)
    rows = [gaussian(40, 6, seed=90 + i) + 0.3 for i in range(3)]
    data = Statistics({
        n: InputRows({MODULE: x}, {MODULE: MODULE}, {MODULE: 40}) for n, x in zip(pool.names, rows, strict=True)
    })  # fmt: skip
    products = [{MODULE: (x.mT @ x / 40).double()} for x in rows]
    expected = owner.merging_with_regmean_weights(
        {f"{MODULE}.weight": list(mixed.dense(pool, MODULE))}, products, reduce_non_diagonal_ratio=gamma
    )[f"{MODULE}.weight"]
    found = fl.merge(pool, method="regmean", data=data, off_diagonal=gamma, ridge=1e-12)
    assert mixed.distance(found, MODULE, expected) <= FLOAT32


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.7])
def test_ties_of_the_whole_model(share: float, combine: str) -> None:
    """Its threshold keeps one element more than ``⌊density·N⌋``, as the code of the paper does."""
    owner = owners.file("fusion_bench", "method/ties_merging/ties_merging_utils.py")
    modules = {"q": (9, 7), "v": (5, 11)}
    adapters = [
        pools.make_adapter(f"a{i}", {
            m: (gaussian(n, 2, seed=10 * i + j).double(), gaussian(2, k, seed=50 + 10 * i + j).double(), 1.0)
            for j, (m, (n, k)) in enumerate(modules.items())
        })
        for i in range(3)
    ]  # fmt: skip
    pool = fl.Pool(adapters)
    flat = torch.cat([mixed.dense(pool, m).flatten(1) for m in modules], 1)
    expected = owner.ties_merging(flat, reset_thresh=share, merge_func=combine).split(
        [n * k for n, k in modules.values()]
    )
    size = flat.shape[1]
    density = (int(size * share) + 1.5) / size
    given: dict[str, Any] = {"convention": "paper", "density": density, "combine": combine, "rank": 40}
    found = fl.merge(pool, method="ties", **given)
    for (module, shape), part in zip(modules.items(), expected, strict=True):
        assert mixed.distance(found, module, part.view(shape)) <= GRAM64


def test_dare(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = owners.file("fusion_bench", "method/dare/utils.py")
    pool, density = pools.make_pool(pools.planted(1)), 0.3
    draw = owners.drawn(pool.names, MODULE, 4)
    kept = draw(torch.full((pools.N, pools.M), density, dtype=torch.float64))
    monkeypatch.setattr(torch, "rand_like", lambda x: kept)  # above the share that is dropped where it is kept
    parameter = torch.nn.Parameter(mixed.dense(pool, MODULE)[0].clone())
    owner.param_random_drop_(parameter, 1 - density, rescale=True)
    found = fl.merge(pool, method="dare", density=density, seed=4, rank=40)
    assert mixed.distance(found, MODULE, parameter.data) <= GRAM64


@pytest.mark.parametrize("t", [0.2, 0.5])
def test_slerp(t: float) -> None:
    owner = owners.file("fusion_bench", "method/slerp/slerp_utils.py")
    pool = pools.make_pool(pools.planted(2))
    expected = owner.slerp(t, *mixed.dense(pool, MODULE))
    assert mixed.distance(fl.merge(pool, method="slerp", t=t), MODULE, expected) <= SUBSPACE64


def wudi_loss(X: Tensor, deltas: Tensor) -> float:
    """What the paper minimises."""
    return float((((X - deltas) @ deltas.mT).square().sum((1, 2)) / deltas.square().sum((1, 2))).sum())


@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_wudi_reaches_what_steps_reach_at_their_length(size: float) -> None:
    """300 steps of Adam, of a length that the size of the elements gives; a ridge stands for where they stop."""
    owner = owners.file("fusion_bench", "method/wudi/wudi.py")
    pool = full(12, 10, (3, 3, 3), torch.float32)
    deltas = mixed.dense(pool, MODULE)
    stepped = owner.wudi_merging([{MODULE: size * x.float()} for x in deltas], accelerator="cpu")[MODULE]
    steps = stepped.detach().double() / size
    reached = wudi_loss(steps, deltas)
    ridges = [10 ** (-i / 4) for i in range(20)]
    found = [pools.exact(fl.merge(pool, method="wudi", ridge=ridge).updates[MODULE]) for ridge in ridges]
    losses = [wudi_loss(X, deltas) for X in found]
    assert reached < wudi_loss(deltas.sum(0), deltas) and losses == sorted(losses, reverse=True)
    first = next(X for X, loss in zip(found, losses, strict=True) if loss <= reached)
    assert float(first.norm()) <= 1.05 * float(steps.norm())


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("balance", [0.0, 0.25, 1.0])
def test_ctm_finds_the_subspaces_of_tensorly(balance: float, rank: int) -> None:
    tensorly = owners.module("tensorly")
    decomposition = owners.module("tensorly.decomposition")
    pool = pools.make_pool(pools.planted(3))
    deltas = mixed.dense(pool, MODULE)
    norms = deltas.flatten(1).norm(dim=1)[:, None, None]
    blended = deltas * (balance * norms + (1 - balance) * norms.mean()) / norms
    with tensorly.backend_context("numpy"):
        # Both stop by the change of the error; the subspaces are known to its root.
        (_, (U, V)), _ = decomposition.partial_tucker(
            blended.numpy(), rank=[rank, rank], modes=[1, 2], n_iter_max=1000, tol=1e-13
        )
    U, V = torch.from_numpy(U.copy()), torch.from_numpy(V.copy())
    expected = U @ (U.mT @ deltas.sum(0) @ V) @ V.mT
    found = fl.merge(pool, method="ctm", rule="sum", rank=rank, balance=balance, tolerance=1e-13)
    assert mixed.distance(found, MODULE, expected) <= FLOAT32


# ---- Where we differ, and why: docs/methods.md has the table.


def test_iso_c_on_low_rank() -> None:
    """Its mean is over ``min(n, m)`` singular values, most of them of rounding, and so are their directions."""
    owner = owners.file("fusion_bench", "method/isotropic_merging/iso_utils.py")
    pool = full(30, 20, (3, 3))
    expected = torch.linalg.svdvals(owner.iso_c(dicts(pool), accelerator="cpu")[MODULE])
    sigma = torch.linalg.svdvals(pools.exact(fl.merge(pool, method="iso_c", rank=6).updates[MODULE]))
    assert int((expected > 0.5 * expected[0]).sum()) == 20 and int((sigma > 0.5 * sigma[0]).sum()) == 6
    assert float(expected[0]) == pytest.approx(6 / 20 * float(sigma[0]), rel=SUBSPACE64)


@pytest.mark.parametrize("method", ["iso_c", "tsv"])
def test_what_is_ill_posed_on_low_rank(method: str) -> None:
    """A change of 1e-12 in the updates moves their results by tens of percent, and ours not."""
    found, moved = [], []
    for noise in (0.0, 1e-12):
        parts = [
            (b + noise * gaussian(30, 3, seed=77 + i, dtype=torch.float64), a, s)
            for i, (b, a, s) in enumerate(
                [(gaussian(30, 3, seed=i).double(), gaussian(3, 20, seed=9 + i).double(), 1.0) for i in range(2)]
            )
        ]  # fmt: skip
        pool = pools.make_pool(parts)
        deltas = [x + noise * gaussian(30, 20, seed=5 + i).double() for i, x in enumerate(mixed.dense(pool, MODULE))]
        if method == "iso_c":
            owner = owners.file("fusion_bench", "method/isotropic_merging/iso_utils.py")
            moved.append(owner.iso_c([{MODULE: x} for x in deltas], accelerator="cpu")[MODULE])
        else:
            owner = owners.file("fusion_bench", "method/task_singular_vector/utils/TSVM_utils.py")
            lossless = owner.compute_and_sum_svd_mem_reduction_lossless
            moved.append(lossless([{MODULE: x} for x in deltas], accelerator="cpu")[MODULE])
        given = {"rank": 6} if method == "iso_c" else {}
        found.append(pools.exact(fl.merge(pool, method=method, **given).updates[MODULE]))
    assert float((found[0] - found[1]).norm()) <= SUBSPACE64 * float(found[0].norm())
    assert float((moved[0] - moved[1]).norm()) >= 0.1 * float(moved[0].norm())


def test_svc_counts_no_update_that_is_zero() -> None:
    """There it counts as one with the least share, α, which makes the result longer."""
    owner = owners.file("fusion_bench", "method/singular_value_calibration/utils.py")
    pool = pools.make_pool(pools.with_zero(3))
    deltas = mixed.dense(pool, MODULE)
    function = owner.subspace_consistency_spectral_calibration
    zero, merged = torch.zeros_like(deltas[0]), 0.3 * deltas.sum(0)
    with_zero, without = (
        function(zero, list(some), merged, alpha=0.1, accelerator=torch.device("cpu")) for some in (deltas, deltas[::2])
    )
    assert float(with_zero.norm()) > 1.2 * float(without.norm())
    assert mixed.distance(fl.merge(pool, method="svc"), MODULE, without) <= SUBSPACE64


def test_regmean_of_fewer_inputs_than_columns_is_arbitrary_there() -> None:
    """Without a ridge a singular matrix is inverted: changes of rounding change all."""
    owner = owners.file("fusion_bench", "method/regmean/regmean.py")
    pool = full(8, 6, (2, 3), torch.float32)
    rows = [gaussian(2, 6, seed=90 + i) for i in range(2)]
    weight = {f"{MODULE}.weight": list(mixed.dense(pool, MODULE))}
    data = Statistics({
        n: InputRows({MODULE: x}, {MODULE: MODULE}, {MODULE: 2}) for n, x in zip(pool.names, rows, strict=True)
    })  # fmt: skip
    ours = pools.exact(fl.merge(pool, method="regmean", data=data, off_diagonal=1.0).updates[MODULE])
    assert float(ours.norm()) <= 2 * float(mixed.dense(pool, MODULE).flatten(1).norm(dim=1).max())
    found = []
    for noise in (0.0, 1e-12):
        products = [{MODULE: x.double().mT @ x.double() / 2 + noise * gaussian(6, 6, seed=1).double()} for x in rows]
        with contextlib.suppress(torch.linalg.LinAlgError):
            found.append(owner.merging_with_regmean_weights(weight, products)[f"{MODULE}.weight"])
    assert len(found) < 2 or float((found[0] - found[1]).norm()) > 0.01 * float(found[0].norm())
