"""What several ranks share has the bits of one: every merge method, similarities, modulated and decomposed adapters.

Ranks are threads here; tests/cli/test_ranks.py has processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pools
import pytest
import torch
from builders import gaussian
from thread_ranks import on_ranks

import fastlora as fl
from fastlora.coefficients.weights import METHODS as WEIGHTS_OF
from fastlora.core.data import LoraData, Magnitude
from fastlora.core.updates import sources
from fastlora.engine import low_rank
from fastlora.engine.checks import require_finite
from fastlora.errors import InputError, NonFiniteError
from fastlora.merging.default import choose
from fastlora.merging.input_rows import InputRows, Statistics
from fastlora.merging.kept import kept_of_each
from fastlora.runtime import ranks

SHAPES = {f"layers.{i}.{kind}": shape for i in range(4) for kind, shape in (("q", (40, 24)), ("v", (9, 24)))}
PARAMETERS: dict[str, dict[str, Any]] = {"svd": {"rank": 3}, "ctm": {"rank": 2}, "slerp": {"t": 0.3}}


def pool_of(count: int, of: tuple[int, ...] = (3, 2, 4), *, alike: bool = False) -> fl.Pool:
    """Modules of unlike shapes; unless they are ``alike``, adapters of unlike ranks, one of which lacks a module, and
    one is zero in another."""
    adapters = []
    for i in range(count):
        parts = {}
        for j, (module, (n, m)) in enumerate(SHAPES.items()):
            rank = 3 if alike else of[i]
            B, A = gaussian(n, rank, seed=100 * i + j), gaussian(rank, m, seed=100 * i + j + 50)
            if alike or (i, j) != (1, 2):
                parts[module] = (B if alike or (i, j) != (0, 3) else 0 * B, A, 1.0 if alike else 0.5 + i)
        adapters.append(pools.make_adapter(f"a{i}", parts))
    return fl.Pool(adapters)


def bits(adapter: LoraData) -> dict[str, Any]:
    """All that an adapter says, to the last bit."""
    stored = {m: [s.clone() for s in sources([u])] for m, u in adapter.updates.items()}
    factors = {m: fl.Adapter("x", {m: u}).factors(m) for m, u in adapter.updates.items()}
    return {"stored": stored, "factors": factors, "told": (adapter.provenance, adapter.notes, adapter.details)}


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def require_one_result(work: Callable[[], Any], counts: tuple[int, ...] = (2, 3)) -> None:
    """Any number of ranks gets what one does, all of them the same."""
    (alone,) = on_ranks(1, work)
    for count in counts:
        for of_rank in on_ranks(count, work):
            assert same(alone, of_rank), count


@pytest.mark.parametrize("name", [n for n, m in fl.methods().items() if not m.takes_data])
def test_merge_methods(name: str) -> None:
    pool = pool_of(2 if name == "slerp" else 3, alike=name == "pem")
    parameters = PARAMETERS.get(name, {"rank": 3, "min_energy": 0.0} if fl.methods()[name].form == "tiles" else {})
    parameters = parameters | {
        p.name: 0.5 for p in fl.methods()[name].parameters.values() if p.required and p.name not in parameters
    }
    weights = dict(zip(pool.names, (0.7, -0.2, 1.1), strict=False))
    require_one_result(lambda: bits(fl.merge(pool, weights, method=name, **parameters)), (2,))


@pytest.mark.parametrize("scope", ["model", "module"])
def test_rules_of_the_whole_model(scope: str) -> None:
    pool = pool_of(3)
    given: dict[str, Any] = {"convention": "paper", "rank": 3, "min_energy": 0.0}
    require_one_result(lambda: bits(fl.merge(pool, method="ties", scope=scope, **given)))


@pytest.mark.parametrize("name", [n for n, m in fl.methods().items() if m.takes_data])
def test_merge_methods_on_inputs(name: str) -> None:
    pool = pool_of(3)
    rows = {m: gaussian(9, shape[1], seed=j) for j, (m, shape) in enumerate(SHAPES.items())}
    data = Statistics({n: InputRows(rows, {m: m for m in rows}, dict.fromkeys(rows, 9)) for n in pool.names})
    require_one_result(lambda: bits(fl.merge(pool, method=name, data=data)), (2,))


@pytest.mark.parametrize("count", [3, 40])
def test_similarities(count: int) -> None:
    pool = pool_of(count, tuple(1 + i % 3 for i in range(count)))

    def work() -> Any:
        found = fl.overlap(pool, modules=True)
        return found.cosine, found.subspace, found.norms, found.modules

    require_one_result(work)


@pytest.mark.parametrize("granularity", ["column", "component", "matrix"])
def test_modulated(granularity: str) -> None:
    pool = pool_of(3)
    a, b, c = pool.adapters
    operators = [fl.dipm.shift(b, c, 0.3), fl.dipm.reverse(0.5)]
    require_one_result(lambda: bits(fl.modulate(a, operators, granularity=granularity)))


def test_decomposed_and_composed() -> None:
    pool = pool_of(3)

    def work() -> Any:
        parts = fl.decompose(pool, 0.3)
        of = dict(zip(pool.names, pool.adapters, strict=True))
        composed = fl.compose("compress(a0 - 0.5*unique(a1 | a2), 2)", of)
        return [bits(parts.unique_of(n)) for n in pool.names], bits(composed)

    require_one_result(work)


def test_merged_without_a_method() -> None:
    pool = pool_of(3)

    def work() -> Any:
        merged = fl.merge(pool, choose(pool, None, rank=None, energy=None).weights, rank=2)
        return bits(merged), kept_of_each(pool, merged)

    require_one_result(work)


@pytest.mark.parametrize("name", sorted(WEIGHTS_OF))
def test_weights(name: str) -> None:
    require_one_result(lambda: fl.weights(pool_of(3, alike=True), name))


def test_extracted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "EXACT_SIDE", 10)  # some by the range finder, some exactly
    base = {f"{m}.weight": gaussian(*shape, seed=j) for j, (m, shape) in enumerate(SHAPES.items())}
    base |= {f"layers.{i}.norm.weight": gaussian(1, 24, seed=90 + i)[0] for i in range(4)}
    tuned = {n: w + 0.1 * gaussian(*w.shape, seed=200 + j) for j, (n, w) in enumerate(base.items())}
    tuned["layers.2.q.weight"] = base["layers.2.q.weight"].clone()
    require_one_result(lambda: bits(fl.extract(base, tuned, rank=4, norms=None)))
    require_one_result(lambda: bits(fl.extract(base, tuned, energy=0.8, exact=True, exclude=["v"])), (2,))


def test_dora_to_lora() -> None:
    base = {f"{m}.weight": gaussian(*shape, seed=j) for j, (m, shape) in enumerate(SHAPES.items())}
    updates = dict(pool_of(1, alike=True).adapters[0].updates)
    vectors = {m: Magnitude(1 + 0.1 * gaussian(1, SHAPES[m][0], seed=9)[0], "out") for m in list(updates)[1:]}
    require_one_result(lambda: bits(fl.to_lora(fl.DoRA("d", updates, vectors), base, rank=3)))


def test_models_that_differ_among_ranks_are_refused() -> None:
    base = {"q.weight": gaussian(20, 30, seed=1)}

    def work() -> None:
        members = ranks.current()
        seed = 0 if members is None else members.rank
        fl.extract(base, {"q.weight": gaussian(20, 30, seed=5 + seed)}, rank=2)

    on_ranks(1, work)
    with pytest.raises(ranks.RankError, match="rank 1 does or reads something else"):
        on_ranks(2, work)


def test_the_first_factor_that_is_not_finite_is_named_by_all(tmp_path: Path) -> None:
    pool = pool_of(3)
    for adapter, module, side in ((1, "layers.3.q", "A"), (1, "layers.1.v", "B"), (2, "layers.0.q", "A")):
        update = pool.adapters[adapter].updates[module]
        (update.A if side == "A" else update.B).terms[0].source[0, 0] = torch.nan

    def work() -> str:
        with pytest.raises(NonFiniteError) as caught:
            require_finite(pool.adapters)
        return str(caught.value)

    assert {*on_ranks(1, work), *on_ranks(3, work)} == set(on_ranks(1, work))
    assert "lora_B of layers.1.v" in on_ranks(2, work)[1]


def test_an_error_of_one_rank_is_that_of_all() -> None:
    pool = pool_of(2, alike=True)
    huge = dict.fromkeys(pool.names, 1e160)
    for count in (1, 2):
        with pytest.raises(InputError, match="lower the weights"):
            on_ranks(count, lambda: fl.merge(pool, huge, method="tsv"))
