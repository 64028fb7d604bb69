"""Controls of shared components: the same modules, ranks and norms, in the space that they were drawn from."""

from __future__ import annotations

from pathlib import Path

import pools
import pytest
import torch
from pools import MODULE, N, Part
from test_poolgram import counted
from tolerances import FLOAT64, SUBSPACE64, WEAK64
from torch import Tensor

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.coefficients import control as module
from fastlora.engine.materialise import materialise

pytestmark = pytest.mark.portable


def ragged(k: int = 3) -> list[Part]:
    parts = pools.cast(pools.planted(k, noise=0.02), torch.float32)
    b, a, s = parts[1]
    return [parts[0], (torch.cat([b, b[:, :1]], 1), torch.cat([a, a[:1]]), -s), *parts[2:]]  # a repeated column


def delta(adapter: Adapter) -> Tensor:
    return pools.exact(adapter.update(MODULE))


def rank_of(x: Tensor) -> int:
    s = torch.linalg.svdvals(x)
    return int((s > 1e-6 * s[0]).sum())


def mean_of(parts: list[Part], Z: Tensor) -> Tensor:
    """MATH (10) on dense matrices."""
    projected = [Z @ (Z.mT @ pools.dense(p)) for p in parts]
    norms = torch.stack([x.norm() for x in projected])
    return sum(w * x for w, x in zip(norms / norms.sum(), projected, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["random", "top"])
def test_rank_norm_and_space(kind: str, side: str) -> None:
    parts = ragged() if side == "left" else pools.transposed(ragged())
    found = fl.decompose(pools.make_pool(parts), 0.6, side=side)
    count = found.report.rows[0].shared
    assert count >= 2
    control = fl.control(found, kind, seed=4)
    assert list(control) == ["shared"]
    x, shared = delta(control["shared"]), delta(found.shared)
    assert control["shared"].update(MODULE).rank == count == rank_of(x)
    assert float(x.norm()) == pytest.approx(float(shared.norm()), rel=SUBSPACE64)
    if side == "right":
        x, parts = x.mT, pools.transposed(parts)
    basis = torch.linalg.svd(torch.cat([pools.dense(p) for p in parts], 1), full_matrices=False)
    space = basis.U[:, basis.S > 1e-6 * basis.S[0]]
    assert float((x - space @ (space.mT @ x)).norm()) <= WEAK64 * float(x.norm())
    # the definition, from the directions that the result has
    Z = torch.linalg.svd(x).U[:, :count]
    wanted = mean_of(parts, Z)
    assert float((x - wanted * (x.norm() / wanted.norm())).norm()) <= WEAK64 * float(x.norm())
    if kind == "top":
        top = basis.U[:, :count]
        assert float((Z @ Z.mT - top @ top.mT).norm()) <= WEAK64


def test_random_controls_are_seeded_and_of_their_own() -> None:
    pool = pools.make_pool(ragged())
    found = fl.decompose(pool, 0.6, mode="pairs")
    one, two, three = (fl.control(found, seed=s) for s in (0, 0, 1))
    assert list(one) == ["a0+a1", "a0+a2", "a1+a2"]
    for name in one:
        assert torch.equal(delta(one[name]), delta(two[name]))
        x, y, shared = delta(one[name]), delta(three[name]), delta(found.pairs[tuple(name.split("+"))].shared)  # type: ignore[index]
        assert float((x - y).norm()) > 0.1 * float(x.norm()) and float((x - shared).norm()) > 0.1 * float(x.norm())
        assert float(x.norm()) == pytest.approx(float(shared.norm()), rel=SUBSPACE64)
    # a pair's control does not depend on the other adapters of the pool
    pair = fl.decompose(pool.subset(["a0", "a2"]), 0.6, mode="pairs")
    assert torch.allclose(delta(fl.control(pair)["a0+a2"]), delta(one["a0+a2"]), rtol=SUBSPACE64, atol=FLOAT64)


def test_random_directions_are_spread_over_the_whole_space() -> None:
    """The mean projector of a uniform q-dimensional subspace of a d-dimensional space is (q/d)·I on it."""
    parts = ragged(2)
    found = fl.decompose(pools.make_pool(parts), 0.6)
    count, total, draws = found.report.rows[0].shared, torch.zeros(N, N, dtype=torch.float64), 300
    for seed in range(draws):
        Z = torch.linalg.svd(delta(fl.control(found, seed=seed)["shared"])).U[:, :count]
        total += Z @ Z.mT
    values = torch.linalg.eigvalsh(total / draws)
    space = rank_of(torch.cat([pools.dense(p) for p in parts], 1))
    assert float(values[: N - space].abs().max()) < WEAK64
    assert float((values[N - space :] - count / space).abs().max()) < 0.15


def test_reads_the_factors_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fl.decompose(pools.make_pool(ragged()), 0.6, mode="pairs")
    with counted(monkeypatch) as reads:
        fl.control(found)
    assert reads and set(reads.values()) == {1}


def test_nothing_shared_gives_empty_controls(tmp_path: Path) -> None:
    found = fl.decompose(pools.make_pool(pools.orthogonal(2)), 0.9)
    for kind in module.KINDS:
        empty = fl.control(found, kind)["shared"]
        assert empty.update(MODULE).rank == 0 and empty.modules == found.shared.modules
    loaded = fl.load(empty.save(tmp_path / "x"))
    assert float(loaded.delta(MODULE).norm()) == 0.0


def test_modules_that_one_adapter_lacks() -> None:
    parts = ragged(2)
    first = pools.make_adapter("a", {"x": parts[0], "y": parts[0]})
    pool = fl.Pool([first, pools.make_adapter("b", {"x": parts[1]})])
    found = fl.decompose(pool, 0.6)
    control = fl.control(found, "top")["shared"]
    assert control.modules == found.shared.modules == ["x", "y"] and control.update("y").rank == 0
    assert control.update("x").rank == found.shared.update("x").rank > 0


def test_messages() -> None:
    pool = pools.make_pool(ragged())
    with pytest.raises(fl.InputError, match="'best' does not exist here: use one of random, top"):
        fl.control(fl.decompose(pool, 0.6), "best")
    with pytest.raises(fl.InputError, match="mode='iterative' has no shared component"):
        fl.control(fl.decompose(pool, 0.6, mode="iterative", target="a0"))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["random", "top"])
