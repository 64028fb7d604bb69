"""``chain`` on the CUDA kernel: the tests of the op, and what is particular to the kernel."""

from __future__ import annotations

import itertools
from typing import Any

import emulation
import pools
import pytest
import test_chain as op
import torch
from builders import gaussian
from tolerances import FLOAT64, ROOT64, SUBSPACE64, WEAK64
from torch import Tensor

import fastlora as fl
from fastlora.backends import cuda
from fastlora.ops.chain import CHAINS

KINDS = pytest.mark.parametrize("kind", CHAINS)


def wide_pool(k: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``B [k, 3r/2, r]`` and ``A [k, r, 2r]``: random column spaces in so few dimensions that they share directions and
    that product chains have complex eigenvalues."""
    B, A = gaussian(k, 3 * r // 2, r, seed=seed), gaussian(k, r, 2 * r, seed=seed + 1)
    return B.double(), A.double()


def assert_like_cpu(B: Tensor, A: Tensor, kind: str, threshold: float, **cuts: Any) -> fl.ops.Chain:
    """Compares the backend in force with the CPU's, as far as the Gram blocks decide the result."""
    blocks = op.blocks_of(B, A, kind)
    found = fl.ops.chain(*blocks, kind=kind, threshold=threshold, **cuts)
    with fl.use_backend("cpu"):
        expected = fl.ops.chain(*blocks, kind=kind, threshold=threshold, **cuts)
    for name in ("shared", "kept", "info"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    torch.testing.assert_close(found.sigma, expected.sigma, rtol=0, atol=ROOT64 * float(expected.sigma.max()))
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=SUBSPACE64)
    z, reference = (torch.einsum("...knr,...krw->...nw", B, x.basis) for x in (found, expected))
    torch.testing.assert_close(z @ z.mT, reference @ reference.mT, rtol=0, atol=WEAK64)
    return found


def same(found: fl.ops.Chain, expected: fl.ops.Chain) -> None:
    for name, x, y in zip(found._fields, found, expected, strict=True):
        assert torch.equal(x, y), name


@KINDS
@pytest.mark.parametrize(("pool", "schedule"), list(zip(pools.POOLS, itertools.cycle(emulation.SCHEDULES.values()))))
def test_dense(emulator: Any, kind: str, pool: str, schedule: int) -> None:
    """The pools of the op's test, by turns in every schedule."""
    with emulation.emulated(emulator, schedule):
        op.test_dense("cuda", kind, pool)


@pytest.mark.usefixtures("on_emulator")
class TestOp:
    """The other tests of the op, in every schedule."""

    @KINDS
    def test_cuts_and_bad_modules(self, kind: str) -> None:
        op.test_floor_takes_weak_directions_out("cuda", kind)
        op.test_a_bad_module_shares_nothing_and_spoils_nothing("cuda", kind, torch.nan)
        op.test_a_bad_module_shares_nothing_and_spoils_nothing("cuda", kind, torch.inf)
        op.test_only_the_upper_blocks_are_read(kind)

    @KINDS
    def test_scale(self, kind: str) -> None:
        op.test_scale_of_the_factors_changes_nothing(1e30, kind)
        op.test_scale_of_the_factors_changes_nothing(1e-30, kind)
        op.test_lengths_of_single_rows_change_nothing("cuda", kind)

    @KINDS
    @pytest.mark.parametrize("shape", [(0, 2, 4), (3, 2, 0), (0, 3, 0)], ids=str)
    def test_empty(self, kind: str, shape: tuple[int, int, int]) -> None:
        op.test_empty("cuda", kind, shape)

    def test_edges(self) -> None:
        for small in (1.0, 1e-3, 1e-6):
            op.test_rounding_of_factors_that_cancel_is_no_direction("cuda", small)
        op.test_one_adapter_is_the_whitening_alone("cuda")
        op.test_mean_at_threshold_zero_takes_directions_and_no_rounding("cuda")

    @KINDS
    def test_more_adapters_than_warps(self, kind: str) -> None:
        """Two rounds of whitenings, the chain carried from one to the next; complex eigenvalues above the threshold."""
        assert_like_cpu(*wide_pool(11, 6), kind, 0.05)

    @KINDS
    def test_ranks_of_the_whole_block(self, kind: str) -> None:
        assert_like_cpu(*wide_pool(3, 35), kind, 0.3)


@pytest.fixture
def in_order(emulator: Any) -> Any:
    with emulation.emulated(emulator):
        yield emulator


@KINDS
def test_same_bits(in_order: Any, kind: str) -> None:
    """Run to run, in every place of a batch, and in every schedule."""
    op.test_same_bits(kind)
    blocks = op.blocks_of(*wide_pool(3, 7), kind)
    found = [fl.ops.chain(*blocks, kind=kind, threshold=0.1)]
    for schedule in emulation.SCHEDULES.values():
        in_order.set_schedule(schedule)
        found.append(fl.ops.chain(*blocks, kind=kind, threshold=0.1))
    for other in found[1:]:
        same(other, found[0])


@KINDS
@pytest.mark.parametrize("limit", [6000, 12000, 25000], ids="{} bytes".format)
def test_memory_changes_no_bit(emulator: Any, kind: str, limit: int) -> None:
    """Fewer whitenings at a time where a block has little shared memory, and a workspace where it has too little."""
    B, A = (torch.stack(x) for x in zip(*(wide_pool(5, 6, seed) for seed in range(3)), strict=True))
    blocks = op.blocks_of(B, A, kind)
    with emulation.emulated(emulator):
        expected = fl.ops.chain(*blocks, kind=kind, threshold=0.1)
    with emulation.emulated(emulator, 7, limit):
        found = fl.ops.chain(*blocks, kind=kind, threshold=0.1)
    same(found, expected)
    assert int(found.info.sum()) == 0 and int(found.shared.min()) > 0


def test_workspace_is_asked_for_where_shared_memory_is_too_small(emulator: Any) -> None:
    sizes = {"groups": 300, "k": 8, "r": 16, "width": 16, "kind": 0}
    emulator.set_shared_limit(emulation.SHARED_LIMIT)
    assert emulator.cuda_chain_workspace(**sizes) == (0, 0)
    emulator.set_shared_limit(4096)
    error, size = emulator.cuda_chain_workspace(**sizes)
    assert error == 0 and size % (8 * 132) == 0 and size > 0


@KINDS
def test_blocks_that_take_one_module_after_another(emulator: Any, kind: str) -> None:
    """A grid of 132 blocks for more modules, in the workspace."""
    B, A = (x.expand(137, *x.shape) * torch.linspace(1, 2, 137)[:, None, None, None] for x in wide_pool(2, 2))
    blocks = op.blocks_of(B, A, kind)
    with emulation.emulated(emulator):
        expected = fl.ops.chain(*blocks, kind=kind, threshold=0.1)
    with emulation.emulated(emulator, 7, 512):
        found = fl.ops.chain(*blocks, kind=kind, threshold=0.1)
    same(found, expected)
    assert found.sigma[136, 0, 0] > 3 * found.sigma[0, 0, 0]


@pytest.mark.parametrize(("kind", "doubled"), [("product", [5, 6]), ("palindrome", [5, 6]), ("mean", [1, 2])])
def test_every_barrier_of_the_block_is_needed(emulator: Any, kind: str, doubled: list[int]) -> None:
    """Without any one of them the kernel is caught, but for two that follow each other after the last whitening."""
    blocks = op.blocks_of(*wide_pool(3, 5), kind)
    with emulation.emulated(emulator):
        total, missed = emulation.barriers_not_missed(
            emulator, lambda: fl.ops.chain(*blocks, kind=kind, threshold=0.2), of_warp=False
        )
    assert total >= 5 and missed == doubled


@pytest.mark.parametrize("kind", ["product", "palindrome"])
def test_most_barriers_of_a_warp_are_needed(emulator: Any, kind: str) -> None:
    """Those that are not stand beside another, or between rounds in which no column turns."""
    blocks = op.blocks_of(*wide_pool(3, 5), kind)
    with emulation.emulated(emulator):
        total, missed = emulation.barriers_not_missed(
            emulator, lambda: fl.ops.chain(*blocks, kind=kind, threshold=0.02), of_warp=True
        )
    assert total > 40 and len(missed) < total / 3


@KINDS
@pytest.mark.parametrize("r", [1, 2, 3, 5, 8, 17, 32])
def test_every_width_of_a_pair(in_order: Any, kind: str, r: int) -> None:
    """From all lanes on one pair of columns to two lanes on each of sixteen."""
    for k in (1, 2, 3):
        assert_like_cpu(*wide_pool(k, r), kind, 0.2)


@pytest.mark.parametrize(("r", "seed"), [(10, 5), (10, 10), (12, 9)])
def test_eigenvalues_are_moved_up(in_order: Any, r: int, seed: int) -> None:
    """Single eigenvalues and pairs pass single ones and pairs: here they come in no order, and every threshold between
    them is tried."""
    B, A = wide_pool(4, r, seed)
    values = fl.ops.chain(*op.blocks_of(B, A, "product")).values
    assert bool((values.imag != 0).any())
    real = values.real[values.real > 0]
    for high, low in itertools.pairwise(real.tolist()):
        if high - low > 2e-3:
            assert_like_cpu(B, A, "product", (high + low) / 2)


@KINDS
@pytest.mark.parametrize("condition", [1e3, 1e5])
def test_ill_conditioned_factors_cost_no_more_than_on_the_cpu(in_order: Any, kind: str, condition: float) -> None:
    """Errors against the dense float64 projectors of both backends."""
    parts = [(b, a, 1.0) for b, a, _ in pools.planted(3, condition=condition)]
    B, A = op.stack(parts)
    blocks = op.blocks_of(B, A, kind)
    dense = op.devec([pools.dense(p) for p in parts], 0.5, chain=kind, rtol=1e-9)
    errors = {}
    for backend in ("cuda", "cpu"):
        with fl.use_backend(backend):
            found = fl.ops.chain(*blocks, kind=kind, threshold=0.5, rtol=1e-9)
        assert found.kept.tolist() == dense.kept and int(found.shared) == dense.basis.shape[1]
        z = (B @ found.basis).sum(0)
        errors[backend] = float((z @ z.mT - dense.projector).norm())
    assert errors["cuda"] <= 10 * errors["cpu"] + FLOAT64, errors


@KINDS
def test_graded_factors_keep_their_eigenvalues(in_order: Any, kind: str) -> None:
    """Columns of very different lengths: Cholesky factors keep what an eigendecomposition of the Gram matrix loses."""
    grades = 10.0 ** (-torch.arange(8) * 0.5).double()
    B, A = gaussian(4, 12, 8, seed=1).double() * grades, gaussian(4, 8, 16, seed=2).double()
    found = fl.ops.chain(*op.blocks_of(B, A, kind), kind=kind)
    dense = op.devec([b @ a for b, a in zip(B, A, strict=True)], 0.999, chain=kind)
    assert found.kept.tolist() == dense.kept == [8] * 4
    op.same_spectrum(found.values, dense.values, atol=SUBSPACE64)


def test_a_bad_module_has_nan_for_singular_values(in_order: Any) -> None:
    left, right = op.blocks_of(*wide_pool(2, 4), "product")
    left[0, 1, 0, 0] = torch.nan
    found = fl.ops.chain(left, right)
    assert int(found.info) == 1 and found.kept.tolist() == [0, 0]
    assert bool(found.sigma.isnan().all()) and bool((found.values == 0).all())


@pytest.mark.parametrize(("shape", "kind", "message"), [
    ((2, 257), "product", r"ranks up to 256, got r = 257; compress the adapters, or use the cpu backend"),
    ((9, 64), "mean", r"k·r up to 512, got 9·64 = 576; use the product or palindrome chain, or the cpu backend"),
])  # fmt: skip
def test_what_is_too_large(in_order: Any, shape: tuple[int, int], kind: str, message: str) -> None:
    k, r = shape
    with pytest.raises(RuntimeError, match=message):
        fl.ops.chain(torch.zeros(k, k, r, r).double(), torch.zeros(k, r, r).double(), kind=kind)


@KINDS
@pytest.mark.parametrize("limit", [4096, emulation.SHARED_LIMIT], ids="{} bytes".format)
def test_a_plan_runs_on_what_its_tensors_hold_by_then(emulator: Any, kind: str, limit: int) -> None:
    first, second = (op.blocks_of(*wide_pool(3, 5, seed), kind) for seed in (0, 5))
    given = [x.clone() for x in first]
    with emulation.emulated(emulator, shared_limit=limit):
        expected = [fl.ops.chain(*blocks, kind=kind, threshold=0.1) for blocks in (first, second)]
        out = fl.ops.Chain(*(torch.full_like(x, -7) for x in expected[0]))
        plan = cuda.PreparedChain(*given, torch.zeros(3).double(), 0.1, kind, 1e-6, 0, 1.0, out)
        plan.run()
        same(out, expected[0])
        for tensor, other in zip(given, second, strict=True):
            tensor.copy_(other)
        plan.run()
    same(out, expected[1])


def test_a_plan_takes_no_copies(in_order: Any) -> None:
    left, right = op.blocks_of(*wide_pool(2, 4), "product")
    out = fl.ops.chain(left, right)
    with pytest.raises(ValueError, match="a plan needs contiguous tensors"):
        cuda.PreparedChain(left, right.mT, torch.zeros(2).double(), 0.1, "product", 1e-6, 0, 1.0, out)


def test_tensors_elsewhere(in_order: Any) -> None:
    left, right = torch.zeros(2, 2, 3, 3).double(), torch.zeros(2, 3, 3).double()
    reason = cuda.KERNELS["chain"].supports(left, right.to("meta"), None, 0.5, "product", 0.0, 0, 1.0)
    assert reason is not None and "a tensor is on meta" in reason
