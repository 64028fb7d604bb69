"""``core``, ``knots``, ``ctm``: elementwise rules in common bases, against dense matrices in the papers' bases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import mixed
import numpy as np
import pools
import pytest
import torch
from builders import generator
from pools import MODULE
from tolerances import FLOAT32, FLOAT64, ROUNDED32, SUBSPACE64
from torch import Tensor

import fastlora as fl
from fastlora.core.updates import Noise, with_rank_zero
from fastlora.merging.forms.elementwise import Elementwise, Rule
from fastlora.ops.merge_tiles import key_of
from fastlora.reference.philox import words

NULL = 1e-6  # stored numbers are exact: what is below is rounding of the arithmetic


SEED = 5


def words_of(names: Sequence[str], shape: Sequence[int], module: str, row: int) -> Tensor:
    """The random words of the elements of every adapter, ``[k, p, q]``, numbered as in rows of a length."""
    numbers = np.arange(shape[0])[:, None] * row + np.arange(shape[1])
    drawn = [words(numbers, key_of(SEED, name), key_of(module)).astype(np.int64) for name in names]
    return torch.from_numpy(np.stack(drawn))


def trimmed(stack: Tensor, rule: str, names: Sequence[str], module: str, given: dict[str, Any]) -> list[Tensor]:
    """What a rule keeps of ``[k, p, q]``, by loops over adapters, rows and places."""
    density, gamma = given.get("density", 0.2), given.get("gamma", 0.01)
    kept = []
    if rule == "sce" and given["select_topk"] < 1.0:
        varied = stack.var(0, unbiased=False)
        varied = torch.where(varied > (1e-13 * stack.abs().max()).square(), varied, 0.0)
        q = math.floor(given["select_topk"] * int((varied > 0).sum()))
        least = varied.flatten().sort(descending=True).values[q - 1] if q else torch.inf
        return [torch.where(varied >= least, matrix, 0.0) for matrix in stack]
    if rule == "sce":
        return list(stack)
    for matrix, drawn in zip(stack, words_of(names, stack.shape[1:], module, given["row"]), strict=True):
        ordered = [math.inf, *matrix.abs().flatten().sort(descending=True).values.tolist()]
        q = math.floor(density * matrix.numel())
        if rule in ("magnitude", "ties"):
            kept.append(torch.where(matrix.abs() >= ordered[q], matrix, 0.0))
        elif rule.startswith("breadcrumbs"):
            top = min(math.floor(gamma * matrix.numel()), matrix.numel() - q)
            kept.append(torch.where((matrix.abs() >= ordered[top + q]) & (matrix.abs() < ordered[top]), matrix, 0.0))
        elif rule.startswith("dare"):
            kept.append(torch.where(drawn < int(density * 2**32), matrix / density, 0.0))
        else:
            left = torch.zeros_like(matrix)
            for a, row in enumerate(matrix):
                for rank, b in enumerate(row.abs().argsort().tolist()):
                    share = density - given["epsilon"] + 2 * given["epsilon"] * rank / max(len(row) - 1, 1)
                    left[a, b] = row[b] if int(drawn[a, b]) < share * 2**32 else 0.0
            kept.append(left * matrix.abs().sum() / left.abs().sum() if left.any() else left)
    return kept


def by_elements(
    stack: Tensor, rule: str, names: Sequence[str] = (), module: str = MODULE, *, row: int = 2**32, **given: Any
) -> Tensor:
    """Of ``[k, p, q]``, element by element. ``names``: of the adapters; ``a0``, ``a1``, … by default. ``row``: length
    of the rows in which random words are numbered."""
    if rule == "sum":
        return stack.sum(0)
    kept = trimmed(stack, rule, names or [f"a{i}" for i in range(len(stack))], module, given | {"row": row})
    total = torch.stack(kept).sum(0)
    if rule in ("magnitude", "breadcrumbs", "dare", "della_linear"):
        return total
    signs = torch.where(total < 0, -1.0, 1.0)
    agreeing = torch.stack([torch.where(matrix.sign() == signs, matrix, 0.0) for matrix in kept])
    if rule == "sce":
        energies = torch.stack([matrix.square().sum() for matrix in kept])[:, None, None]
        shares = (agreeing != 0) * energies / (energies.sum() or 1.0)
        return (agreeing * shares).sum(0) / torch.where(shares.sum(0) > 0, shares.sum(0), 1.0)
    number = (agreeing != 0).sum(0).clamp(min=1)
    return agreeing.sum(0) / (number if given.get("combine", "mean") == "mean" else 1.0)


def columns(matrix: Tensor, most: int | None = None) -> Tensor:
    """Left singular vectors that are no rounding."""
    U, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, : min(int((sigma > NULL * sigma[0]).sum()), most or len(sigma))]


def core(rule: str, **given: Any) -> mixed.Definition:
    def merged(deltas: Tensor, weights: Tensor, noise: float) -> Tensor:
        U, V = columns(torch.cat(list(deltas), 1)), columns(torch.cat(list(deltas)).mT)
        return U @ by_elements((U.mT @ deltas @ V)[weights != 0], rule, **given) @ V.mT

    return merged


def knots(rule: str, **given: Any) -> mixed.Definition:
    def merged(deltas: Tensor, weights: Tensor, noise: float) -> Tensor:
        U = columns(torch.cat(list(deltas), 1))
        return U @ by_elements((U.mT @ deltas)[weights != 0], rule, row=deltas.shape[2], **given)

    return merged


# No step ends the way up but one that gains rounding: 1e-16 of f, whose root is what is known of the subspaces.
TIGHT = 1e-17
STILL = 1e-13


def ctm(rank: int, balance: float, rule: str, *, ends: float | None = None, **given: Any) -> mixed.Definition:
    """Alternating eigenvectors until the subspaces are still, or as their owner until a step changes the error by less
    than ``ends``."""

    def merged(deltas: Tensor, weights: Tensor, noise: float) -> Tensor:
        norms = deltas.flatten(1).norm(dim=1)
        if not norms.any():
            return torch.zeros_like(deltas[0])
        wanted = balance * norms + (1 - balance) * norms[norms > 0].mean()
        blended = deltas * torch.where(norms > 0, wanted / norms, 0.0)[:, None, None]
        U, V = columns(torch.cat(list(blended), 1), rank), columns(torch.cat(list(blended)).mT, rank)
        before = math.inf
        for _ in range(3000):
            U, last = columns(torch.cat([x @ V for x in blended], 1), rank), V
            V = columns(torch.cat([x.mT @ U for x in blended], 1), rank)
            error = float((1 - (U.mT @ blended @ V).square().sum() / blended.square().sum()).clamp(min=0).sqrt())
            if abs(before - error) < ends if ends else float((V - last @ (last.mT @ V)).norm()) < STILL:
                break
            before = error
        return U @ by_elements((U.mT @ deltas @ V)[weights != 0], rule, **given) @ V.mT

    return merged


RULES: list[dict[str, Any]] = [
    {"rule": "ties", "density": 0.2, "combine": "mean"}, {"rule": "ties", "density": 0.7, "combine": "sum"},
    {"rule": "ties", "density": 1.0, "combine": "mean"}, {"rule": "magnitude", "density": 0.3},
    {"rule": "breadcrumbs", "density": 0.5, "gamma": 0.1}, {"rule": "breadcrumbs", "density": 0.95, "gamma": 0.2},
    {"rule": "breadcrumbs_ties", "density": 0.4, "gamma": 0.05, "combine": "sum"},
    {"rule": "sce", "select_topk": 0.3}, {"rule": "sce", "select_topk": 1.0},
]  # fmt: skip
# Updates of one size in separate spaces: singular values that are equal, and directions that are not unique.
NOT_UNIQUE = ("orthogonal",)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_core(rule: dict[str, Any]) -> None:
    mixed.require_parity("core", core(**rule), FLOAT32, without=NOT_UNIQUE, **rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_knots(rule: dict[str, Any]) -> None:
    mixed.require_parity("knots", knots(**rule), FLOAT32, without=NOT_UNIQUE, **rule)


@pytest.mark.parametrize(("rank", "balance", "rule"), [
    (4, 0.25, {"rule": "sum"}), (3, 1.0, {"rule": "ties", "density": 0.25}),
    (5, 0.0, {"rule": "ties", "density": 0.6}), (7, 0.25, {"rule": "magnitude", "density": 0.25}),
    (5, 0.5, {"rule": "breadcrumbs", "density": 0.5, "gamma": 0.1}), (4, 0.25, {"rule": "sce", "select_topk": 0.5}),
], ids=str)  # fmt: skip
def test_ctm(rank: int, balance: float, rule: dict[str, Any]) -> None:
    # A sum depends on the subspaces alone. Elements also depend on directions.
    without = () if rule["rule"] == "sum" else NOT_UNIQUE
    given = {"rank": rank, "balance": balance, "tolerance": TIGHT, **rule}
    mixed.require_parity("ctm", ctm(rank, balance, **rule), FLOAT32, without=without, **given)


def test_directions_of_ctm_with_almost_no_gap() -> None:
    """Two of six have eigenvalues 7e-4 of the largest apart. The subspaces are known to some 3e-8, as a sum shows, and
    directions to as much over that gap: elements are 2e-6 off."""
    pool = pools.make_pool(pools.crowded(3))
    deltas = mixed.dense(pool, MODULE)
    for rule, most in (({"rule": "sum"}, ROUNDED32), ({"rule": "magnitude", "density": 0.25}, ROUNDED32 / 7e-4)):
        expected = ctm(6, 0.25, **rule)(deltas, torch.ones(3), 0.0)  # type: ignore[arg-type]
        found = fl.merge(pool, method="ctm", rank=6, balance=0.25, tolerance=TIGHT, **rule)  # type: ignore[arg-type]
        assert mixed.distance(found, MODULE, expected) <= most


@pytest.mark.parametrize("shared", [0, 2])
def test_ctm_keeps_as_much_as_alternating_eigenvectors(shared: int) -> None:
    """With the default tolerance of both; without directions in common they take ten times as many steps."""
    k, r, n = 4, 4, 160
    draw = torch.Generator().manual_seed(shared)
    both = torch.zeros(2, n, r, dtype=torch.float64)
    both[..., :shared] = 2 * torch.randn(2, n, shared, generator=draw, dtype=torch.float64)
    sides = both + torch.randn(k, 2, n, r, generator=draw, dtype=torch.float64)
    parts = [(B, A.mT, 1.0) for B, A in sides]
    pool = pools.make_pool(parts)
    deltas = mixed.dense(pool, MODULE)
    found = pools.exact(fl.merge(pool, method="ctm", rule="sum", balance=1.0).updates[MODULE])
    kept = []
    for merged in (ctm(r, 1.0, "sum", ends=1e-6)(deltas, torch.ones(k), 0.0), found):
        U, _, Vh = torch.linalg.svd(merged)
        kept.append(float((U[:, :r].mT @ deltas @ Vh[:r].mT).square().sum() / deltas.square().sum()))
    assert kept[1] >= (1 - 5e-4) * kept[0]


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_rules_are_those_of_peft(density: float) -> None:
    """On elements that differ, where its exact count and our threshold keep the same."""
    owner = pytest.importorskip("peft.utils.merge_utils", reason="peft is not installed")
    stack = torch.randn(4, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    one = torch.ones(4, dtype=torch.float64)
    for rule, expected in (
        ("ties", owner.ties(list(stack), one, density)),
        ("magnitude", owner.magnitude_prune(list(stack), one, density)),
    ):
        elementwise = Elementwise("core", rule, density, "mean", 0, 0.0, 0.0, 1.0)  # type: ignore[arg-type]
        size = torch.tensor([9]), torch.tensor([7])
        found = elementwise.merged(stack[None], size, (["a", "b", "c", "d"], [MODULE]))[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("rule", ["dare", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("method", ["core", "knots"])
def test_random_masks(method: str, rule: str) -> None:
    """By the words of the elements' numbers, adapter by adapter, and by the ranks in a row."""
    parts = pools.ragged(3)
    given = {"density": 0.3} | ({"epsilon": 0.2} if "della" in rule else {})
    pool = pools.make_pool(parts)
    deltas = torch.stack([pools.dense(p) for p in parts])
    # A mask belongs to the rows of the basis; signs of its vectors change none.
    definition = {"core": core, "knots": knots}[method](rule, **given)
    expected = definition(deltas, torch.ones(3), 0.0)
    found = fl.merge(pool, method=method, rule=rule, seed=SEED, **given)
    assert mixed.distance(found, MODULE, expected) <= FLOAT32
    turned = fl.merge(pool.subset(["a2", "a0", "a1"]), method=method, rule=rule, seed=SEED, **given)
    assert mixed.distance(turned, MODULE, expected) <= FLOAT32
    assert mixed.distance(fl.merge(pool, method=method, rule=rule, **given), MODULE, expected) > 0.1
    everything = fl.merge(pool, method=method, rule="dare", density=1.0)
    assert mixed.distance(everything, MODULE, deltas.sum(0)) <= FLOAT32


