"""What holds for every decomposition, each in a test of its own (MATH section 3)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pools
import pytest
import torch
from builders import gaussian
from pools import MODULE, Part
from test_devec import CHAINS, basis_of, close
from tolerances import FLOAT32, FLOAT64, GRAM64, ROUNDED32, SUBSPACE64, WEAK64
from torch import Tensor

import fastlora as fl
from fastlora.decomposition.components import Components
from fastlora.reference.devec import devec
from fastlora.runtime import memory

pytestmark = pytest.mark.portable

SIDES = ["left", "right"]
THRESHOLD = {"product": 0.7, "palindrome": 0.7, "mean": 0.87}
"""Between the planted directions and the rest of :func:`near`, for up to three adapters."""


def near(k: int, side: str = "left", dtype: torch.dtype = torch.float32) -> list[Part]:
    """Two planted directions at cosines of about 0.97, and nothing else that is near."""
    parts = pools.cast(pools.planted(k), dtype)
    return parts if side == "left" else pools.transposed(parts)


def whole(parts: list[Part], chain: str = "product", side: str = "left", threshold: float | None = None) -> Components:
    tau = THRESHOLD[chain] if threshold is None else threshold
    return fl.decompose(pools.make_pool(parts), tau, chain=chain, side=side).components


def z_of(components: Components) -> Tensor:
    return basis_of(components, components.results[MODULE])


def every_chain_and_side(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("chain", CHAINS)(pytest.mark.parametrize("side", SIDES)(test))


@every_chain_and_side
def test_the_planted_directions_are_found(chain: str, side: str) -> None:
    for k in (2, 3):
        found = whole(near(k, side), chain, side)
        result = found.results[MODULE]
        assert result.count == 2
        assert float((result.values.real - THRESHOLD[chain]).abs().min()) > 0.02


@every_chain_and_side
def test_shared_and_unique_add_up(chain: str, side: str) -> None:
    parts = near(3, side)
    found = whole(parts, chain, side)
    for i, part in enumerate(parts):
        total = found.shared_of(f"a{i}") + found.unique_of(f"a{i}")
        close(pools.exact(total.update(MODULE)), pools.dense(part), pools.dense(part), FLOAT64)
        close(total.delta(MODULE).double(), pools.dense(part), pools.dense(part), FLOAT32)


@every_chain_and_side
def test_the_basis_is_orthonormal_and_the_unique_part_orthogonal_to_it(chain: str, side: str) -> None:
    parts = near(3, side)
    found = whole(parts, chain, side)
    z = z_of(found)
    close(z.mT @ z, torch.eye(2, dtype=torch.float64), torch.ones(1), GRAM64)
    for i, part in enumerate(parts):
        unique = pools.exact(found.unique_of(f"a{i}").update(MODULE))
        overlap = z.mT @ (unique if side == "left" else unique.mT)
        assert float(overlap.norm()) <= SUBSPACE64 * float(pools.dense(part).norm())


@every_chain_and_side
@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_identical_adapters_share_everything(k: int, chain: str, side: str) -> None:
    parts = pools.cast(pools.identical(k), torch.float32)
    found = whole(parts, chain, side, 0.99)
    assert found.results[MODULE].count == 6
    close(found.results[MODULE].values[:6].real, torch.ones(6).double(), torch.ones(1), SUBSPACE64)
    for i in range(k):
        assert float(pools.exact(found.unique_of(f"a{i}").update(MODULE)).norm()) <= SUBSPACE64
    close(pools.exact(found.shared.update(MODULE)), pools.dense(parts[0]), pools.dense(parts[0]), SUBSPACE64)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_orthogonal_column_spaces_share_nothing(k: int, chain: str) -> None:
    parts = pools.cast(pools.orthogonal(k), torch.float32)
    found = whole(parts, chain, threshold=0.05 if chain != "mean" else 1 / k + 0.05)
    assert found.results[MODULE].count == 0
    assert found.shared.update(MODULE).rank == 0
    for i, (left, _, scaling) in enumerate(parts):
        unique = found.unique_of(f"a{i}").update(MODULE)
        assert unique.B.stored is left and unique.scaling == scaling


@pytest.mark.parametrize("chain", ["product", "palindrome"])
@pytest.mark.parametrize("side", SIDES)
def test_the_unique_parts_of_two_share_nothing(chain: str, side: str) -> None:
    """Also where rounding leaves directions of 1e-16 behind: they lie below the floor of the originals.

    Not under ``mean``: what it leaves of two lines beside their bisector lies on one line, to both sides of it.
    """
    for parts in (near(2, side), pools.cast(pools.identical(2), torch.float32), near(2, side, torch.bfloat16)):
        found = whole(parts, chain, side)
        assert found.results[MODULE].count >= 2
        rest = fl.Pool([found.unique_of("a0"), found.unique_of("a1")])
        again = fl.decompose(rest, THRESHOLD[chain], chain=chain, side=side)
        assert again.report.rows[0].shared == 0


@every_chain_and_side
def test_the_factorisation_does_not_matter(chain: str, side: str) -> None:
    """``(B X, X⁻¹ A)`` in float64, where the two are the same update to 1e-15."""
    parts = near(3, side, torch.float64)
    other = []
    for i, (left, right, s) in enumerate(parts):
        x = pools.mixing(6, seed=i, condition=100.0)
        other.append((left @ x, torch.linalg.inv(x) @ right, s))
    one, two = whole(parts, chain, side), whole(other, chain, side)
    close(one.results[MODULE].values, two.results[MODULE].values, torch.ones(1), SUBSPACE64)
    close(z_of(one) @ z_of(one).mT, z_of(two) @ z_of(two).mT, torch.ones(1), SUBSPACE64)
    for name in ("a0", "a1", "a2"):
        close(*(pools.exact(x.unique_of(name).update(MODULE)) for x in (one, two)), torch.ones(1), WEAK64)


@every_chain_and_side
@pytest.mark.parametrize("scaling", [0.25, -3.0, 1e-20, 1e20])
def test_parts_scale_and_the_basis_does_not(scaling: float, chain: str, side: str) -> None:
    parts = near(3, side)
    scaled = [(b, a, scaling * s if i == 1 else s) for i, (b, a, s) in enumerate(parts)]
    one, two = whole(parts, chain, side), whole(scaled, chain, side)
    assert torch.equal(z_of(one), z_of(two))
    for part in (Components.shared_of, Components.unique_of):
        expected = pools.exact(part(one, "a1").update(MODULE)) * scaling
        close(pools.exact(part(two, "a1").update(MODULE)), expected, expected, FLOAT64)
        assert torch.equal(pools.exact(part(two, "a2").update(MODULE)), pools.exact(part(one, "a2").update(MODULE)))


@every_chain_and_side
def test_a_scaling_of_zero_is_a_zero_update(chain: str, side: str) -> None:
    """``ΔW = 0`` has no column space, whatever its factors hold."""
    parts = near(3, side)
    parts[1] = (parts[1][0], parts[1][1], 0.0)
    found = whole(parts, chain, side, 0.5)
    dense = devec([pools.dense(p) for p in parts], 0.5, chain=chain, side=side)
    assert list(found.results[MODULE].kept) == dense.kept == [6, 0, 6]
    assert found.results[MODULE].count == dense.basis.shape[1]
    assert found.results[MODULE].count == (0 if chain != "mean" else 2)


@pytest.mark.parametrize("side", SIDES)
def test_two_adapters_in_either_order(side: str) -> None:
    """The same eigenvalues; ``Z`` lies in the column space of the first."""
    parts = near(2, side)
    one, two = whole(parts, side=side), whole(parts[::-1], side=side)
    close(one.results[MODULE].values, two.results[MODULE].values, torch.ones(1), SUBSPACE64)
    for found, first in ((one, parts[0]), (two, parts[1])):
        frame = torch.linalg.qr((first[0] if side == "left" else first[1].mT).double()).Q
        z = z_of(found)
        close(frame @ (frame.mT @ z), z, torch.ones(1), SUBSPACE64)
    assert float((z_of(one) @ z_of(one).mT - z_of(two) @ z_of(two).mT).norm()) > 1e-3


@pytest.mark.parametrize("side", SIDES)
def test_mean_has_no_order(side: str) -> None:
    parts = near(3, side)
    first = whole(parts, "mean", side)
    for order in permutations(range(3)):
        other = whole([parts[i] for i in order], "mean", side)
        close(other.results[MODULE].values, first.results[MODULE].values, torch.ones(1), GRAM64)
        for place, i in enumerate(order):
            got, expected = (pools.exact(f.unique_of(f"a{n}").update(MODULE)) for f, n in ((other, place), (first, i)))
            close(got, expected, torch.ones(1), SUBSPACE64)


@pytest.mark.parametrize("chain", ["product", "palindrome"])
def test_the_other_chains_have_one(chain: str) -> None:
    parts = near(3)
    one, two = whole(parts, chain), whole([parts[1], parts[0], parts[2]], chain)
    got, expected = (pools.exact(f.unique_of(n).update(MODULE)) for f, n in ((two, "a1"), (one, "a0")))
    assert float((got - expected).norm()) > 1e-3


@pytest.mark.parametrize("chain", CHAINS)
def test_common_directions_have_eigenvalue_one_in_every_chain(chain: str) -> None:
    frame = pools.orthonormal(40, 14, 5)
    frames = [torch.cat([frame[:, :2], frame[:, 2 + 4 * i : 6 + 4 * i]], 1) for i in range(3)]
    found = whole([pools.split(f, 28, 60 + i) for i, f in enumerate(frames)], chain, threshold=0.95)
    close(z_of(found) @ z_of(found).mT, frame[:, :2] @ frame[:, :2].mT, torch.ones(1), SUBSPACE64)


@pytest.mark.parametrize(("chain", "value"), [
    ("product", lambda c: c * c), ("palindrome", lambda c: c * c), ("mean", lambda c: (1 + c) / 2),
])  # fmt: skip
def test_two_lines_at_an_angle(chain: str, value: Callable[[float], float]) -> None:
    cosine = 0.8
    lines = [torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([[cosine], [0.6], [0.0]])]
    row = torch.tensor([[2.0, -1.0]])
    found = whole([(line, row, 1.0) for line in lines], chain, threshold=0.5)
    assert float(found.results[MODULE].values[0]) == pytest.approx(value(cosine), abs=ROUNDED32)


@pytest.mark.parametrize("chain", CHAINS)
def test_merged_part_is_weighted_by_norm(chain: str) -> None:
    parts = near(3)
    found = whole(parts, chain)
    shared = [pools.exact(found.shared_of(f"a{i}").update(MODULE)) for i in range(3)]
    norms = torch.stack([s.norm() for s in shared])
    expected = sum(w * s for w, s in zip(norms / norms.sum(), shared, strict=True))
    assert isinstance(expected, Tensor)
    close(pools.exact(found.shared.update(MODULE)), expected, expected, FLOAT64)
    assert found.shared.update(MODULE).rank == 2


@every_chain_and_side
@pytest.mark.parametrize("mode", ["pool", "pairs", "iterative"])
def test_same_bits_whatever_the_threads_and_chunks(
    mode: str, chain: str, side: str, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [{f"m{j}": near(3, side)[i] if j else pools.planted(3, seed=9)[i] for j in range(5)} for i in range(3)]
    pool = fl.Pool(pools.make_adapter(f"a{i}", m) for i, m in enumerate(modules))

    target = "a0" if mode == "iterative" else None

    def results(bound: int | None = None) -> list[Tensor]:
        found = fl.decompose(pool, 0.7, mode=mode, chain=chain, side=side, target=target, memory=bound)
        adapters = found.adapters().values()
        return [t for a in adapters for m in a for t in a.factors(m)]

    expected = results()
    for count, size in ((1, None), (2, None), (2, 1), (1, 40_000)):
        threads(count)
        # Beyond a bound that is used up, as many modules at once as fit into this many bytes: one, and two or three.
        monkeypatch.setattr(memory, "LEAST", size or memory.LEAST)
        for got, wanted in zip(results(size), expected, strict=True):
            assert torch.equal(got, wanted), f"{count} threads, {size} bytes"


@every_chain_and_side
def test_every_element_of_a_result_is_written(chain: str, side: str, poisoned_empty: None, tmp_path: Path) -> None:
    found = fl.decompose(pools.make_pool(near(3, side)), THRESHOLD[chain], chain=chain, side=side)
    for adapter in found.adapters().values():
        assert all(t.isfinite().all() for t in adapter.factors(MODULE))
    found.save(tmp_path / "out", dtype="bfloat16")


def test_backends_give_one_result() -> None:
    parts = near(3)
    for chain in CHAINS:
        found = whole(parts, chain)
        with fl.use_backend("reference"):
            reference = whole(parts, chain)
            expected = pools.exact(reference.unique_of("a0").update(MODULE))
        close(pools.exact(found.unique_of("a0").update(MODULE)), expected, expected, GRAM64)


def test_cut_directions_stay_with_the_unique_part() -> None:
    parts = near(2)
    found = fl.decompose(pools.make_pool(parts), 0.0, rank=2)
    left = pools.dense(parts[0])
    u, s, vh = torch.linalg.svd(left)
    weak = u[:, 2:28] @ torch.diag(s[2:]) @ vh[2:]
    unique = pools.exact(found.unique_of("a0").update(MODULE))
    close(unique, weak, left, WEAK64)


def test_pool_of_many_modules_equals_its_modules_alone() -> None:
    shapes = {"tall": (70, 20), "wide": (20, 70), "small": (9, 9)}
    modules = [
        {m: (gaussian(n, 4 + i, seed=i), gaussian(4 + i, c, seed=9 + i), 2.0) for m, (n, c) in shapes.items()}
        for i in range(3)
    ]
    pool = fl.Pool(pools.make_adapter(f"a{i}", m) for i, m in enumerate(modules))
    together = fl.decompose(pool, 0.05)
    for m in shapes:
        alone = fl.decompose(fl.Pool(pools.make_adapter(f"a{i}", {m: own[m]}) for i, own in enumerate(modules)), 0.05)
        assert torch.equal(together.spectrum[m], alone.spectrum[m])
        for i in range(3):
            assert torch.equal(together.unique_of(f"a{i}").delta(m), alone.unique_of(f"a{i}").delta(m))


@pytest.mark.parametrize(("noise", "degrees"), [(0.1, 5.7), (0.2, 11.2), (0.3, 15.3), (0.39, 18.3)])
def test_toy_experiment(noise: float, degrees: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 rows, 100 shared and 100 own columns: the recovered shared space is at the known mean angle."""
    path = Path(__file__).parents[2] / "examples" / "toy.py"
    spec = importlib.util.spec_from_file_location("toy", path)
    assert spec is not None and spec.loader is not None
    toy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "toy", toy)
    spec.loader.exec_module(toy)
    trial = toy.run_trial(noise, seed=0)
    assert trial.angle == pytest.approx(degrees, abs=1.0)
    low, high = trial.values[100:], trial.values[:100]
    assert float(high.min()) - float(low.max()) > 0.05
