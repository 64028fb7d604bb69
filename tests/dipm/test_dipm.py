"""Direction and magnitude against dense float64, over granularities, sides, operators and inputs."""

from __future__ import annotations

import pools
import pytest
import torch
from builders import gaussian
from pools import MODULE, Part
from tolerances import FLOAT32
from torch import Tensor

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.dipm import Operator
from fastlora.reference import dipm as dense

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
