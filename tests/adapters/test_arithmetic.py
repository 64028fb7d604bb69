"""Exact arithmetic on adapters, in memory and through files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pools
import pytest
import torch
from builders import gaussian
from pools import MODULE, Part
from tolerances import FLOAT64, GRAM64, ROUNDOFF64
from torch import Tensor

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.core.data import BaseInfo, Extra
from fastlora.core.factors import Factor, Term
from fastlora.core.sums import combine_extras
from fastlora.core.updates import Layout

pytestmark = pytest.mark.portable

PARTS: list[Part] = [
    (gaussian(20, 3, seed=1), gaussian(3, 14, seed=2), 2.0),
    (gaussian(20, 5, seed=3).bfloat16(), gaussian(5, 14, seed=4).bfloat16(), -0.5),
    (gaussian(20, 1, seed=5).half(), gaussian(1, 14, seed=6).half(), 3.0),
]
A, B, C = (pools.dense(p) for p in PARTS)


def adapters(module: str = MODULE) -> list[Adapter]:
    return [pools.make_adapter(name, {module: part}) for name, part in zip("abc", PARTS, strict=True)]


def delta(adapter: Adapter, module: str = MODULE) -> Tensor:
    return pools.exact(adapter.update(module))


def close(got: Tensor, expected: Tensor, rtol: float = ROUNDOFF64) -> None:
    assert float((got - expected).norm()) <= rtol * float(expected.norm())


@pytest.mark.parametrize(("expression", "expected", "rank"), [
    (lambda a, b, c: a + b - c, A + B - C, 9), (lambda a, b, c: 0.7 * a - 0.3 * b, 0.7 * A - 0.3 * B, 8),
    (lambda a, b, c: -a, -A, 3), (lambda a, b, c: a / 4, A / 4, 3),
    (lambda a, b, c: 2 * (a + 3 * (b - c)), 2 * (A + 3 * (B - C)), 9),
    (lambda a, b, c: a + a, 2 * A, 6), (lambda a, b, c: a * 1e-9 + c * 1e9, 1e-9 * A + 1e9 * C, 4),
], ids=["a+b-c", "0.7a-0.3b", "-a", "a/4", "2(a+3(b-c))", "a+a", "scales"])  # fmt: skip
def test_expressions(expression: object, expected: Tensor, rank: int) -> None:
    result = expression(*adapters())  # type: ignore[operator]
    close(delta(result), expected)
    assert result.update(MODULE).rank == rank


def test_an_adapter_minus_itself_is_zero() -> None:
    a = adapters()[0]
    assert float(delta(a - a).abs().max()) <= ROUNDOFF64
    assert fl.merge(fl.Pool([a, adapters()[1]]), {"a": 0.0, "b": 0.0}, method="cat").update(MODULE).rank == 0


def test_weights_of_zero_leave_an_adapter_out() -> None:
    a, b, _ = adapters()
    result = Adapter.weighted_sum([(1.0, a), (0.0, b)])
    assert result.update(MODULE).rank == 3
    close(delta(result), A)


def test_modules_that_one_lacks_count_zero() -> None:
    result = adapters("x")[0] - adapters("y")[1]
    assert result.modules == ["x", "y"]
    close(delta(result, "x"), A)
    close(delta(result, "y"), -B)


def test_shapes_that_differ_are_refused() -> None:
    other = pools.make_adapter("other", {MODULE: (torch.ones(21, 1), torch.ones(1, 14), 1.0)})
    with pytest.raises(fl.InputError, match=f"{MODULE}: cannot add updates of shapes 20×14 and 21×14"):
        adapters()[0] + other


def test_layouts_that_differ_are_refused() -> None:
    a, b = adapters()[:2]
    b = replace(b, updates={MODULE: replace(b.updates[MODULE], layout=Layout("embedding"))})
    with pytest.raises(fl.InputError, match=r"different layouts \(linear and embedding\)"):
        a + b


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_saved_results_are_those_in_memory_rounded_once(dtype: str, tmp_path: Path) -> None:
    a, b, c = adapters()
    result = a + 0.3 * b - c
    loaded = fl.load(result.save(tmp_path / "sum", dtype=dtype))
    got = pools.materialise([loaded.update(MODULE)], torch.float64)[0]
    exact = pools.materialise([result.update(MODULE).baked()], torch.float64)[0]
    eps = torch.finfo(getattr(torch, dtype)).eps
    step = 2**-24 if dtype == "float16" else 0.0  # of float16 near zero; of the others it is below all that occurs
    for x, y in zip(got, exact, strict=True):  # half a unit in the last place, and what float64 rounds before
        assert ((x - y).abs() <= 0.5001 * (eps * y.abs() + step)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_an_untouched_adapter_is_saved_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    left, right = gaussian(20, 3, seed=1, dtype=dtype), gaussian(3, 14, seed=2, dtype=dtype)
    adapter = pools.make_adapter("a", {MODULE: (left, right, 1.0)})
    loaded = fl.load(adapter.save(tmp_path / "same"))
    assert loaded.dtype == dtype
    for got, expected in zip(pools.materialise([loaded.update(MODULE)], dtype)[0], (left, right), strict=True):
        assert torch.equal(got, expected)


def test_results_of_results() -> None:
    """A decomposition's part is an adapter like any other."""
    pool = pools.make_pool(pools.cast(pools.planted(2), torch.float32))
    found = fl.decompose(pool, 0.7)
    edited = pool["a0"] - 0.5 * found.shared + 2 * found.unique_of("a1")
    expected = (
        pools.exact(pool["a0"].update(MODULE))
        - 0.5 * pools.exact(found.shared.update(MODULE))
        + 2 * pools.exact(found.unique_of("a1").update(MODULE))
    )
    close(delta(edited), expected, FLOAT64)
    again = fl.decompose(fl.Pool([edited, pool["a1"]]), 0.5)
    close(delta(again.shared_of(edited.name) + again.unique_of(edited.name)), expected, GRAM64)


