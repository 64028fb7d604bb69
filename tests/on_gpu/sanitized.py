"""Every kernel once, in every form: what compute-sanitizer runs. Ends with 1 where a result is not finite or is wrong.

A line a group of kernels as it is done, so that a run which is stopped says how far it came. ``--quick`` leaves out
matrices of more than a hundred columns, for where a kernel's threads take turns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import fastlora as fl
from fastlora.bench.gpu.checks import require_plan
from fastlora.bench.workloads import Workload, make_pool
from fastlora.decomposition.plan import DecompositionPlan
from fastlora.ops import merge_tiles
from fastlora.ops.dispatch import run
from fastlora.ops.merge_tiles import TileOutputs, TileRule, TileTask
from fastlora.ops.similarity import similarity

SHORT = {"a": (37, 29), "b": (64, 48)}
LONG = {"a": (1100, 1040)}  # long enough for sums on tensor cores
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def require_finite(*tensors: Tensor) -> None:
    if not all(bool(torch.isfinite(tensor.cpu()).all()) for tensor in tensors):
        raise AssertionError("a result is not finite")


def solvers(sizes: tuple[tuple[int, int], ...]) -> None:
    """A warp a matrix, a block in shared memory below and above 48 KB, and in place; eigh divided and not."""
    for dtype in (FP32, FP64):
        for p, q in sizes:
            a = gaussian(2, p, q, dtype=dtype)
            require_finite(*fl.ops.svd_ex(a), *fl.ops.svd_ex(a.mT))
            if p < 300:
                require_finite(*fl.ops.eigh_ex(a @ a.mT))


def plan(
    modules: dict[str, tuple[int, int]], rank: int, dtype: torch.dtype, chain: str = "product", side: str = "left"
) -> None:
    """Gram blocks, chain, coefficients and results, all held against float64."""
    pool = make_pool(Workload(modules, 3, rank, dtype)).to("cuda")
    own = DecompositionPlan(pool, 0.3, chain=chain, side=side)
    own.run()
    for part in own.parts:
        require_finite(*part.small, part.chain.basis)
    require_plan(own)


def tiles(dtype: torch.dtype) -> None:
    """Every kind of trimming and election, dense and in products."""
    shape, k = (70, 130), 3
    pairs = [(gaussian(70, r, seed=r, dtype=dtype), gaussian(r, 130, seed=9 + r, dtype=dtype)) for r in (5, 1, 16)]
    task = TileTask(pairs, [1.0, -0.5, 2.0], shape, FP64 if dtype == FP64 else FP32)
    keys = [merge_tiles.key_of(7, i) for i in range(k)]
    cuts = merge_tiles.select(task, [(i, 2000) for i in range(k)])
    votes = {"votes": [1.0] * k, "gains": [1.0] * k, "shares": [1.0] * k}
    masks = merge_tiles.row_masks(task, [(0.1, 0.4)] * k, keys, 3)
    varied = merge_tiles.select(task, [(0, 2000)], "variance")
    assert merge_tiles.count_varied(task) == 70 * 130
    for rule in (
        TileRule("magnitude", cuts, elect="total", **votes),
        TileRule("magnitude", cuts, merge_tiles.select(task, [(i, 90) for i in range(k)]), elect="frequency", **votes),
        TileRule("random", keep=[2**31] * k, keys=keys, gains=[1.0] * k),
        TileRule("bits", bits=masks, elect="total", **votes),
        TileRule("variance", varied, elect="total", **votes),
    ):
        dense = torch.full(shape, torch.nan, dtype=dtype, device="cuda")
        merge_tiles.merge(task, rule, TileOutputs(dense=dense, sums=True))
        told = merge_tiles.merge(task, rule, TileOutputs(left=gaussian(70, 4, dtype=FP64)))
        assert told.product is not None
        require_finite(dense, told.product)


def pairs_of_adapters() -> None:
    """Tiles of several adapters, of one, and wider than one."""
    for ranks in ([3, 0, 8, 1, 16], [40, 64], [70, 4]):
        starts = torch.tensor([0, *ranks]).cumsum(0)
        left, right = gaussian(130, sum(ranks)), gaussian(300, sum(ranks), seed=1)
        require_finite(*similarity(left, right, starts, torch.tensor([max(0, r - 1) for r in ranks])))


def unlike() -> None:
    """Scalings beyond float32, and factors of several dtypes."""
    for dtypes, scalings in (((BF16, BF16), (1e25, 1e-25)), ((FP16, FP32), (1.0, 0.5))):
        adapters = [
            fl.Adapter.from_tensors(
                {"q": (gaussian(70, 8, seed=i, dtype=dtype), gaussian(8, 90, seed=9 + i, dtype=dtype), scaling)},
                name=f"a{i}",
            )
            for i, (dtype, scaling) in enumerate(zip(dtypes, scalings, strict=True))
        ]
        own = DecompositionPlan(fl.Pool(adapters), 0.3)
        own.run()
        require_plan(own)
    x = gaussian(70, 20, dtype=BF16)
    assert run("finite", x) and not run("finite", x * torch.nan)


def groups(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "plans on tensor cores", lambda: [plan(LONG, 16, d, side=s) for d in (BF16, FP16) for s in ("left", "right")]
    yield "plans in float64", lambda: [plan(SHORT, 5, FP32, chain=c) for c in ("product", "palindrome", "mean")]
    yield "plans of odd ranks", lambda: [plan(SHORT | LONG, 5, BF16, chain=c) for c in ("product", "mean")]
    yield "chains in a workspace", partial(plan, {"a": (80, 90)}, 72, FP32)
    yield "factors that are not alike", unlike
    yield "rules on elements", lambda: [tiles(d) for d in (BF16, FP32, FP64)]
    yield "all pairs", pairs_of_adapters
    yield "small matrices", partial(solvers, ((1, 3), (5, 7), (17, 19), (33, 20), (48, 50)))
    if not quick:
        yield "large matrices", partial(solvers, ((120, 120), (150, 150), (240, 240), (1520, 8), (203, 48)))


def main() -> None:
    for name, work in groups("--quick" in sys.argv[1:]):
        try:
            work()
            torch.cuda.synchronize()
        except AssertionError as error:
            sys.exit(f"{name}: {error}")
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
