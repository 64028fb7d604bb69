"""TIES that trims all modules together, against the same definition on one long vector of every adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mixed
import pools
import pytest
import torch
from builders import gaussian
from torch import Tensor

import fastlora as fl
from fastlora.merging.forms.tile_tasks import task_of
from fastlora.merging.forms.whole_model import counts_kept
from fastlora.ops.merge_tiles import TileTask

TOLERANCE = 1e-13  # elements, sums and LAPACK's decomposition in float64
SHAPES = {"v": (9, 7), "q": (12, 10), "up": (5, 21), "zero": (4, 4)}
WEIGHTS = [0.5, -1.0, 2.0]


def pool_of(kind: str) -> fl.Pool:
    """Three adapters of modules of unlike sizes, some of which one adapter lacks."""
    adapters = []
    for i in range(3):
        parts = {}
        for j, (module, (n, m)) in enumerate(SHAPES.items()):
            if module == "zero" and i != 1:
                continue
            B, A = gaussian(n, 2, seed=10 * i + j), 3.0**j * gaussian(2, m, seed=50 + 10 * i + j)
            if kind == "ties":  # few numbers, so that thousands of elements are equal
                B, A = B.sign(), A.sign()
            if kind == "float64":
                B, A = B.double(), A.double() * 1.1
            if kind == "bfloat16":
                B, A = B.bfloat16(), A.bfloat16()
            if kind == "one zero" and i == 2:
                B = torch.zeros_like(B)
            parts[module] = (B, A, (1.0, -0.5, 2.0)[i])
        adapters.append(pools.make_adapter(f"a{i}", parts))
    return fl.Pool(adapters)


KINDS = ["float32", "float64", "bfloat16", "ties", "one zero"]


def flat(pool: fl.Pool) -> tuple[list[str], Tensor]:
    """Modules in the order of names, and all elements of every adapter in that order: ``[k, N]``."""
    modules = sorted(pool.modules)
    return modules, torch.cat([mixed.dense(pool, m).flatten(1) for m in modules], 1)


def kept_of(values: Tensor, density: float, all_equals: bool) -> Tensor:
    """What every adapter keeps: of equals the first, or all."""
    q = int(density * values.shape[1])
    kept = torch.zeros_like(values, dtype=torch.bool)
    for i, row in enumerate(values.abs()):
        order = row.sort(descending=True, stable=True)
        kept[i, order.indices[:q]] = True
        if all_equals and q:
            kept[i] |= row >= order.values[q - 1]
    return kept & (values != 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.001, 0.01, 0.2, 0.75, 1.0])
@pytest.mark.parametrize("all_equals", [False, True])
def test_counts_are_those_of_one_long_vector(kind: str, density: float, all_equals: bool) -> None:
    pool = pool_of(kind)
    passes = 0

    def visit(look: Callable[[str, TileTask], Any]) -> dict[str, Any]:
        nonlocal passes
        passes += 1
        return {m: look(m, task_of(pool, m, [0, 1, 2], WEIGHTS)) for m in pool.modules}

    found = counts_kept(visit, 3, density, all_equals=all_equals)
    modules, values = flat(pool)
    if kind != "float64":  # elements are formed in float32
        values = torch.cat([_as_formed(pool, m) for m in modules], 1).double()
    kept = kept_of(values, density, all_equals)
    sizes = [SHAPES[m][0] * SHAPES[m][1] for m in modules]
    for module, part, whole in zip(modules, kept.split(sizes, 1), values.split(sizes, 1), strict=True):
        expected, there = part.sum(1).tolist(), (whole != 0).sum(1).tolist()
        # Elements that are zero do not count: to keep them, or not, is the same.
        assert [min(n, most) for n, most in zip(found[module], there, strict=True)] == expected, module
    assert passes <= 30


def _as_formed(pool: fl.Pool, module: str) -> Tensor:
    from fastlora.ops.merge_tiles import TileOutputs, TileRule, merge

    task = task_of(pool, module, [0, 1, 2], WEIGHTS)
    rows = []
    for i in range(3):
        dense = torch.zeros(task.shape)
        merge(task, TileRule(gains=[float(i == j) for j in range(3)]), TileOutputs(dense=dense))
        rows.append(dense.flatten())
    return torch.stack(rows)


def ties(values: Tensor, density: float, convention: str, given: Sequence[float] = WEIGHTS) -> Tensor:
    """Of ``[k, N]``."""
    weights = torch.tensor(given, dtype=torch.float64)[:, None]
    v = torch.where(kept_of(values, density, convention == "paper"), values, 0.0)
    votes = v * weights if convention == "mergekit" else v
    sign = votes.sum(0).sign()
    majority = -1.0 if convention == "paper" and float(sign.sum()) < 0 else 1.0
    agree = (votes != 0) & (votes.sign() == torch.where(sign == 0, majority, sign))
    divisor = (agree * weights).sum(0) if convention == "mergekit" else agree.sum(0).double()
    return (v * weights * agree).sum(0) / torch.where(divisor == 0, 1.0, divisor)


@pytest.mark.parametrize("convention", ["peft", "mergekit", "paper"])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_it_is_ties_of_one_long_vector(density: float, convention: str) -> None:
    pool = pool_of("float64")
    given = {"method": "ties", "density": density, "convention": convention, "rank": 40}
    merged = fl.merge(pool, dict(zip(pool.names, WEIGHTS, strict=True)), scope="model", **given)  # type: ignore[arg-type]
    modules, values = flat(pool)
    expected = ties(values, density, convention).split([SHAPES[m][0] * SHAPES[m][1] for m in modules])
    for module, part in zip(modules, expected, strict=True):
        assert mixed.distance(merged, module, part.view(SHAPES[module])) <= TOLERANCE, module
    assert merged.provenance["parameters"]["scope"] == "model"  # type: ignore[index]


def test_the_paper_trims_all_modules_together_and_others_each() -> None:
    pool = pool_of("float64")
    for convention, scope in (("paper", "model"), ("peft", "module"), ("mergekit", "module")):
        plain, told, other = (
            fl.merge(pool, method="ties", convention=convention, rank=40, **({} if s is None else {"scope": s}))
            for s in (None, scope, {"model": "module", "module": "model"}[scope])
        )
        same, differs = (
            all(torch.equal(pools.exact(plain.updates[m]), pools.exact(x.updates[m])) for m in pool.modules)
            for x in (told, other)
        )
        assert same and not differs, convention


def test_where_values_cancel_the_sign_is_that_of_most_places_of_all_modules() -> None:
    """One module by itself would say plus."""
    rows = {"many": ([[-1.0, -1.0, -3.0]], [[-1.0, -1.0, -3.0]]), "few": ([[1.0, 2.0]], [[1.0, -2.0]])}
    one = torch.ones(1, 1, dtype=torch.float64)
    adapters = [
        pools.make_adapter(f"a{i}", {m: (one, torch.tensor(x[i], dtype=torch.float64), 1.0) for m, x in rows.items()})
        for i in range(2)
    ]
    for scope, last in (("model", -2.0), ("module", 2.0)):
        merged = fl.merge(fl.Pool(adapters), method="ties", density=1.0, convention="paper", scope=scope, rank=2)
        expected = torch.tensor([[1.0, last]], dtype=torch.float64)
        assert mixed.distance(merged, "few", expected) <= TOLERANCE, scope


def test_what_was_wrong_is_told_before_any_pass() -> None:
    with pytest.raises(fl.InputError, match="gives matrices of full rank"):
        fl.merge(pool_of("float32"), method="ties", scope="model")
    with pytest.raises(fl.InputError, match="scope='layer' does not exist: use one of module, model"):
        fl.merge(pool_of("float32"), method="ties", scope="layer", rank=3)