def test_gram_blocks_of_lazy_sums() -> None:
    """A sum that uses a matrix twice, beside the adapters it is made of."""
    pool = pools.make_pool(pools.cast(pools.planted(2), torch.float32))
    a0, a1 = pool.adapters
    total = replace(a0 + 0.5 * a1 + a0, name="total")
    lazy = fl.overlap(fl.Pool([total, a0, a1]))
    deltas = [pools.exact(x.update(MODULE)) for x in (total, a0, a1)]
    gram = torch.tensor([[float((x * y).sum()) for x in deltas] for y in deltas], dtype=torch.float64)
    expected = gram / (gram.diagonal()[:, None] * gram.diagonal()).sqrt()
    torch.testing.assert_close(lazy.cosine, expected, rtol=0, atol=GRAM64)


def test_columns_that_lie_on_one_another_are_not_side_by_side() -> None:
    x, y, small = torch.randn(5, 2), torch.randn(5, 2), torch.randn(4, 3, dtype=torch.float64)
    beside = Factor("B", 5, 4, (Term(x), Term(y, at=2, scale=0.5)))
    over = Factor("B", 5, 4, (Term(x), Term(y)))
    assert beside.joined is beside.terms and over.joined is None
    assert Factor("B", 5, 3, (Term(x),)).joined is None  # its last column is zero
    one, two = x.double(), y.double()  # sums of float32 numbers would be rounded
    for factor, dense in ((beside, torch.cat([one, 0.5 * two], 1)), (over, torch.cat([one + two, 0.0 * one], 1))):
        found = sum(t.scale * t.source.double() @ t.coefficient for t in factor.times(small).terms)
        torch.testing.assert_close(found, dense @ small)


def extras(kind: str, value: float, name: str = "head.weight") -> dict[str, Extra]:
    return {name: Extra(kind, torch.full((2,), value))}  # type: ignore[arg-type]


def with_extras(name: str, found: dict[str, Extra], module: str = MODULE) -> Adapter:
    return Adapter(name, {module: pools.update(*PARTS[0])}, extras=found)


def test_known_deltas_add_up() -> None:
    a, b = with_extras("a", extras("delta", 2.0)), with_extras("b", extras("delta", 10.0))
    total = (a - 0.5 * b).extras["head.weight"]
    assert total.kind == "delta" and total.tensor.tolist() == [-3.0, -3.0]
    assert (3 * with_extras("a", extras("delta", 2.0)) + with_extras("c", {})).extras[
        "head.weight"
    ].tensor.tolist() == [6.0, 6.0]


def test_replaced_values_are_kept_alone_and_refused_in_sums() -> None:
    a, plain = with_extras("a", extras("value", 2.0)), with_extras("b", {})
    assert (1.0 * a).extras["head.weight"].tensor.tolist() == [2.0, 2.0]
    for expression in (lambda: 2 * a, lambda: a + plain, lambda: -a, lambda: plain - a):
        with pytest.raises(fl.InputError, match=r"adapter 'a' replaces head.weight .*drop-extras"):
            expression()
    assert not (a.without_extras() + plain).extras
    assert combine_extras([(0.0, a), (1.0, plain)]) == {}


def test_a_copy_of_the_base_weight_stays() -> None:
    """PEFT saves the embedding beside its update; two adapters with the same copy can be added."""
    copy = extras("value", 2.0, f"{MODULE}.weight")
    a, b = with_extras("a", copy), with_extras("b", dict(copy))
    assert (a + b).extras[f"{MODULE}.weight"].tensor.tolist() == [2.0, 2.0]
    different = with_extras("b", extras("value", 3.0, f"{MODULE}.weight"))
    with pytest.raises(fl.InputError, match="replaces"):
        a + different
    with pytest.raises(fl.InputError, match="replaces"):
        a + with_extras("b", dict(copy), module="another")


def test_layers_replicated_differently_are_refused() -> None:
    a, b = (Adapter(n, {MODULE: pools.update(*PARTS[0])}, base=BaseInfo(layer_replication=r))
            for n, r in (("a", ((0, 2), (1, 3))), ("b", None)))  # fmt: skip
    with pytest.raises(fl.InputError, match="replicate layers differently"):
        a + b


def test_merge_weights() -> None:
    pool = fl.Pool(adapters())
    close(delta(fl.merge(pool, method="cat")), A + B + C)
    merged = fl.merge(pool, {"a": 2.0, "c": -1.0}, method="cat")
    close(delta(merged), 2 * A - C)
    assert merged.notes == ("b has no weight and counts 0",)
    with pytest.raises(fl.InputError, match="weights name 'd', which the pool does not have: a, b, c"):
        fl.merge(pool, {"d": 1.0})
    with pytest.raises(fl.InputError, match="weight of 'a' is nan: it must be a finite number"):
        fl.merge(pool, {"a": float("nan")})
    with pytest.raises(fl.InputError, match=r"method 'none' does not exist: use one of .*cat, .*pem, .*svd"):
        fl.merge(pool, method="none")
    with pytest.raises(fl.InputError, match="method 'cat' does not take rank"):
        fl.merge(pool, method="cat", rank=3)


def test_methods_are_listed_at_any_time() -> None:
    """Before and after a method was used, whose file is imported then."""
    assert set(fl.methods()) >= {"cat", "pem", "svd"}
    assert fl.methods()["cat"].name == "cat"
