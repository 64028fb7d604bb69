"""``decompose`` against the dense algorithm in float64, on pools by property."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pools
import pytest
import torch
from builders import gaussian
from pools import MODULE, Part
from tolerances import FLOAT64, GRAM64, WEAK64
from torch import Tensor

import fastlora as fl
from fastlora.core.updates import factor, sides
from fastlora.decomposition.components import Components
from fastlora.decomposition.devec import ModuleResult
from fastlora.decomposition.result import Pair
from fastlora.engine import schedule
from fastlora.engine.blocks import read_chain_blocks
from fastlora.engine.materialise import materialise
from fastlora.engine.schedule import rtol_or_default
from fastlora.errors import NonFiniteError
from fastlora.reference.coefficients import shares
from fastlora.reference.devec import Dense, devec

CHAINS = ["product", "palindrome", "mean"]
CUTS: dict[str, dict[str, float]] = {"none": {}, "rank": {"rank": 3}, "energy": {"energy": 0.9}}
# Both sides compute in float64, on stored values that are exact there. Beside its roundoff, at the square of a
# condition of 1000, is what is cut as noise: rounding to a dtype leaves directions of its u in deficient factors, 6e-8
# or (of bfloat16) 4e-3 of the largest, and their squares are in the Gram blocks of one side alone.
FLOAT32_BAR = 1e-6
HALF_BAR = 1e-4


def rtol(dtype: torch.dtype) -> float:
    return max(1e-6, torch.finfo(dtype).eps)


def same_spectrum(values: Tensor, dense: Tensor, atol: float) -> None:
    """Every eigenvalue away from zero has its partner; the dense operator has more zeros."""
    values = values.to(torch.complex128)
    for some, others in ((values, dense), (dense, values)):
        large = some[some.abs() > 1e-3]
        assert not len(large) or float((large[:, None] - others).abs().amin(1).max()) <= atol
    assert abs(int((values.abs() > 1e-3).sum()) - int((dense.abs() > 1e-3).sum())) <= int(
        ((dense.abs() - 1e-3).abs() < atol).sum()
    )


def basis_of(components: Components, result: ModuleResult) -> Tensor:
    """``Z [n, q]`` in float64."""
    z = torch.zeros(1, dtype=torch.float64)
    side, _ = sides(components.settings.side)
    for name, basis in zip(result.names, result.basis, strict=True):
        if basis is not None:
            part = components.pool[name].updates[result.module]
            left, right = materialise([part], torch.float64)[0]
            assert factor(part, side).side == side
            z = z + (left if side == "B" else right.mT) @ basis
    return z


def close(got: Tensor, expected: Tensor, scale: Tensor, atol: float) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).norm()) <= atol * max(float(scale.norm()), 1e-300)


def compare(components: Components, dense: Dense, deltas: Sequence[Tensor], bar: float, gap: float) -> None:
    """One module of one chain: eigenvalues, subspace, and every part."""
    result = components.results[MODULE]
    assert list(result.kept) == dense.kept
    assert result.count == dense.basis.shape[1]
    same_spectrum(result.values, dense.values, bar)
    z = basis_of(components, result)
    close(z.mT @ z, torch.eye(result.count, dtype=torch.float64), torch.ones(1), bar)
    close(z @ z.mT, dense.projector, torch.ones(1), 10 * bar / gap)
    close(pools.exact(components.shared.update(MODULE)), dense.merged, deltas[0], 10 * bar / gap)
    for i, name in enumerate(result.names):
        shared, unique = (pools.exact(f(name).update(MODULE)) for f in (components.shared_of, components.unique_of))
        close(shared, dense.shared[i], deltas[i], 10 * bar / gap)
        close(unique, dense.unique[i], deltas[i], 10 * bar / gap)
        close(shared + unique, deltas[i], deltas[i], GRAM64)
        assert result.norms[i] == pytest.approx(float(deltas[i].norm()), rel=bar, abs=FLOAT64)
        assert result.shared_norms[i] == pytest.approx(
            float(dense.shared[i].norm()), abs=10 * bar / gap * max(float(deltas[i].norm()), 1e-12)
        )


def check_pool(parts: Sequence[Part], bar: float, most: int = 1, **settings: object) -> None:
    deltas = [pools.dense(p) for p in parts]
    floor = rtol(parts[0][0].dtype)
    values = devec(deltas, 0.5, rtol=floor, **settings).values  # type: ignore[arg-type]
    for threshold, gap in pools.thresholds(values, most=most):
        found = fl.decompose(pools.make_pool(parts), threshold, **settings)  # type: ignore[arg-type]
        compare(found.components, devec(deltas, threshold, rtol=floor, **settings), deltas, bar, gap)  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", pools.POOLS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chain", CHAINS)
def test_float32(chain: str, side: str, pool: str) -> None:
    for k in (2, 3, 5, 8):
        parts = pools.cast(pools.POOLS[pool](k), torch.float32)
        check_pool(parts, FLOAT32_BAR, most=2, chain=chain, side=side)
        for cut in ("rank", "energy") if k in (2, 5) else ():
            check_pool(parts, FLOAT32_BAR, chain=chain, side=side, **CUTS[cut])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chain", CHAINS)
def test_float32_at_condition_1000(chain: str, side: str) -> None:
    for seed in range(3):
        parts = pools.cast(pools.planted(3, condition=1e3, seed=50 * seed), torch.float32)
        check_pool(parts, FLOAT32_BAR, most=3, chain=chain, side=side)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chain", CHAINS)
def test_half_precision(chain: str, side: str, dtype: torch.dtype) -> None:
    for pool in (pools.planted, pools.crowded, pools.ragged, pools.with_zero, pools.scalings, pools.orthogonal):
        for k in (2, 3, 5):
            check_pool(pools.cast(pool(k), dtype), HALF_BAR, chain=chain, side=side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("cut", CUTS)
def test_pairs(cut: str, chain: str, side: str) -> None:
    parts = pools.cast(pools.ragged(4), torch.float32)
    deltas = [pools.dense(p) for p in parts]
    values = torch.cat([devec([deltas[i], deltas[j]], 0.5, chain=chain, side=side, **CUTS[cut]).values  # type: ignore[arg-type]
                        for i in range(4) for j in range(i)])  # fmt: skip
    threshold, gap = pools.thresholds(values, most=1)[0]
    found = fl.decompose(pools.make_pool(parts), threshold, mode="pairs", chain=chain, side=side, **CUTS[cut])  # type: ignore[arg-type]
    names = [f"a{i}" for i in range(4)]
    assert list(found.pairs) == [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    for (a, b), pair in found.pairs.items():
        two = [deltas[int(a[1])], deltas[int(b[1])]]
        compare(pair.components, devec(two, threshold, chain=chain, side=side, **CUTS[cut]), two, FLOAT32_BAR, gap)  # type: ignore[arg-type]


@pytest.mark.parametrize("chain", CHAINS)
def test_coefficients_have_the_ranks_of_their_factors(chain: str) -> None:
    """Blocks are padded to the largest rank of a pool; what results are made of is not."""
    parts = fl.decompose(pools.make_pool(pools.cast(pools.ragged(4), torch.float32)), 0.05, chain=chain)
    found = [parts.unique_of(n) for n in parts.pool.names] + [parts.shared]
    terms = [(u.B, t) for a in found for u in a.updates.values() for t in u.B.terms if t.coefficient is not None]
    assert len({owner.rank for owner, _ in terms}) > 1
    for owner, term in terms:
        assert term.coefficient is not None
        assert tuple(term.coefficient.shape) == (term.source.shape[1], owner.rank)
    assert all(r.real_values == r.values.real.tolist() for r in parts.components.results.values())


def test_real_parts_of_complex_eigenvalues() -> None:
    parts: list[Part] = [(gaussian(8, 4, seed=i), gaussian(4, 8, seed=9 + i), 1.0) for i in range(3)]
    (result,) = fl.decompose(pools.make_pool(parts), 0.05).components.results.values()
    assert result.values.is_complex() and result.real_values == result.values.real.tolist()


def test_a_scaling_beyond_all_weights_is_refused_by_name() -> None:
    """Its squares overflow, and a report cannot hold infinity."""
    left, right = pools.cast(pools.planted(2), torch.float32)
    pool = pools.make_pool([left, (right[0], right[1], 1e300)])
    for work in (lambda: fl.decompose(pool, 0.5), lambda: fl.decompose(pool, 0.5, mode="pairs")):
        with pytest.raises(NonFiniteError, match=r"'a1'.*lora_alpha"):
            work()
    with pytest.raises(NonFiniteError, match=r"'a1'.*lora_alpha"):
        pool["a1"].compress(rank=1)


def test_a_pair_does_not_depend_on_the_rest_of_the_pool() -> None:
    parts = pools.cast(pools.ragged(4), torch.float32)
    among = fl.decompose(pools.make_pool(parts), 0.5, mode="pairs").pairs["a0", "a1"]
    alone = fl.decompose(pools.make_pool(parts[:2]), 0.5)
    assert torch.equal(among.spectrum[MODULE], alone.spectrum[MODULE])
    for name in ("a0", "a1"):
        assert torch.equal(among.unique_of(name).delta(MODULE), alone.unique_of(name).delta(MODULE))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("order", [None, ["a3", "a1"], ["a2", "a3", "a1"]], ids=["pool order", "some", "reordered"])
def test_iterative(chain: str, side: str, order: list[str] | None) -> None:
    parts = pools.cast(pools.planted(4, shared=3, noise=0.3), torch.float32)
    parts = parts if side == "left" else pools.transposed(parts)
    deltas = {f"a{i}": pools.dense(p) for i, p in enumerate(parts)}
    threshold = {"product": 0.61, "palindrome": 0.61, "mean": 0.83}[chain]
    settings = {"chain": chain, "side": side}
    pool, others = pools.make_pool(parts), order or ["a1", "a2", "a3"]
    current, floor = deltas["a0"], 0.0
    shared = 0
    for step, other in enumerate(others):
        # A run of the first steps alone leaves of the target what these steps leave.
        steps = others[: step + 1]
        given = None if order is None and steps == others else steps
        found = fl.decompose(pool, threshold, mode="iterative", target="a0", order=given, **settings)  # type: ignore[arg-type]
        assert list(found.spectrum) == steps
        dense = devec([current, deltas[other]], threshold, floors=[floor, 0.0], **settings)  # type: ignore[arg-type]
        gap = float((dense.values.real - threshold).abs().min())
        assert gap > 1e-3, "choose a threshold that decides"
        compare_step(found, other, dense, [current, deltas[other]], gap)
        shared += dense.basis.shape[1]
        current, floor = dense.unique[0], max(floor, 1e-6 * float(dense.sigma[0][0]))
    assert shared > 0


def compare_step(found: fl.Decomposition, other: str, dense: Dense, deltas: Sequence[Tensor], gap: float) -> None:
    """The last step of an iterative decomposition: eigenvalues, what is left of the target, and the report."""
    same_spectrum(found.spectrum[other][MODULE], dense.values, FLOAT32_BAR)
    bar = 10 * FLOAT32_BAR / gap
    close(pools.exact(found.unique_of("a0").update(MODULE)), dense.unique[0], deltas[0], bar)
    (row,) = found.reports[-1].rows
    assert list(row.directions) == dense.kept and row.shared == dense.basis.shape[1]
    for name, whole, part in zip(("a0", other), deltas, dense.shared, strict=True):
        assert row.energy_shared[name] == pytest.approx(float(part.norm() / whole.norm()) ** 2, abs=2 * bar)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("rtol_given", [1e-3, 0.05])
def test_noise_floor_given(chain: str, rtol_given: float) -> None:
    parts = pools.cast(pools.planted(3), torch.float32)
    deltas = [pools.dense(p) for p in parts]
    expected = devec(deltas, 0.5, chain=chain, rtol=rtol_given)
    threshold, gap = pools.thresholds(expected.values, most=1)[0]
    found = fl.decompose(pools.make_pool(parts), threshold, chain=chain, rtol=rtol_given)
    compare(found.components, devec(deltas, threshold, chain=chain, rtol=rtol_given), deltas, FLOAT32_BAR, gap)


def test_one_chain_has_the_noise_floor_of_its_coarsest_adapter() -> None:
    parts = pools.planted(3)
    mixed = [(parts[0][0].float(), parts[0][1].float(), 1.0), *pools.cast(parts[1:2], torch.bfloat16), parts[2]]
    deltas = [pools.dense(p) for p in mixed]
    floor = torch.finfo(torch.bfloat16).eps
    values = devec(deltas, 0.5, rtol=floor).values
    threshold, gap = pools.thresholds(values, most=1)[0]
    found = fl.decompose(pools.make_pool(mixed), threshold)
    compare(found.components, devec(deltas, threshold, rtol=floor), deltas, HALF_BAR, gap)


@pytest.mark.parametrize("mode", ["pool", "pairs", "iterative"])
def test_modules_that_some_adapters_lack(mode: str) -> None:
    parts = pools.cast(pools.planted(3), torch.float32)
    other = pools.cast(pools.planted(3, seed=77), torch.float32)
    modules = [{"x": parts[0], "y": other[0], "z": other[1]}, {"y": other[1], "x": parts[1]}, {"x": parts[2]}]
    pool = fl.Pool(pools.make_adapter(f"a{i}", m) for i, m in enumerate(modules))
    if mode == "iterative":
        found = fl.decompose(pool, 0.5, mode=mode, target="a0", order=["a1"])
        of_pair: fl.Decomposition | Pair = found
    else:
        found = fl.decompose(pool, 0.5, mode=mode)
        of_pair = found if mode == "pool" else found.pairs["a0", "a1"]
    present = {"x": [0, 1, 2] if mode == "pool" else [0, 1], "y": [0, 1]}
    for module, members in present.items():
        deltas = [pools.dense(modules[i][module]) for i in members]
        dense = devec(deltas, 0.5)
        for i, member in enumerate(members[:1] if mode == "iterative" else members):
            close(pools.exact(of_pair.unique_of(f"a{member}").update(module)), dense.unique[i], deltas[i], WEAK64)
            if mode != "iterative":
                close(pools.exact(of_pair.shared_of(f"a{member}").update(module)), dense.shared[i], deltas[i], WEAK64)
    left, right, _ = modules[0]["z"]
    alone = of_pair.unique_of("a0").update("z")
    assert torch.equal(materialise([alone], torch.float32)[0][0], left)
    assert torch.equal(materialise([alone], torch.float32)[0][1], right)
    if mode != "iterative":
        assert of_pair.shared_of("a0").update("z").rank == 0
        assert "z" not in of_pair.unique_of("a1")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_saved_factors_are_rounded_once(side: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """At most half a unit in the last place from the float64 values, and the error of those, 1e-9."""
    parts = pools.cast(pools.planted(3), dtype)
    parts = parts if side == "left" else pools.transposed(parts)
    deltas = [pools.dense(p) for p in parts]
    floor = rtol(dtype)
    threshold, _ = pools.thresholds(devec(deltas, 0.5, side=side, rtol=floor).values, most=1)[0]
    dense = devec(deltas, threshold, side=side, rtol=floor)
    found = fl.decompose(pools.make_pool(parts), threshold, side=side)
    assert dense.basis.shape[1] > 0
    found.save(tmp_path / "out")
    half = 0.5 * torch.finfo(dtype).eps * (1 + 2**-12)

    def check(got: Tensor, exact: Tensor, error: float) -> None:
        assert got.dtype == dtype
        assert ((got.double() - exact).abs() <= half * exact.abs() + error * float(exact.abs().max())).all()

    subnormal = 3e-8 if dtype == torch.float16 else 0.0
    for place, adapter in found.adapters().items():
        loaded = fl.load(tmp_path / "out" / place)
        got = materialise([loaded.update(MODULE)], dtype)[0]
        assert loaded.update(MODULE).scaling == 1.0
        for tensor, exact in zip(got, materialise([adapter.update(MODULE).baked()], torch.float64)[0], strict=True):
            check(tensor, exact, subnormal)
    for i, (left, right, scaling) in enumerate(parts):
        got_left, got_right = materialise([fl.load(tmp_path / "out" / "unique" / f"a{i}").update(MODULE)], dtype)[0]
        rest = torch.eye(len(dense.projector), dtype=torch.float64) - dense.projector
        if side == "left":
            check(got_left, scaling * rest @ left.double(), 1e-9 + subnormal)
            assert torch.equal(got_right, right)
        else:
            check(got_right, right.double() @ rest, 1e-9 + subnormal)
            check(got_left, scaling * left.double(), subnormal)


@pytest.mark.parametrize("mode", ["pool", "pairs", "iterative"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("where", ["B", "A"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_inputs_are_named(bad: float, where: str, side: str, mode: str) -> None:
    for culprit, chain in ((1, "product"), (2, "product"), (1, "palindrome"), (2, "mean")):
        parts = pools.cast(pools.planted(3), torch.float32)
        broken = [x.clone() for x in parts[culprit][:2]]
        broken["BA".index(where)][2, 3] = bad
        parts[culprit] = (broken[0], broken[1], 1.0)
        with pytest.raises(fl.InputError, match=rf"adapter 'a{culprit}': lora_{where} of {MODULE} holds NaN or Inf"):
            fl.decompose(
                pools.make_pool(parts), 0.5, chain=chain, mode=mode, side=side,
                target="a0" if mode == "iterative" else None,
            )  # fmt: skip


@pytest.mark.parametrize("ranks", [(2, 2), (1, 3, 2)], ids=str)
def test_norms_where_nothing_is_shared_have_the_same_bits(ranks: tuple[int, ...]) -> None:
    def part_of(seed: int, rank: int) -> Part:
        return gaussian(40, rank, seed=seed), gaussian(rank, 9, seed=seed + 50), 0.5 + seed

    pool = fl.Pool([pools.make_adapter(f"a{i}", {MODULE: part_of(i, r)}) for i, r in enumerate(ranks)])
    [part] = schedule.parts(pool, "", rtol_of=rtol_or_default(None), least=2)
    blocks = read_chain_blocks(part, "left", "chain")
    [result] = fl.decompose(pool).components.results.values()
    assert result.count == 0 and result.H == () and result.weights == (0.0,) * len(ranks)
    scaling = torch.tensor([[u.scaling for u in row] for row in part.updates()], dtype=torch.float64)
    basis = torch.zeros(1, len(ranks), max(ranks), max(ranks), dtype=torch.float64)
    _, norms, shared = shares(blocks.projected, blocks.other, basis, scaling, 1)
    assert result.norms == tuple(norms[0].tolist()) and result.shared_norms == tuple(shared[0].tolist())


def test_non_finite_input_is_not_laid_on_an_adapter_that_is_computed() -> None:
    parts = pools.cast(pools.planted(3), torch.float32)
    parts[2][1][0, 0] = torch.nan
    a, b, bad = (pools.make_adapter(f"a{i}", {MODULE: p}) for i, p in enumerate(parts))
    lazy = replace(a + b, name="sum")
    for order in ([lazy, bad], [bad, lazy]):
        with pytest.raises(fl.InputError, match="adapter 'a2': lora_A"):
            fl.decompose(fl.Pool(order), 0.5)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"mode": "all"}, "mode='all' does not exist: use one of pool, pairs, iterative"),
    ({"chain": "sum"}, "chain='sum' does not exist"), ({"side": "top"}, "side='top' does not exist"),
    ({"threshold": 1.0}, "threshold=1.0: must be"), ({"threshold": -1.0}, "threshold=-1.0: must be"),
    ({"rank": 0}, "rank=0: must be at least 1"), ({"energy": 1.5}, "energy=1.5: must be"),
    ({"rtol": 1.0}, "rtol=1.0: must be"), ({"rank": 2, "energy": 0.9}, "not both"),
    ({"mode": "iterative"}, "needs target=NAME"), ({"target": "a0"}, "belong to mode='iterative'"),
    ({"order": ["a1"]}, "belong to mode='iterative'"),
    ({"mode": "iterative", "target": "a9"}, "no adapter 'a9'"),
    ({"mode": "iterative", "target": "a0", "order": ["a0"]}, "name each other adapter once"),
    ({"mode": "iterative", "target": "a0", "order": ["a1", "a1"]}, "name each other adapter once"),
    ({"mode": "iterative", "target": "a0", "order": []}, "name each other adapter once"),
    ({"mode": "iterative", "target": "a0", "order": ["a7"]}, "no adapter 'a7'"),
])  # fmt: skip
def test_arguments_out_of_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(fl.InputError, match=message):
        fl.decompose(pools.make_pool(pools.planted(2)), **arguments)  # type: ignore[arg-type]


def test_a_pool_of_one() -> None:
    with pytest.raises(fl.InputError, match="a pool of one adapter has nothing to share"):
        fl.decompose(pools.make_pool(pools.planted(1)))
