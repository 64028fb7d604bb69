"""Decompositions by inputs, against dense float64 matrices, and what they are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pools
import pytest
import torch
from builders import gaussian
from tolerances import FLOAT32
from torch import Tensor

import fastlora as fl
from fastlora.errors import InputError, NonFiniteError
from fastlora.merging.input_rows import InputRows, Statistics
from fastlora.reference.input_filter import input_filter

SHAPES = {"wide": (12, 31), "tall": (26, 9)}
COUNTS = {"few": (5, 4, 6), "many": (40, 17, 64)}


def pool_of(dtype: torch.dtype = torch.float32) -> fl.Pool:
    """Ragged ranks and scalings; the third adapter lacks a module."""
    adapters = []
    for i, (rank, scaling) in enumerate(((3, 2.0), (5, -0.5), (2, 1.0))):
        parts = {
            m: (
                gaussian(n, rank, seed=10 * i + j, dtype=dtype),
                gaussian(rank, w, seed=50 + 10 * i + j, dtype=dtype),
                scaling,
            )
            for j, (m, (n, w)) in enumerate(SHAPES.items())
        }
        adapters.append(pools.make_adapter(f"a{i}", parts if i < 2 else {"wide": parts["wide"]}))
    return fl.Pool(adapters)


def statistics(pool: fl.Pool, counts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Statistics:
    generator = torch.Generator().manual_seed(3)
    groups = {}
    for count, adapter in zip(counts, pool.adapters, strict=True):
        rows = {}
        for module, (_, m) in SHAPES.items():
            x = torch.randn(count, m, generator=generator) * torch.rand(m, generator=generator) + 0.3
            x[:, 0] = 0.0  # an input that is never used
            rows[module] = x.to(dtype)
        groups[adapter.name] = InputRows(rows, {m: m for m in rows}, {m: count for m in rows})
    return Statistics(groups)


def expected(pool: fl.Pool, data: Statistics, name: str, module: str, mu: float, ridge: float) -> Tensor:
    """The dense unique part."""
    update = pool[name].updates[module]
    B, A = (sum((s.double() @ c for s, c in update.B.coefficients()), torch.zeros(())),
            sum((c.mT @ s.double() for s, c in update.A.coefficients()), torch.zeros(())))  # fmt: skip
    others = [own.rows[module] for other, own in data.of.items() if other != name]
    return update.scaling * B @ input_filter(A, data.of[name].rows[module], others, mu, ridge)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0, 20.0])
@pytest.mark.parametrize("ridge", [1e-4, 0.5])
@pytest.mark.parametrize("counts", COUNTS)
def test_parts_are_their_definition(counts: str, ridge: float, mu: float, dtype: torch.dtype) -> None:
    pool = pool_of(dtype)
    data = statistics(pool, COUNTS[counts], dtype)
    parts = fl.decompose(pool, inputs=data, mu=mu, ridge=ridge)
    for adapter in pool.adapters:
        unique, shared = parts.unique_of(adapter.name), parts.shared_of(adapter.name)
        assert unique.modules == shared.modules == adapter.modules
        for module in adapter.modules:
            whole = pools.exact(adapter.updates[module])
            wanted = expected(pool, data, adapter.name, module, mu, ridge)
            found = pools.exact(unique.updates[module])
            assert float((found - wanted).norm()) <= FLOAT32 * float(whole.norm())
            assert float((found + pools.exact(shared.updates[module]) - whole).norm()) <= FLOAT32 * float(whole.norm())
            assert unique.updates[module].rank == adapter.updates[module].rank


@pytest.mark.parametrize("counts", COUNTS)
def test_the_report_has_what_dense_matrices_say(counts: str) -> None:
    pool = pool_of()
    data = statistics(pool, COUNTS[counts])
    parts = fl.decompose(pool, inputs=data, mu=0.7, ridge=1e-3)
    for total in parts.report.total:
        adapter = pool[total.adapter]
        for step, shares in total.at.items():
            sums = torch.zeros(6, dtype=torch.float64)
            for m in adapter.modules:
                whole = pools.exact(adapter.updates[m])
                X = expected(pool, data, adapter.name, m, 0.7 * float(step), 1e-3)
                own = data.of[adapter.name].rows[m].double()
                rest = [own_.rows[m].double() for n, own_ in data.of.items() if n != adapter.name]

                def on(W: Tensor, rows: Tensor) -> Tensor:
                    return (W @ rows.mT).square().sum() / len(rows)

                sums += torch.stack([
                    X.square().sum(), whole.square().sum(), on(X - whole, own), on(whole, own),
                    sum((on(X, r) for r in rest), torch.zeros(())), sum((on(whole, r) for r in rest), torch.zeros(())),
                ])  # fmt: skip
            wanted = [sums[0] / sums[1], 1 - sums[2] / sums[3], sums[4] / sums[5]]
            torch.testing.assert_close(
                torch.tensor(shares, dtype=torch.float64), torch.stack(wanted), rtol=1e-6, atol=1e-9
            )
        assert (total.norm_kept, total.own_kept, total.others_left) == total.at["1"]


def test_more_weight_leaves_less_to_others() -> None:
    pool = pool_of()
    data = statistics(pool, COUNTS["many"])
    left = [fl.decompose(pool, inputs=data, mu=mu).report.total[0].others_left for mu in (0.0, 0.1, 1.0, 10.0, 100.0)]
    assert left == sorted(left, reverse=True) and left[0] > 0.9 and left[-1] < 0.1


def test_disjoint_inputs_leave_everything_unique_and_equal_ones_a_share() -> None:
    """Inputs of two adapters in two orthogonal subspaces: nothing is shared on them. The same inputs for both: with
    μ = 1, half of it is."""
    left, right = torch.zeros(40, 31), torch.zeros(40, 31)
    generator = torch.Generator().manual_seed(1)
    left[:, :10] = torch.randn(40, 10, generator=generator)
    right[:, 10:20] = torch.randn(40, 10, generator=generator)
    pool = fl.Pool([a.select("wide") if hasattr(a, "select") else only(a, "wide") for a in pool_of().adapters[:2]])

    def data(first: Tensor, second: Tensor) -> Statistics:
        rows = {"a0": first, "a1": second}
        return Statistics({n: InputRows({"wide": x}, {"wide": "wide"}, {"wide": 40}) for n, x in rows.items()})

    apart = fl.decompose(pool, inputs=data(left, right), ridge=1e-9)
    A = pool["a0"].factors("wide")[1]
    torch.testing.assert_close(apart.unique_of("a0").factors("wide")[1][:, :10], A[:, :10], rtol=1e-5, atol=1e-5)
    assert apart.report.total[0].own_kept > 1 - 1e-9 and apart.report.total[0].others_left < 1e-9
    same = fl.decompose(pool, inputs=data(left, left), ridge=1e-9)
    torch.testing.assert_close(same.unique_of("a0").factors("wide")[1][:, :10], A[:, :10] / 2, rtol=1e-5, atol=1e-5)


def only(adapter: fl.Adapter, module: str) -> fl.Adapter:
    return fl.Adapter(adapter.name, {module: adapter.updates[module]}, dtype=adapter.dtype)


def test_parts_are_saved_and_read_again(tmp_path: Path) -> None:
    pool = pool_of()
    data = statistics(pool, COUNTS["few"])
    data.save(tmp_path / "inputs.safetensors")
    parts = fl.decompose(pool, inputs=tmp_path / "inputs.safetensors")
    parts.save(tmp_path / "out")
    for place, part in parts.adapters().items():
        read = fl.load(tmp_path / "out" / place)
        for module in part.modules:
            assert float((read.delta(module) - part.delta(module)).norm()) <= FLOAT32 * float(part.delta(module).norm())
        assert "mu: 1.0" in (tmp_path / "out" / place / "README.md").read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["mode"] == "inputs" and [t["adapter"] for t in report["reports"][0]["total"]] == pool.names
    parts.save(tmp_path / "out", overwrite=True)


def test_rows_that_modules_share_are_multiplied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlora.merging import input_rows

    pairs: dict[str, Any] = {m: (gaussian(6, 2, seed=i), gaussian(2, 9, seed=9 + i)) for i, m in enumerate("qkv")}
    pool = fl.Pool([fl.Adapter.from_tensors(pairs, name=name) for name in "ab"])
    rows = gaussian(4, 9, seed=3)
    data = Statistics({n: InputRows({"q": rows}, dict.fromkeys("qkv", "q"), {"q": 4}) for n in "ab"})
    made = []
    products = input_rows.row_grams
    monkeypatch.setattr(input_rows, "row_grams", lambda sites: made.append(len(sites)) or products(sites))
    for mu in (1.0, 2.0):
        assert fl.decompose(pool, inputs=data, mu=mu).report.total
    assert sum(made) == 1


def test_inputs_that_are_zero_leave_nothing() -> None:
    pool = pool_of()
    data = statistics(pool, COUNTS["few"])
    for own in data.of.values():
        for x in own.rows.values():
            x.zero_()
    parts = fl.decompose(pool, inputs=data)
    assert float(parts.unique_of("a0").delta("wide").norm()) == 0.0
    assert parts.report.total[0].norm_kept == 0.0 and parts.report.total[0].own_kept == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mu": -1.0}, "mu=-1.0"),
        ({"mu": float("nan")}, "mu=nan"),
        ({"ridge": 0.0}, "ridge=0.0"),
        ({"chain": "mean"}, "chain has no effect on a decomposition by inputs"),
        ({"rank": 2}, "rank has no effect"),
        ({"order": ["a0"]}, "order has no effect"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_parameters_are_refused(given: dict[str, Any], message: str) -> None:
    pool = pool_of()
    with pytest.raises(InputError, match=message):
        fl.decompose(pool, inputs=statistics(pool, COUNTS["few"]), **given)


def test_statistics_of_something_else_are_refused() -> None:
    pool = pool_of()
    data = statistics(pool, COUNTS["few"])
    with pytest.raises(InputError, match=r"have none of 'a2'; they have a0, a1"):
        fl.decompose(pool, inputs=Statistics({n: data.of[n] for n in ("a0", "a1")}))
    with pytest.raises(InputError, match=r"lack module 'tall'"):
        rows = data.of["a1"].rows["wide"]
        fl.decompose(pool, inputs=Statistics({**data.of, "a1": InputRows({"wide": rows}, {"wide": "wide"})}))
    with pytest.raises(InputError, match=r"rows of different lengths|of another model"):
        wrong = InputRows({"wide": torch.ones(3, 4), "tall": torch.ones(3, 9)}, {"wide": "wide", "tall": "tall"})
        fl.decompose(pool, inputs=Statistics({**data.of, "a1": wrong}))
    with pytest.raises(InputError, match=r"mu belongs to a decomposition by inputs"):
        fl.decompose(pool, mu=1.0)
    with pytest.raises(InputError, match=r"nothing to share"):
        fl.decompose(pool.subset(["a0"]), inputs=data)


@pytest.mark.parametrize("side", [0, 1], ids=["B", "A"])
@pytest.mark.parametrize("counts", [(5, 4, 6), (0, 4, 6)], ids=["rows", "no rows of its own"])
def test_a_factor_that_is_not_finite_is_named(counts: tuple[int, ...], side: int) -> None:
    pool = pool_of()
    data = statistics(pool, counts)
    update = pool["a0"].updates["tall"]
    (update.B, update.A)[side].terms[0].source[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"'a0': lora_{'BA'[side]} of tall holds NaN or Inf"):
        fl.decompose(pool, inputs=data)


def test_ridges_that_rounding_hides_are_refused() -> None:
    pool = pool_of()
    data = statistics(pool, COUNTS["few"])
    for own in data.of.values():
        for x in own.rows.values():
            x[1:] = x[:1]  # one row, again and again
    with pytest.raises(InputError, match=r"ridge=1e-30 is lost in the rounding"):
        fl.decompose(pool, inputs=data, ridge=1e-30)


def test_many_rows_of_one_adapter() -> None:
    """Pieces of rows, and as many as the products have room for."""
    pairs = {"w": (gaussian(6, 3, seed=1), gaussian(3, 300, seed=2))}
    pool = fl.Pool([fl.Adapter.from_tensors(pairs, name="a"), fl.Adapter.from_tensors(pairs, name="b")])
    rows = {"a": gaussian(150, 300, seed=3), "b": gaussian(7, 300, seed=4)}
    data = Statistics({n: InputRows({"w": x}, {"w": "w"}, {"w": len(x)}) for n, x in rows.items()})
    for mu in (1.0, 3.0):
        parts = fl.decompose(pool, inputs=data, mu=mu)
        for name in "ab":
            wanted = expected(pool, data, name, "w", mu, 1e-4)
            found = pools.exact(parts.unique_of(name).updates["w"])
            assert float((found - wanted).norm()) <= FLOAT32 * float(wanted.norm())


@pytest.mark.parametrize("kind", ["one strong input", "rows of all", "decaying", "huge", "tiny"])
def test_hard_inputs(kind: str) -> None:
    """What makes products of rows ill-conditioned, and what would overflow or vanish in less than float64."""
    pool = pool_of(torch.bfloat16)
    data = statistics(pool, COUNTS["few"])
    common = gaussian(3, 31, seed=9)
    for own in data.of.values():
        x = own.rows["wide"]
        if kind == "one strong input":
            x[:, 7] += 1e3
        elif kind == "rows of all":
            x[:3] = common
        elif kind == "decaying":
            x *= torch.logspace(0, -5, 31)
        else:
            x *= 1e12 if kind == "huge" else 1e-12
    for mu in (0.3, 1.0):
        parts = fl.decompose(pool, inputs=data, mu=mu)
        for name in pool.names:
            whole = pools.exact(pool[name].updates["wide"])
            found = pools.exact(parts.unique_of(name).updates["wide"])
            assert float((found - expected(pool, data, name, "wide", mu, 1e-4)).norm()) <= 1e-8 * float(whole.norm())


def test_an_update_of_rank_zero_and_statistics_of_others() -> None:
    empty = {"wide": (torch.zeros(12, 0), torch.zeros(0, 31))}
    pool = fl.Pool([only(pool_of().adapters[0], "wide"), fl.Adapter.from_tensors(empty, name="a1")])
    data = statistics(pool_of(), COUNTS["few"])
    other = InputRows({"wide": torch.ones(2, 5)}, {"wide": "wide"}, {"wide": 2})  # of no adapter of the pool
    parts = fl.decompose(pool, inputs=Statistics({**data.of, "of another model": other}))
    assert parts.unique_of("a1").updates["wide"].rank == 0 and parts.report.total[1].norm_kept == 0.0
    assert 0.0 < parts.report.total[0].norm_kept < 1.0


@pytest.mark.parametrize("counts", COUNTS)
def test_statistics_that_were_used_before_give_the_same_bits(counts: str) -> None:
    pool = pool_of()
    used = statistics(pool, COUNTS[counts])
    for mu, ridge in ((1.0, 1e-4), (1.0, 0.1), (0.5, 0.1), (1.0, 1e-4)):
        parts, fresh = (
            fl.decompose(pool, inputs=x, mu=mu, ridge=ridge) for x in (used, statistics(pool, COUNTS[counts]))
        )
        for name in pool.names:
            for module in pool[name].modules:
                assert torch.equal(parts.unique_of(name).delta(module), fresh.unique_of(name).delta(module))
    bounded = fl.decompose(pool, inputs=used, memory="1GiB")
    assert torch.equal(bounded.unique_of("a0").delta("wide"), fresh.unique_of("a0").delta("wide"))
    assert bounded.report.total == fresh.report.total
