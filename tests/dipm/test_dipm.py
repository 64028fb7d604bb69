"""Direction and magnitude against dense float64, over granularities, sides, operators and inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pools
import pytest
import torch
from builders import gaussian, make_adapter
from pools import MODULE, Part
from tolerances import FLOAT32, FLOAT64, SUBSPACE64, SUMS32
from torch import Tensor

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.dipm import Operator
from fastlora.reference import dipm as dense
from fastlora.runtime import memory

N, M, R = 22, 17, 4
GRANULARITIES = ("component", "column", "matrix")
SIDES = ("product", "B", "A")


def part(seed: int, rank: int = R, dtype: torch.dtype = torch.float32, scaling: float = 2.0) -> Part:
    return gaussian(N, rank, seed=seed, dtype=dtype), gaussian(rank, M, seed=seed + 1, dtype=dtype), scaling


def adapters(*parts: Part) -> list[Adapter]:
    return [pools.make_adapter(f"a{i}", {MODULE: p}) for i, p in enumerate(parts)]


def vectors(p: Part, granularity: str, on: str, rank: int) -> Tensor:
    """What is decoupled of one dense update."""
    left, right, s = p
    x = {"product": pools.dense(p), "B": s * left.double(), "A": right.double()}[on]
    if granularity == "matrix":
        return x[None]
    if granularity == "column":
        return dense.columns(x)
    found = dense.components(pools.dense(p), on, min(rank, left.shape[1]))[0]
    missing = found.new_zeros(rank - len(found), *found.shape[1:])
    return torch.cat([found, missing])


def rebuilt(changed: Tensor, own: Part, granularity: str, on: str, rank: int) -> Tensor:
    """Dense ``ΔW`` of modulated vectors of the first adapter."""
    left, right, s = own
    if granularity == "component":
        if on == "product":
            return changed.sum(0)
        _, u, v = dense.components(pools.dense(own), on, min(rank, left.shape[1]))
        k = u.shape[1]
        return changed[:k].mT @ v.mT if on == "B" else u @ changed[:k]
    x = changed[0] if granularity == "matrix" else changed.mT
    return {"product": lambda: x, "B": lambda: x @ right.double(), "A": lambda: s * left.double() @ x}[on]()


Chain = list[tuple[str, float, tuple[int, ...]]]


def expected(parts: list[Part], chain: Chain, granularity: str, on: str) -> Tensor:
    rank = max(p[0].shape[1] for p in parts)
    states = [dense.decouple(vectors(p, granularity, on, rank)) for p in parts]
    now = states[0]
    for name, strength, others in chain:
        given = [states[i] for i in others]
        if name == "remove":
            now = dense.remove(now, given, strength)
        else:
            now = getattr(dense, name)(now, *given, strength)
    return rebuilt(dense.recombine(now), parts[0], granularity, on, rank)


def operator(name: str, strength: float, others: list[Adapter]) -> Operator:
    if name == "remove":
        return fl.dipm.remove(others, strength)
    return getattr(fl.dipm, name)(*others, strength)


def got(pool: list[Adapter], chain: Chain, granularity: str, on: str) -> Adapter:
    operators = [operator(name, strength, [pool[i] for i in others]) for name, strength, others in chain]
    return fl.modulate(pool[0], operators, granularity=granularity, on=on)


CHAINS: dict[str, Chain] = {
    "reverse": [("reverse", 0.5, ())],
    "scale": [("scale", 3.0, ())],
    "shift": [("shift", 0.3, (1, 2))],
    "shift-far": [("shift", -40.0, (1, 2))],
    "shift-self": [("shift", 0.7, (0, 1))],
    "interpolate": [("interpolate", 0.25, (1,))],
    "interpolate-end": [("interpolate", 1.0, (2,))],
    "remove-one": [("remove", 1.0, (1,))],
    "remove-two": [("remove", 0.6, (1, 2))],
    "all": [
        ("shift", 0.4, (1, 2)), ("scale", 0.5, ()), ("interpolate", 0.3, (2,)), ("remove", 1.0, (1,)),
        ("reverse", 2.0, ()),
    ],
}  # fmt: skip

INPUTS: dict[str, list[Part]] = {
    "plain": [part(1), part(3), part(5)],
    "scalings": [part(1, scaling=-0.5), part(3, scaling=7.0), part(5, scaling=-2.0)],
    "huge-tiny": [
        (1e6 * part(1)[0], part(1)[1], 2.0), (1e-7 * part(3)[0], part(3)[1], 1.0), (part(5)[0], 1e-5 * part(5)[1], 3.0),
    ],
    "bf16": [part(i, dtype=torch.bfloat16) for i in (1, 3, 5)],
    "float64": [part(i, dtype=torch.float64) for i in (1, 3, 5)],
    "mixed": [part(1, dtype=torch.bfloat16), part(3, dtype=torch.float16), part(5)],
    "zero-columns": [(part(1)[0], part(1)[1] * (torch.arange(M) % 3 > 0), 1.0), part(3), part(5)],
    "zero-other": [part(1), (torch.zeros(N, R), part(3)[1], 1.0), part(5)],
}  # fmt: skip


def close(found: Tensor, wanted: Tensor, rtol: float = FLOAT32, what: str = "") -> None:
    assert float((found - wanted).norm()) <= rtol * float(wanted.norm()), what


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("on", SIDES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_operators_equal_their_dense_definition(granularity: str, on: str, chain: str, inputs: str) -> None:
    parts = INPUTS[inputs]
    wanted = expected(parts, CHAINS[chain], granularity, on)
    result = got(adapters(*parts), CHAINS[chain], granularity, on)
    close(pools.exact(result.update(MODULE)), wanted)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_ragged_ranks_on_the_product(granularity: str, chain: str) -> None:
    parts = [part(1, rank=3), part(3, rank=6), part(5, rank=1, scaling=-1.0)]
    result = got(adapters(*parts), CHAINS[chain], granularity, "product")
    close(pools.exact(result.update(MODULE)), expected(parts, CHAINS[chain], granularity, "product"))


@pytest.mark.parametrize("on", ["B", "A"])
@pytest.mark.parametrize("chain", CHAINS)
def test_ragged_ranks_of_components(chain: str, on: str) -> None:
    """A component that one adapter lacks counts as zero."""
    parts = [part(1, rank=4), part(3, rank=6), part(5, rank=2)]
    result = got(adapters(*parts), CHAINS[chain], "component", on)
    close(pools.exact(result.update(MODULE)), expected(parts, CHAINS[chain], "component", on))
    assert result.update(MODULE).rank <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["planted", "deficient_left", "deficient_right", "wide", "scalings", "ragged"])
def test_column_magnitudes_are_the_dense_norms(kind: str, dtype: torch.dtype) -> None:
    for adapter in pools.make_pool(pools.cast(pools.POOLS[kind](2), dtype)).adapters:
        norms = pools.exact(adapter.update(MODULE)).norm(dim=0)
        found = fl.dipm.decouple(adapter, "column").magnitudes[MODULE]
        torch.testing.assert_close(found, norms, rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("on", SIDES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_directions_are_unit_and_recombine(granularity: str, on: str) -> None:
    own = part(1, scaling=-0.7)
    parts = fl.dipm.decouple(adapters(own)[0], granularity, on)
    mu = parts.magnitudes[MODULE]
    wanted = dense.decouple(vectors(own, granularity, on, R))
    torch.testing.assert_close(mu, wanted[1], rtol=FLOAT32, atol=0)
    close(pools.exact(parts.directions().update(MODULE)), rebuilt(wanted[0], own, granularity, on, R))
    # D ∘ μ by way of other magnitudes and back
    other = mu * torch.linspace(0.5, 2.0, len(mu), dtype=torch.float64)
    changed = fl.dipm.recombine(parts, magnitudes={MODULE: other})
    close(pools.exact(changed.update(MODULE)), rebuilt(dense.recombine((wanted[0], other)), own, granularity, on, R))
    again = fl.dipm.recombine(parts, magnitudes={MODULE: mu.clone()})
    close(pools.exact(again.update(MODULE)), pools.dense(own))


def test_factors_of_column_directions() -> None:
    """``D = s·B·(A diag(1/μ))``: the same rank, and zero columns stay zero."""
    own = INPUTS["zero-columns"][0]
    directions = fl.dipm.decouple(adapters(own)[0]).directions()
    left, right = directions.factors(MODULE)
    assert right.shape == (R, M) and torch.equal(left, own[0])
    norms = directions.delta(MODULE).double().norm(dim=0)
    assert bool((norms[::3] == 0).all()) and float((norms[norms > 0] - 1).abs().max()) < FLOAT32


@pytest.mark.parametrize("seed", range(4))  # the rounding is positive for some of them
def test_columns_in_the_kernel_of_b_are_zero(seed: int) -> None:
    """What is left of such a column is rounding, which no operator may blow up to a direction."""
    left, right, s = part(1, dtype=torch.float64)
    kernel = torch.cat([gaussian(3, seed=seed, dtype=torch.float64), -torch.ones(1, dtype=torch.float64)])
    left[:, 3] = left[:, :3] @ kernel[:3]
    right[:, 5:] = kernel[:, None] * gaussian(M - 5, seed=8, dtype=torch.float64)
    own, other, third = adapters((left, right, s), part(3), part(5))
    mu = fl.dipm.decouple(own).magnitudes[MODULE]
    assert mu[5:].tolist() == [0.0] * (M - 5) and bool((mu[:5] > 0).all())
    assert float(pools.exact(fl.dipm.decouple(own).directions().update(MODULE))[:, 5:].norm()) == 0.0
    shifted = pools.exact(fl.modulate(own, fl.dipm.shift(other, own, 0.5)).update(MODULE))
    assert float(shifted[:, 5:].norm()) == 0.0
    towards = pools.exact(fl.modulate(third, fl.dipm.shift(other, own, 0.5)).update(MODULE))[:, 5:]
    end, start = (pools.dense(part(i))[:, 5:] for i in (5, 3))
    wanted = end / end.norm(dim=0) - 0.5 * start / start.norm(dim=0)
    close(towards, wanted / wanted.norm(dim=0) * end.norm(dim=0))


IDENTITIES: dict[str, Callable[[Adapter, Adapter], list[Operator]]] = {
    "nothing": lambda a, b: [],
    "scale": lambda a, b: [fl.dipm.scale(1)],
    "shift": lambda a, b: [fl.dipm.shift(a, b, 0.0)],
    "shift-nowhere": lambda a, b: [fl.dipm.shift(b, b, 5.0)],
    "interpolate": lambda a, b: [fl.dipm.interpolate(b, 0.0)],
    "remove": lambda a, b: [fl.dipm.remove([b], 0.0)],
    "all": lambda a, b: [fl.dipm.scale(1.0), fl.dipm.shift(a, b, 0.0), fl.dipm.interpolate(b, 0)],
}


@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_identity_is_the_same_adapter_bit_for_bit(identity: str, dtype: torch.dtype, tmp_path: Path) -> None:
    # rsLoRA with a scaling of 4: what is written are B·4 and A, as for the adapter itself
    own = fl.load(make_adapter(tmp_path / "own", dtype=dtype, use_rslora=True))
    other = fl.load(make_adapter(tmp_path / "other", seed=1, dtype=dtype))
    operators = IDENTITIES[identity](own, other)
    for granularity in GRANULARITIES:
        assert fl.modulate(own, operators, granularity=granularity) is own
        assert fl.dipm.recombine(fl.dipm.decouple(own, granularity)) is own
    saved = fl.modulate(own, operators).save(tmp_path / "saved") / "adapter_model.safetensors"
    plain = own.save(tmp_path / "plain") / "adapter_model.safetensors"
    assert saved.read_bytes() == plain.read_bytes()
    unit = fl.load(make_adapter(tmp_path / "unit", dtype=dtype, alpha=4))
    written = fl.load(fl.modulate(unit, operators).save(tmp_path / "written"))
    for module in unit.modules:
        for side in ("B", "A"):
            assert torch.equal(getattr(written.update(module), side).stored, getattr(unit.update(module), side).stored)


def test_operators_that_only_scale_touch_no_factor() -> None:
    own, other, _ = adapters(*INPUTS["plain"])
    for granularity in GRANULARITIES:
        for on in SIDES:
            result = fl.modulate(own, [fl.dipm.reverse(0.5), fl.dipm.scale(3)], granularity=granularity, on=on)
            assert result.update(MODULE).scaling == -3.0 and result.update(MODULE).B is own.update(MODULE).B
    assert fl.modulate(own, fl.dipm.interpolate(other, 1.0), granularity="matrix").update(MODULE).rank == R


def test_rank_recompresses_and_restores_the_magnitudes() -> None:
    parts = [part(1), part(3), part(5)]
    pool = adapters(*parts)
    shift = fl.dipm.shift(pool[1], pool[2], 0.5)
    whole = fl.modulate(pool[0], shift)
    assert whole.update(MODULE).rank == 3 * R
    cut = fl.modulate(pool[0], shift, rank=R)
    assert cut.update(MODULE).rank == R
    found, wanted = pools.exact(cut.update(MODULE)), pools.exact(whole.update(MODULE))
    torch.testing.assert_close(found.norm(dim=0), wanted.norm(dim=0), rtol=FLOAT32, atol=0)
    # the columns of the best rank-r approximation, at their old length
    u, s, vh = torch.linalg.svd(wanted)
    best = (u[:, :R] * s[:R]) @ vh[:R]
    close(found, best / best.norm(dim=0) * wanted.norm(dim=0))
    matrix = fl.modulate(pool[0], shift, granularity="matrix", rank=2)
    assert float(pools.exact(matrix.update(MODULE)).norm()) == pytest.approx(
        float(pools.dense(parts[0]).norm()), rel=FLOAT32
    )
    component = fl.modulate(pool[0], shift, granularity="component", energy=0.9)
    assert component.update(MODULE).rank < 3 * R


DEGENERATE = ["deficient_left", "deficient_right", "duplicates", "with_zero", "identical"]


# The components of `wide` have close singular values, so they are ill-conditioned by themselves.
@pytest.mark.parametrize(
    ("kind", "granularity"),
    [(k, g) for k in DEGENERATE for g in GRANULARITIES] + [("wide", "column"), ("wide", "matrix")],
)
def test_degenerate_inputs(kind: str, granularity: str) -> None:
    parts = pools.cast(pools.POOLS[kind](3), torch.float32)
    pool = pools.make_pool(parts).adapters
    for chain in (CHAINS["shift"], CHAINS["interpolate"], CHAINS["remove-one"]):
        wanted = _rank_aware(parts, chain, granularity)
        found = pools.exact(got(pool, chain, granularity, "product").update(MODULE))
        assert bool(found.isfinite().all())
        assert float((found - wanted).norm()) <= SUMS32 * float(pools.dense(parts[0]).norm())


def _rank_aware(parts: list[Part], chain: Chain, granularity: str) -> Tensor:
    """The dense definition, in which components of rounding size count as none."""
    if granularity != "component":
        return expected(parts, chain, granularity, "product")
    rank = max(p[0].shape[1] for p in parts)
    found = []
    for p in parts:
        x, _, _ = dense.components(pools.dense(p), "product", rank)
        norms = x.flatten(1).norm(dim=1)
        found.append(dense.decouple(x * (norms > 1e-6 * norms[0])[:, None, None]))
    (name, strength, others), *_ = chain
    given = [found[i] for i in others]
    if name == "remove":
        return dense.recombine(dense.remove(found[0], given, strength)).sum(0)
    return dense.recombine(getattr(dense, name)(found[0], *given, strength)).sum(0)


def test_a_direction_in_the_removed_span_becomes_zero() -> None:
    own, twin, other = adapters(part(1), part(1, scaling=9.0), part(5))
    for granularity in GRANULARITIES:
        gone = fl.modulate(own, fl.dipm.remove([other, twin]), granularity=granularity)
        assert float(pools.exact(gone.update(MODULE)).norm()) == 0.0
        assert any("nothing is left of them" in n for n in gone.notes)


def test_removing_a_direction_twice_is_removing_it_once() -> None:
    own, other, twin, third = adapters(part(1), part(3), part(3, scaling=-9.0), part(5, rank=2))
    for granularity in GRANULARITIES:
        once = fl.modulate(own, fl.dipm.remove([third, other]), granularity=granularity)
        twice = fl.modulate(own, fl.dipm.remove([twin, third, other]), granularity=granularity)
        close(pools.exact(twice.update(MODULE)), pools.exact(once.update(MODULE)))


@pytest.mark.parametrize("granularity", ["column", "matrix"])
def test_directions_that_differ_by_rounding_span_no_plane(granularity: str) -> None:
    # The second direction is the first, turned by ε towards the modulated update's own. At ε = 1e-7 that is rounding:
    # only the first is removed. At 1e-3 the two span a plane that the update lies in, and nothing of it is left.
    left, right = gaussian(N, R, seed=1, dtype=torch.float64), gaussian(R, M, seed=2, dtype=torch.float64)
    away = gaussian(N, R, seed=3, dtype=torch.float64)
    for epsilon, kept in ((1e-7, True), (1e-3, False)):
        first, turned = (away, right, 1.0), (away + epsilon * left, right, 1.0)
        own, other, near = adapters((left, right, 1.0), first, turned)
        found = pools.exact(fl.modulate(own, fl.dipm.remove([other, near]), granularity=granularity).update(MODULE))
        if kept:
            close(found, expected([(left, right, 1.0), first], [("remove", 1.0, (1,))], granularity, "product"))
        else:
            assert float(found.norm()) == 0.0


def test_opposite_directions_keep_the_nearer_end() -> None:
    own, opposite = adapters(part(1), part(1, scaling=-6.0))
    x = pools.dense(part(1))
    for granularity in GRANULARITIES:
        near = fl.modulate(own, fl.dipm.interpolate(opposite, 0.25), granularity=granularity)
        far = fl.modulate(own, fl.dipm.interpolate(opposite, 0.75), granularity=granularity)
        close(pools.exact(near.update(MODULE)), x * (0.75 + 0.25 * 3))
        close(pools.exact(far.update(MODULE)), -x * (0.25 + 0.75 * 3))
        assert any("opposite directions" in n for n in near.notes)


def test_modules_that_some_lack() -> None:
    parts = INPUTS["plain"]
    own = pools.make_adapter("own", {"x": parts[0], "y": parts[0]})
    other = pools.make_adapter("other", {"x": parts[1], "z": parts[2]})
    shifted = fl.modulate(own, fl.dipm.shift(other, own, 0.5))
    assert shifted.modules == ["x", "y"]  # no magnitude where there was none
    zero = (torch.zeros(N, R), parts[1][1], 1.0)
    close(
        pools.exact(shifted.update("y")),
        expected([parts[0], zero, parts[0]], [("shift", 0.5, (1, 2))], "column", "product"),
    )
    between = fl.modulate(own, fl.dipm.interpolate(other, 0.25))
    assert between.modules == ["x", "y", "z"]
    close(pools.exact(between.update("y")), 0.75 * pools.dense(parts[0]))
    close(pools.exact(between.update("z")), 0.25 * pools.dense(parts[2]))
    for on in ("B", "A"):
        assert fl.modulate(own, fl.dipm.interpolate(other, 0.25), on=on).modules == ["x", "y"]


def test_zero_updates_stay_zero_and_are_saved(tmp_path: Path) -> None:
    zero = (torch.zeros(N, R), part(1)[1], 1.0)
    own, other, third = adapters(zero, part(3), part(5))
    for granularity in GRANULARITIES:
        for on in SIDES:
            result = fl.modulate(
                own, [fl.dipm.shift(other, third, 1.0), fl.dipm.reverse(2)], granularity=granularity, on=on
            )
            assert float(pools.exact(result.update(MODULE)).norm()) == 0.0
    assert float(fl.load(result.save(tmp_path / "zero")).delta(MODULE).norm()) == 0.0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_rounding_of_lazy_updates_has_no_direction(granularity: str) -> None:
    """Nothing is unique in two equal adapters: what is left of the factors is rounding."""
    unique = fl.decompose(pools.make_pool(pools.cast(pools.identical(2), torch.float32)), 0.5).unique_of("a0")
    assert float(pools.exact(unique.update(MODULE)).norm()) > 0
    parts = fl.dipm.decouple(unique, granularity)
    assert not parts.magnitudes[MODULE].any()
    third = pools.make_adapter("third", {MODULE: pools.cast(pools.planted(2), torch.float32)[1]})
    shifted = fl.dipm.recombine(parts.apply(fl.dipm.shift(unique, third, 0.5)))
    assert float(pools.exact(shifted.update(MODULE)).norm()) == 0.0


def test_equal_singular_values_are_noted() -> None:
    left, right = pools.orthonormal(N, 3, 1).float(), pools.orthonormal(M, 3, 2).mT.contiguous().float()
    own, other = adapters((left, right, 1.0), part(3, rank=3))
    result = fl.modulate(own, fl.dipm.shift(own, other, 0.3), granularity="component")
    assert any("equal singular values" in n for n in result.notes)
    again = fl.modulate(own, fl.dipm.shift(own, other, 0.3), granularity="component")
    assert torch.equal(result.delta(MODULE), again.delta(MODULE))


@pytest.mark.parametrize("on", SIDES)
@pytest.mark.parametrize("granularity", ["column", "matrix"])
def test_operators_in_one_call_or_one_after_the_other(granularity: str, on: str) -> None:
    own, other, third = adapters(*INPUTS["plain"])
    first, second = fl.dipm.shift(other, third, 0.4), fl.dipm.remove([third], 0.8)
    together = fl.modulate(own, [first, second], granularity=granularity, on=on)
    between = fl.modulate(own, first, granularity=granularity, on=on)
    one_by_one = fl.modulate(between, second, granularity=granularity, on=on)
    close(pools.exact(one_by_one.update(MODULE)), pools.exact(together.update(MODULE)))


def test_components_do_not_depend_on_the_factoring() -> None:
    parts = [part(i, dtype=torch.float64) for i in (1, 3, 5)]
    x = pools.mixing(R, 8)
    other = [(b @ x, torch.linalg.solve(x, a), s) for b, a, s in parts]
    for on in SIDES:
        for chain in (CHAINS["shift"], CHAINS["interpolate"]):
            one, two = (pools.exact(got(adapters(*p), chain, "component", on).update(MODULE)) for p in (parts, other))
            close(one, two, SUBSPACE64)


def test_saved_results_load_with_the_same_effect(tmp_path: Path) -> None:
    paths = [make_adapter(tmp_path / str(i), seed=i, rank=3 + i, dtype=torch.bfloat16) for i in range(3)]
    pool = [fl.load(p) for p in paths]
    result = fl.modulate(pool[0], [fl.dipm.shift(pool[1], pool[2], 0.5)])
    loaded = fl.load(result.save(tmp_path / "out", dtype="float32"))
    for module in result.modules:
        close(loaded.delta(module).double(), pools.exact(result.update(module)))
        norms = [pools.exact(x.update(module)).norm(dim=0) for x in (loaded, pool[0])]
        torch.testing.assert_close(*norms, rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_results_do_not_depend_on_grouping_or_backend(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {f"layer.{i}": [part(10 * i + j, rank=2 + (i + j) % 3) for j in range(3)] for i in range(5)}
    pool = [pools.make_adapter(f"a{j}", {m: p[j] for m, p in modules.items()}) for j in range(3)]

    def run() -> list[Tensor]:
        result = fl.modulate(
            pool[0], [fl.dipm.shift(pool[1], pool[2], 0.4), fl.dipm.reverse(2)], granularity=granularity
        )
        return [pools.exact(result.update(m)) for m in modules]

    found = run()
    for module, x in zip(modules, found, strict=True):
        alone = [pools.make_adapter(f"a{j}", {module: modules[module][j]}) for j in range(3)]
        single = fl.modulate(alone[0], fl.dipm.shift(alone[1], alone[2], 0.4), granularity=granularity)
        close(-2 * pools.exact(single.update(module)), x, FLOAT64)
    with monkeypatch.context() as patch, memory.bounded(1):  # one module at a time
        patch.setattr(memory, "LEAST", 1)
        assert all(torch.equal(x, y) for x, y in zip(run(), found, strict=True))
    with fl.use_backend("reference"):
        for x, y in zip(run(), found, strict=True):
            close(x, y)