@pytest.mark.parametrize("method", ["core", "knots", "ctm"])
def test_the_mean_of_dare_over_seeds_is_the_sum(method: str) -> None:
    """And so is that of DELLA without elected signs, where the sums of magnitudes are nearly kept."""
    pool = pools.make_pool(pools.planted(3))
    deltas, count, density = mixed.dense(pool, MODULE), 50, 0.5
    for rule, more, slack in (("dare", {}, 1.5), ("della_linear", {"epsilon": 0.0}, 2.0)):
        mean = torch.zeros_like(deltas[0])
        for seed in range(count):
            given = {
                "rule": rule,
                "density": density,
                "seed": seed,
                **more,
                **({"rank": 18} if method == "ctm" else {}),
            }
            mean += pools.exact(fl.merge(pool, method=method, **given).updates[MODULE]) / count  # type: ignore[arg-type]
        # Bases are orthonormal, so noise is that of the elements: √((1 − d)/d / count) of the root of all squares.
        noise = float(deltas.norm()) * ((1 - density) / density / count) ** 0.5
        assert float((mean - deltas.sum(0)).norm()) <= slack * noise, rule


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("method", ["core", "knots", "ctm"])
def test_what_takes_no_part_and_what_is_empty(method: str, rule: str) -> None:
    """Adapters of weight 0 change nothing, also where all are; one that is zero counts as one."""
    pool = pools.make_pool([*pools.planted(2), *pools.ragged(3)[2:]])
    given: dict[str, Any] = {"rule": rule} | ({"rank": 5} if method == "ctm" else {})
    whole = fl.merge(pool, {"a0": 0.7, "a2": -1.0}, method=method, **given)
    less = fl.merge(pool.subset(["a0", "a2"]), {"a0": 0.7, "a2": -1.0}, method=method, **given)
    assert mixed.distance(whole, MODULE, pools.exact(less.updates[MODULE])) <= FLOAT32
    if rule == "sce" and method != "ctm":
        given["select_topk"] = 0.5
    assert fl.merge(pool, {}, method=method, **given).updates[MODULE].rank == 0
    nothing = fl.Pool(mixed.with_module(a, MODULE, with_rank_zero(a.updates[MODULE])) for a in pool.adapters)
    assert fl.merge(nothing, method=method, **given).updates[MODULE].rank == 0


