"""Cosines of updates and overlaps of subspaces against dense matrices."""

from __future__ import annotations

import pools
import pytest
import torch
from pools import MODULE, Part
from tolerances import FLOAT64, GRAM64, SUBSPACE64, WEAK64
from torch import Tensor

import fastlora as fl
from fastlora.reference.devec import devec


def expected(parts: list[Part], rtol: float = 1e-6) -> tuple[Tensor, Tensor]:
    """``⟨ΔW_i, ΔW_j⟩/(‖ΔW_i‖‖ΔW_j‖)`` and ``tr(P_i P_j)/min(q_i, q_j)``."""
    deltas = [pools.dense(p) for p in parts]
    found = devec(deltas, 0.5, rtol=rtol)
    k = len(parts)
    cosine, space = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64)
    for i in range(k):
        for j in range(k):
            cosine[i, j] = (deltas[i] * deltas[j]).sum() / (deltas[i].norm() * deltas[j].norm())
            trace = (found.projectors[i] * found.projectors[j]).sum()
            space[i, j] = trace / min(found.kept[i], found.kept[j]) if min(found.kept[i], found.kept[j]) else torch.nan
    return cosine, space


@pytest.mark.parametrize("pool", [p for p in pools.POOLS if p != "crowded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense(pool: str, dtype: torch.dtype) -> None:
    parts = pools.cast(pools.POOLS[pool](4), dtype)
    found = fl.overlap(pools.make_pool(parts), modules=True)
    cosine, space = expected(parts, max(1e-6, torch.finfo(dtype).eps))
    assert found.names == ["a0", "a1", "a2", "a3"]
    for got, wanted in ((found.cosine, cosine), (found.subspace, space)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=WEAK64, equal_nan=True)
    for got, wanted in zip(found.modules[MODULE], (cosine, space), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=WEAK64, equal_nan=True)


def test_totals_are_over_the_modules_that_both_have() -> None:
    x, y = pools.cast(pools.planted(3), torch.float32), pools.cast(pools.planted(3, seed=70), torch.float32)
    modules = [{"x": x[0], "y": y[0]}, {"x": x[1], "y": y[1], "alone": y[2]}, {"y": y[2]}]
    found = fl.overlap(fl.Pool([pools.make_adapter(f"a{i}", m) for i, m in enumerate(modules)]), modules=True)
    assert list(found.modules) == ["x", "y"]
    dense = [{m: pools.dense(p) for m, p in own.items()} for own in modules]

    def cosine(i: int, j: int, common: list[str]) -> float:
        a, b = (torch.cat([dense[k][m].flatten() for m in common]) for k in (i, j))
        return float(a @ b / (a.norm() * b.norm()))

    assert float(found.cosine[0, 1]) == pytest.approx(cosine(0, 1, ["x", "y"]), abs=GRAM64)
    assert float(found.cosine[1, 2]) == pytest.approx(cosine(1, 2, ["y"]), abs=GRAM64)
    pair_x, pair_y = expected(x[:2])[1][0, 1], expected(y[:2])[1][0, 1]
    assert float(found.subspace[0, 1]) == pytest.approx(float(pair_x + pair_y) / 2, abs=SUBSPACE64)
    assert found.modules["x"][0][0, 2].isnan() and found.modules["x"][1][2, 2].isnan()
    torch.testing.assert_close(found.cosine.diagonal(), torch.ones(3).double(), rtol=0, atol=FLOAT64)


def test_nothing_in_common_is_unknown() -> None:
    parts = pools.planted(2)
    pool = fl.Pool([pools.make_adapter("a", {"x": parts[0], "y": parts[0]}), pools.make_adapter("b", {"y": parts[1]}),
                    pools.make_adapter("c", {"x": parts[1]})])  # fmt: skip
    found = fl.overlap(pool)
    assert found.cosine[1, 2].isnan() and found.subspace[1, 2].isnan()
    assert found.cosine[0, 1].isfinite() and found.cosine[0, 2].isfinite()


@pytest.mark.parametrize("scaling", [-1.0, 5.0])
def test_scalings_turn_cosines_and_no_subspaces(scaling: float) -> None:
    (b, a, s), other = pools.planted(2)
    plain, scaled = (fl.overlap(pools.make_pool([(b, a, x), other])) for x in (s, s * scaling))
    torch.testing.assert_close(
        scaled.cosine[0, 1], plain.cosine[0, 1] * (1 if scaling > 0 else -1), rtol=0, atol=FLOAT64
    )
    assert torch.equal(plain.subspace, scaled.subspace)


def test_a_pair_does_not_depend_on_the_dtype_of_a_third() -> None:
    parts = pools.cast(pools.planted(3, condition=1e3), torch.float32)
    with_third = fl.overlap(pools.make_pool([*parts[:2], *pools.cast(parts[2:], torch.bfloat16)]))
    alone = fl.overlap(pools.make_pool(parts[:2]))
    torch.testing.assert_close(with_third.subspace[:2, :2], alone.subspace, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("where", ["B", "A"])
def test_non_finite_input_is_named(where: str) -> None:
    parts = pools.cast(pools.planted(2), torch.float32)
    parts[1]["BA".index(where)][1, 1] = torch.inf
    with pytest.raises(fl.InputError, match=f"adapter 'a1': lora_{where} of {MODULE} holds NaN or Inf"):
        fl.overlap(pools.make_pool(parts), modules=True)