@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7, 1e-9])
def test_adapters_of_very_different_sizes(size: float, kind: str, side: str) -> None:
    """Their column spaces do not depend on their sizes: as many directions, orthonormal, of all adapters together."""
    parts = pools.planted(3, noise=0.02)
    parts = [(b * factor, a, s) for (b, a, s), factor in zip(parts, (1.0, size, size**0.5), strict=True)]
    pool = pools.make_pool(parts if side == "left" else pools.transposed(parts))
    found = fl.decompose(pool, 0.2, chain="mean", side=side)
    (row,) = found.report.rows
    spanned = rank_of(torch.cat([pools.dense((b / b.norm(), a, s)) for b, a, s in parts], 1))
    assert spanned >= row.shared > max(row.directions)  # those of the small ones count, too
    control = fl.control(found, kind, seed=1)["shared"].update(MODULE)
    B, A = materialise([control], torch.float64)[0]
    Z = B if side == "left" else A.mT
    assert Z.shape[1] == row.shared
    torch.testing.assert_close(Z.mT @ Z, torch.eye(row.shared, dtype=torch.float64), rtol=0, atol=WEAK64)
    frames = torch.linalg.svd(torch.cat([pools.dense((b / b.norm(), a, s)) for b, a, s in parts], 1)).U[:, :spanned]
    assert float((Z - frames @ (frames.mT @ Z)).norm()) <= WEAK64
    shared = pools.exact(found.shared.update(MODULE))
    assert float(pools.exact(control).norm()) == pytest.approx(float(shared.norm()), rel=WEAK64)


def test_a_tiny_adapter_counts_in_the_random_directions() -> None:
    """Uniform in the space of both: on average the small one has its share of them."""
    large, small = (
        pools.split(pools.orthonormal(N, 6, 3)[:, :3], 28, 5),
        pools.split(pools.orthonormal(N, 6, 3)[:, 3:], 28, 9),
    )
    pool = pools.make_pool([large, (1e-8 * small[0], *small[1:])])
    found = fl.decompose(pool, 0.4, chain="mean")
    assert found.report.rows[0].shared == 6
    other = fl.decompose(pools.make_pool([large, small]), 0.4, chain="mean")
    for kind in ("random", "top"):
        one, two = (fl.control(d, kind)["shared"].update(MODULE) for d in (found, other))
        assert one.rank == two.rank == 6