def test_rows_that_a_rule_trims_are_not_in_the_result() -> None:
    """Of two directions the short one, or all of them: A has the merged rows, B the basis of those alone."""
    frame = torch.linalg.qr(torch.randn(pools.N, 2, dtype=torch.float64, generator=generator(1))).Q
    right = torch.linalg.qr(torch.randn(pools.M, 2, dtype=torch.float64, generator=generator(2))).Q.mT
    for sizes, rank in (((1.0, 1e-3), 1), ((1e-3, 1.0), 1), ((1.0, 0.9), 2)):
        part = frame * torch.tensor(sizes, dtype=torch.float64), right, 1.0
        pool = pools.make_pool([part])
        merged = fl.merge(pool, method="knots", rule="magnitude", density=0.4)
        assert merged.updates[MODULE].rank == rank
        expected = knots("magnitude", density=0.4)(mixed.dense(pool, MODULE), torch.ones(1), 0.0)
        assert mixed.distance(merged, MODULE, expected) <= FLOAT32
    opposed = fl.merge(pools.make_pool([part, part]), {"a0": 1.0, "a1": -1.0}, method="knots", rule="sum")
    assert opposed.updates[MODULE].rank == 0


@pytest.mark.parametrize("topk", [0.4, 1.0])
def test_energies_of_rows_have_no_floor(topk: float) -> None:
    """Those of small updates count as those of large ones, also where no other agrees."""
    (B, A, s), *others = pools.planted(3, condition=2.0)
    half = torch.cat([A[:, : pools.M // 2], torch.zeros_like(A[:, pools.M // 2 :])], 1)
    for parts in ([(B, A, s), *others], [(B, half, 2e3 * s), *others]):
        small = pools.make_pool([(b, a, 1e-9 * t) for b, a, t in parts])
        expected = knots("sce", select_topk=topk)(torch.stack([pools.dense(p) for p in parts]), torch.ones(3), 0.0)
        found = fl.merge(small, method="knots", rule="sce", select_topk=topk)
        error = pools.exact(found.updates[MODULE]) * 1e9 - expected
        for columns in (slice(None), slice(pools.M // 2, None)):
            assert float(error[:, columns].norm()) <= FLOAT32 * float(expected[:, columns].norm())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_knots_keeps_all_of_equal_elements(rule: dict[str, Any]) -> None:
    """Columns that all updates have five times are five times in the result."""
    pool = pools.make_pool([(B, torch.cat([A] * 5, 1), s) for B, A, s in pools.ragged(3)])
    first, *others = pools.exact(fl.merge(pool, method="knots", **rule).updates[MODULE]).split(pools.M, 1)
    assert first.any() and all(torch.equal(first, other) for other in others)


def test_modules_of_one_group_are_as_each_alone() -> None:
    """Of other sizes, of fewer directions, with an A that is a multiple of the stored one; of any size in float32."""
    adapters = []
    for i, (B, A, s) in enumerate(pools.cast(pools.planted(3), torch.float32)):
        short = torch.cat([B[:, :1]] * B.shape[1], 1)
        adapter = pools.make_adapter(f"a{i}", {"q": (B, A, s), "k": (short, A, s), "v": (B, A, 1e-60), "o": (B, A, s)})
        turned = adapter.updates["o"]
        adapters.append(mixed.with_module(adapter, "o", replace(turned, A=turned.A.scaled(-3e60), noise=Noise(1e-9))))
    pool = fl.Pool(adapters)
    together = fl.merge(pool, method="knots", density=0.5)
    for module in pool.modules:
        alone = fl.merge(fl.Pool(fl.Adapter(a.name, {module: a.updates[module]}, dtype=a.dtype) for a in adapters),
                         method="knots", density=0.5).updates[module]  # fmt: skip
        deltas = mixed.dense(pool, module)
        expected = knots("ties", density=0.5, combine="mean")(deltas, torch.ones(3), 0.0)
        assert mixed.distance(together, module, expected) <= FLOAT32
        assert (together.updates[module].rank, together.updates[module].noise) == (alone.rank, alone.noise)


@pytest.mark.parametrize("method", ["core", "knots"])
def test_the_sum_needs_no_container(method: str) -> None:
    def total(deltas: Tensor, weights: Tensor, noise: float) -> Tensor:
        return deltas.sum(0)

    mixed.require_parity(method, total, FLOAT32, rule="sum")
    if method == "core":
        mixed.require_parity(method, total, FLOAT32, rule="magnitude", density=1.0, gauge="raw")


def test_raw_bases_are_those_of_the_stored_factors() -> None:
    """Those of the paper, without scalings; and the updates alone do not say what they are."""
    parts = pools.ragged(3)
    deltas = torch.stack([pools.dense(p) for p in parts])
    U, V = columns(torch.cat([b for b, _, _ in parts], 1)), columns(torch.cat([a for _, a, _ in parts]).mT)
    expected = U @ by_elements(U.mT @ deltas @ V, "ties") @ V.mT
    found = fl.merge(pools.make_pool(parts), method="core", gauge="raw")
    assert mixed.distance(found, MODULE, expected) <= FLOAT32
    b, a, s = parts[0]
    parts[0] = (b @ pools.mixing(b.shape[1], 5, 30.0), torch.linalg.inv(pools.mixing(b.shape[1], 5, 30.0)) @ a, s)
    moved = pools.make_pool(parts)
    assert mixed.distance(fl.merge(moved, method="core", gauge="raw"), MODULE, expected) > 0.01
    free = pools.exact(fl.merge(pools.make_pool(pools.ragged(3)), method="core").updates[MODULE])
    assert mixed.distance(fl.merge(moved, method="core"), MODULE, free) <= FLOAT32


def test_ctm_with_all_directions_loses_nothing() -> None:
    pool = pools.make_pool(pools.planted(3))
    total = mixed.dense(pool, MODULE).sum(0)
    assert mixed.distance(fl.merge(pool, method="ctm", rank=18, rule="sum"), MODULE, total) <= SUBSPACE64
    assert fl.merge(pool, method="ctm").updates[MODULE].rank == 6  # the largest of the pool


def test_results_can_be_cut() -> None:
    pool = pools.make_pool(pools.planted(3))
    for method in ("core", "knots"):
        whole, cut = fl.merge(pool, method=method), fl.merge(pool, method=method, rank=3)
        matrix = pools.exact(whole.updates[MODULE])
        sigma = torch.linalg.svdvals(matrix)
        error = float((pools.exact(cut.updates[MODULE]) - matrix).norm())
        assert cut.updates[MODULE].rank == 3 and error == pytest.approx(float(sigma[3:].norm()), rel=FLOAT32)
        kept = float(sigma[:3].square().sum() / sigma.square().sum())
        assert cut.provenance["retained_energy"] == pytest.approx(kept, rel=FLOAT32)


@pytest.mark.parametrize(("method", "parameters", "said"), [
    ("core", {"density": 0.0}, "core: density=0 must be above 0 and at most 1"),
    ("knots", {"density": 1.5}, "knots: density=1.5 must be"), ("ctm", {"density": -1.0}, "ctm: density=-1 must be"),
    ("ctm", {"balance": 2.0}, "ctm: balance=2 must be between 0 and 1"),
    ("ctm", {"energy": 0.5}, "method 'ctm' does not take energy"),
    ("core", {"rule": "fisher"}, "rule='fisher' does not exist: use one of sum, magnitude, breadcrumbs, breadcrumbs_t"),
    ("core", {"rule": "della", "density": 0.9}, "core: density=0.9 ± epsilon=0.15 must lie in"),
    ("knots", {"rule": "breadcrumbs", "gamma": 1.0}, "knots: gamma=1 must be at least 0 and below 1"),
    ("ctm", {"rule": "sce", "select_topk": 0.0}, "ctm: select_topk=0 must be above 0 and at most 1"),
    ("knots", {"rank": 0}, "rank=0 must be at least 1"),
])  # fmt: skip
def test_parameters_that_are_refused(method: str, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(fl.InputError, match=said):
        fl.merge(pools.make_pool(pools.planted(2)), method=method, **parameters)
