"""From Gram blocks to shared directions, against dense projectors."""

from __future__ import annotations

from collections.abc import Sequence

import pools
import pytest
import torch
from builders import gaussian
from compiled import needs_kernels, needs_same_bits
from factors import BACKENDS, same_bits, strided
from tolerances import FLOAT64, GRAM64, ROOT64, SUBSPACE64, WEAK64
from torch import Tensor

import fastlora as fl
from fastlora.ops import dispatch
from fastlora.ops.chain import CHAINS, results
from fastlora.reference.devec import Dense, devec

pytestmark = pytest.mark.portable

CUTS: dict[str, dict[str, float]] = {"none": {}, "rank": {"rank": 3}, "energy": {"energy": 0.9}}


def stack(parts: Sequence[pools.Part]) -> tuple[Tensor, Tensor]:
    """``B [k, n, r]`` and ``A [k, r, m]``, zero-padded to the largest rank; scalings left out."""
    r = max(left.shape[1] for left, _, _ in parts)
    left = [torch.nn.functional.pad(left, (0, r - left.shape[1])) for left, _, _ in parts]
    right = [torch.nn.functional.pad(right, (0, 0, 0, r - right.shape[0])) for _, right, _ in parts]
    return torch.stack(left), torch.stack(right)


def blocks_of(B: Tensor, A: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    with fl.use_backend("auto"):
        left = fl.ops.gram(B, blocks="pairs" if kind == "mean" else "chain")
        right = fl.ops.gram(A, blocks="diagonal", rows=True).diagonal(dim1=-4, dim2=-3).movedim(-1, -3)
    return left, right.contiguous()


def same_spectrum(values: Tensor, dense: Tensor, atol: float = SUBSPACE64) -> None:
    """Every eigenvalue away from zero has its partner; the dense operator has more zeros."""
    for some, others in ((values, dense), (dense, values)):
        large = some[some.abs() > 1e-3]
        assert len(large) == int((others.abs() > 1e-3).sum())
        if len(large):
            assert float((large[:, None] - others).abs().amin(1).max()) <= atol


def check(
    parts: Sequence[pools.Part], kind: str, threshold: float, cut: dict[str, float], dense: Dense
) -> fl.ops.Chain:
    B, A = stack(parts)
    found = fl.ops.chain(*blocks_of(B, A, kind), threshold=threshold, kind=kind, **cut)  # type: ignore[arg-type]
    shared = int(found.shared)
    z = (B @ found.basis).sum(0)
    assert int(found.info) == 0 and found.kept.tolist() == dense.kept
    assert shared == dense.basis.shape[1]
    width = sum(dense.kept) if kind == "mean" else dense.kept[0]
    assert (found.values[:width].real.diff() <= FLOAT64).all()
    same_spectrum(found.values[:width], dense.values)
    for i, sigma in enumerate(dense.sigma):
        q = min(len(sigma), B.shape[-1])
        torch.testing.assert_close(found.sigma[i, :q], sigma[:q], rtol=0, atol=ROOT64 * float(sigma[0]))
        assert (found.sigma[i, q:] <= ROOT64 * sigma[0]).all()
    assert (z[:, shared:] == 0).all()
    frame = z[:, :shared]
    torch.testing.assert_close(frame.mT @ frame, torch.eye(shared, dtype=torch.float64), rtol=0, atol=SUBSPACE64)
    torch.testing.assert_close(frame @ frame.mT, dense.projector, rtol=0, atol=WEAK64)
    return found


@pytest.mark.parametrize("pool", pools.POOLS)
@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dense(backend: str, kind: str, pool: str) -> None:
    with fl.use_backend(backend):
        for k in (2, 3, 5):
            parts = [(b, a, 1.0) for b, a, _ in pools.POOLS[pool](k)]
            for cut in CUTS.values():
                deltas = [pools.dense(p) for p in parts]
                values = devec(deltas, 0.5, chain=kind, **cut).values  # type: ignore[arg-type]
                for threshold, _ in pools.thresholds(values, most=1):
                    check(parts, kind, threshold, cut, devec(deltas, threshold, chain=kind, **cut))  # type: ignore[arg-type]


@needs_same_bits
@pytest.mark.parametrize("kind", CHAINS)
def test_an_update_is_computed_at_its_own_rank(kind: str) -> None:
    """Whatever its blocks are padded to, and whoever is beside it: here also a module with an update of zero."""
    parts = [(gaussian(30, r, seed=i), gaussian(r, 20, seed=9 + i), 1.0) for i, r in enumerate((3, 8, 3))]
    B, A = stack(parts)
    wide_B, wide_A = torch.nn.functional.pad(B, (0, 16)), torch.nn.functional.pad(A, (0, 0, 0, 16))
    there = torch.tensor([1.0, 1.0, 0.0])[:, None, None]
    with fl.use_backend("cpu"):
        alone = fl.ops.chain(*blocks_of(B, A, kind), kind=kind)
        padded = fl.ops.chain(*blocks_of(torch.stack([wide_B, there * wide_B]), wide_A.expand(2, -1, -1, -1), kind),
                              kind=kind)  # fmt: skip
    assert padded.info.tolist() == [0, 0] and padded.kept.tolist() == [[3, 8, 3], [3, 8, 0]]
    for sigma in padded.sigma[0], torch.cat([padded.sigma[1, :2], padded.sigma[0, 2:]]):
        assert torch.equal(sigma[:, :8], alone.sigma) and (sigma[:, 8:] == 0).all()
    assert (padded.sigma[1, 2] == 0).all()
    same_spectrum(padded.values[0], alone.values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_adapter_is_the_whitening_alone(backend: str) -> None:
    B, A = stack(pools.deficient_right(1))
    with fl.use_backend(backend):
        found = fl.ops.chain(*blocks_of(B, A, "product"), threshold=0.0)
    u = B[0] @ found.basis[0]
    kept = int(found.kept[0])
    assert kept == int(torch.linalg.matrix_rank(B[0] @ A[0])) == 4 == int(found.shared)
    torch.testing.assert_close(found.values, (torch.arange(6) < kept).to(torch.complex128), rtol=0, atol=GRAM64)
    torch.testing.assert_close(u.mT @ u, torch.diag((torch.arange(6) < kept).double()), rtol=0, atol=GRAM64)
    torch.testing.assert_close(u @ (u.mT @ (B[0] @ A[0])), B[0] @ A[0], rtol=0, atol=GRAM64)


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("scale", [1e30, 1e-30], ids=["huge", "tiny"])
def test_scale_of_the_factors_changes_nothing(scale: float, kind: str) -> None:
    B, A = stack(pools.planted(3))
    plain = fl.ops.chain(*blocks_of(B, A, kind), threshold=0.5, kind=kind)
    scaled = fl.ops.chain(*blocks_of(B * scale, A * scale, kind), threshold=0.5, kind=kind)
    assert torch.equal(plain.kept, scaled.kept) and torch.equal(plain.shared, scaled.shared)
    torch.testing.assert_close(scaled.values, plain.values, rtol=0, atol=GRAM64 / 10)  # the same blocks, times a number
    torch.testing.assert_close(scaled.sigma / scale / scale, plain.sigma, rtol=WEAK64, atol=0)


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_of_single_rows_change_nothing(backend: str, kind: str) -> None:
    """A row of ``A`` times a power of two and a column of ``B`` divided by it: from a few powers to hundreds."""
    B, A = stack(pools.planted(3))
    powers = torch.randint(-9, 9, (3, 1, A.shape[1]), generator=torch.Generator().manual_seed(1)).double()
    with fl.use_backend(backend):
        plain = fl.ops.chain(*blocks_of(B, A, kind), threshold=0.5, kind=kind)
        for step in (1, 4, 11):
            lengths = (step * powers).exp2()
            moved = fl.ops.chain(*blocks_of(B / lengths, A * lengths.mT, kind), threshold=0.5, kind=kind)
            assert torch.equal(plain.kept, moved.kept) and torch.equal(plain.shared, moved.shared)
            torch.testing.assert_close(moved.values, plain.values, rtol=0, atol=SUBSPACE64)
            torch.testing.assert_close(moved.sigma, plain.sigma, rtol=0, atol=ROOT64 * float(plain.sigma.max()))
            z, reference = (x @ c.basis for x, c in ((B / lengths, moved), (B, plain)))
            z, reference = z.sum(0), reference.sum(0)
            torch.testing.assert_close(z @ z.mT, reference @ reference.mT, rtol=0, atol=WEAK64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("small", [1.0, 1e-3, 1e-6])
def test_rounding_of_factors_that_cancel_is_no_direction(backend: str, small: float) -> None:
    """``B = [X | X]`` and ``A = [Y; −Y + small·Y']``: what is left has the rank of ``Y'``."""
    X, Y, rest = (pools.orthonormal(n, 4, seed).double() for n, seed in ((30, 1), (25, 2), (25, 3)))
    B, A = torch.cat([X, X], 1), torch.cat([Y.mT, small * rest.mT - Y.mT])
    left, right = (B.mT @ B)[None, None], (A @ A.mT)[None]
    with fl.use_backend(backend):
        found = fl.ops.chain(left, right, threshold=0.5, rtol=1e-12)
    assert found.kept.tolist() == [4]


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_floor_takes_weak_directions_out(backend: str, kind: str) -> None:
    B, A = stack(pools.planted(2))
    left, right = blocks_of(B, A, kind)
    with fl.use_backend(backend):
        sigma = fl.ops.chain(left, right, kind=kind).sigma
        floor = torch.stack([(sigma[0, 1] + sigma[0, 2]) / 2, torch.tensor(torch.inf, dtype=torch.float64)])
        found = fl.ops.chain(left, right, kind=kind, floor=floor)
    assert found.kept.tolist() == [2, 0]
    assert int(found.shared) == 0


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_module_shares_nothing_and_spoils_nothing(backend: str, kind: str, bad: float) -> None:
    pairs = [stack(pools.planted(3, seed=s)) for s in range(4)]
    B, A = (torch.stack(x) for x in zip(*pairs, strict=True))
    left, right = blocks_of(B, A, kind)
    with fl.use_backend(backend):
        good = fl.ops.chain(left, right, kind=kind)
        left[1, 0, 1, 2, 3] = bad
        right[2, 1, 0, 0] = bad
        found = fl.ops.chain(left, right, kind=kind)
    assert found.info.tolist() == [0, 1, 1, 0]
    assert found.shared[1:3].tolist() == [0, 0] and (found.basis[1:3] == 0).all()
    for x, y in zip(found, good, strict=True):
        assert torch.equal(x[[0, 3]], y[[0, 3]])


@pytest.mark.parametrize("kind", CHAINS)
def test_only_the_upper_blocks_are_read(kind: str) -> None:
    left, right = blocks_of(*stack(pools.planted(4)), kind)
    poisoned = left.clone()
    poisoned[torch.ones(4, 4, dtype=torch.bool).tril(-1)] = torch.nan
    for x, y in zip(fl.ops.chain(left, right, kind=kind), fl.ops.chain(poisoned, right, kind=kind), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_at_threshold_zero_takes_directions_and_no_rounding(backend: str) -> None:
    """Copies of one adapter leave eigenvalues of 1e-17, which are no directions."""
    B, A = stack(pools.identical(3))
    with fl.use_backend(backend):
        found = fl.ops.chain(*blocks_of(B, A, "mean"), threshold=0.0, kind="mean")
    assert int(found.shared) == 6
    z = (B @ found.basis).sum(0)[:, :6]
    torch.testing.assert_close(z.mT @ z, torch.eye(6, dtype=torch.float64), rtol=0, atol=GRAM64)


@pytest.mark.parametrize("kind", ["product", "palindrome"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_adapter_gives_its_own_directions_in_their_order(backend: str, kind: str) -> None:
    """``basis`` is the whitening: ``B T`` are the left singular vectors, largest value first."""
    b, a, _ = pools.planted(1, seed=3)[0]
    with fl.use_backend(backend):
        found = fl.ops.chain(*blocks_of(b[None], a[None], kind), kind=kind, threshold=0.5)
    exact = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    count = int(found.kept)
    assert count == int(found.shared) == int((exact.S > 1e-6 * exact.S[0]).sum()) > 2
    assert bool((found.values[:count] == 1).all()) and not bool(found.values[count:].any())
    z = b.double() @ found.basis[0]
    along = (z[:, :count] * exact.U[:, :count]).sum(0).abs()
    torch.testing.assert_close(along, torch.ones_like(along), rtol=0, atol=SUBSPACE64)


@needs_same_bits
@pytest.mark.parametrize("kind", CHAINS)
def test_same_bits(kind: str) -> None:
    pairs = [stack(pools.planted(4, seed=s) if s % 2 else [(b[:, :6], a[:6], s) for b, a, s in pools.crowded(4)])
             for s in range(5)]  # fmt: skip
    left, right = blocks_of(*(torch.stack(x) for x in zip(*pairs, strict=True)), kind)
    for i in range(6):
        same_bits(
            lambda x, y, i=i: (
                torch.view_as_real(z) if (z := fl.ops.chain(x, y, kind=kind, threshold=0.1)[i]).is_complex() else z
            ),
            left,
            right,
        )
    expected = fl.ops.chain(left, right, kind=kind)
    for name, same in strided(left):
        for x, y in zip(fl.ops.chain(same, right, kind=kind), expected, strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 4), (3, 2, 0), (0, 3, 0)], ids=str)
def test_empty(backend: str, kind: str, shape: tuple[int, int, int]) -> None:
    batch, k, r = shape
    left, right = torch.zeros(batch, k, k, r, r).double(), torch.zeros(batch, k, r, r).double()
    with fl.use_backend(backend):
        found = fl.ops.chain(left, right, kind=kind)
    w = k * r if kind == "mean" else r
    assert found.basis.shape == (batch, k, r, w) and found.values.shape == (batch, w)
    assert found.shared.tolist() == [0] * batch and found.info.tolist() == [0] * batch


@pytest.mark.parametrize(("change", "message"), [
    ({"threshold": 1.0}, "threshold=1.0"), ({"threshold": -0.1}, "threshold=-0.1"), ({"kind": "sum"}, "product"),
    ({"rtol": 1.0}, "rtol=1.0"), ({"rank": -1}, "rank=-1"), ({"energy": 0.0}, "energy=0.0"),
    ({"threshold": float("nan")}, "threshold=nan"), ({"energy": float("nan")}, "energy=nan"),
])  # fmt: skip
def test_parameters_out_of_range(change: dict[str, object], message: str) -> None:
    with pytest.raises(fl.InputError, match=message):
        fl.ops.chain(*blocks_of(*stack(pools.planted(2)), "product"), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(("left", "right", "error", "message"), [
    ((2, 2, 3, 4), (2, 3, 3), ValueError, "left"), ((2, 3, 3, 3), (2, 3, 3), ValueError, "left"),
    ((2, 2, 3, 3), (3, 3, 3), ValueError, "right"), ((3, 3), (3, 3), ValueError, "left"),
])  # fmt: skip
def test_shapes(left: tuple[int, ...], right: tuple[int, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"chain: `{message}`"):
        fl.ops.chain(torch.zeros(left).double(), torch.zeros(right).double())


def test_float32_blocks_are_refused() -> None:
    with pytest.raises(TypeError, match="`right` must be float64"):
        fl.ops.chain(gaussian(2, 2, 3, 3, seed=0, dtype=torch.float64), gaussian(2, 3, 3, seed=0))


@needs_kernels
@pytest.mark.parametrize("kind", CHAINS)
def test_a_prepared_chain_takes_what_the_blocks_hold_when_it_runs(kind: str) -> None:
    left, right = blocks_of(*stack(pools.planted(3)), kind)
    floor, cuts = torch.zeros(3, dtype=torch.float64), (0.5, kind, 1e-9, 2, 1.0)
    with fl.use_backend("cpu"):
        found = [x.clone() for x in fl.ops.chain(left, right, threshold=0.5, kind=kind, rtol=1e-9, rank=2)]
        later, out = torch.empty_like(left), results(left, kind)
        prepare = dispatch.resolve("chain", later, right, floor, *cuts).prepare
        assert prepare is not None
        prepared = prepare(later, right, floor, *cuts, out)
        for numbers in (2.0 * left, left):
            later.copy_(numbers)
            prepared.run()
        assert all(map(torch.equal, out, found))
        with pytest.raises(ValueError, match="a plan needs contiguous tensors"):
            prepare(later, right.mT, floor, *cuts, out)
