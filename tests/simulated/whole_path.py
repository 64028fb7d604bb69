"""A prepared decomposition by the device's own kernels on CPU tensors: Triton's interpreter for the passes, and the
emulator for the chain where it is given. Short ragged modules with results in float32 are held against the CPU; long
ones, which tensor cores take, number by number in their own dtype. Its own process: the interpreter must be on before
Triton is imported.

``TRITON_INTERPRET=1 python whole_path.py [emulated]``
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("emulated", ".")]

import pools
from tolerances import SUMS32

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.backends import cpu, cuda, triton
from fastlora.bench.gpu.checks import require_plan
from fastlora.bench.workloads import Workload, make_pool
from fastlora.ops import dispatch
from fastlora.ops.dispatch import Kernel

TAU = 0.5
PASSES = ("gram_pass", "combine_pass")
SMALL = ("chain", "coefficients")


def pool_of(dtype: torch.dtype) -> fl.Pool:
    """Three ragged adapters; one module that two have."""
    first = pools.cast(pools.ragged(3), dtype)
    second = pools.cast(pools.planted(3, seed=9), dtype)
    parts = [{"q": first[0], "k": second[0]}, {"q": first[1]}, {"q": first[2], "k": second[2]}]
    return fl.Pool(pools.make_adapter(f"a{i}", p) for i, p in enumerate(parts))


def require_close(found: dict[str, Adapter], wanted: dict[str, Adapter], tolerance: float) -> None:
    for place, adapter in wanted.items():
        for module in adapter.modules:
            delta = adapter.delta(module)
            error = float((found[place].delta(module) - delta).norm() / delta.norm().clamp(min=1e-6))
            assert error < tolerance, f"{place} {module}: {error:.1e}"


def check(table: Mapping[str, Kernel]) -> None:
    """Plans on the kernels of the table, against the CPU's own."""
    for dtype, side, chain in (
        (torch.bfloat16, "left", "product"),
        (torch.float32, "right", "product"),
        (torch.float16, "left", "mean"),
    ):
        start = time.perf_counter()
        pool = pool_of(dtype)
        wanted = fl.decompose(pool, TAU, chain=chain, side=side)
        with dispatch.use_kernels("cpu", table):
            plan = fl.DecompositionPlan(pool, TAU, chain=chain, side=side, dtype=torch.float32)
            plan.run()
            report, found = plan.decomposition().report, plan.adapters()
        for got, right in zip(report.rows, wanted.report.rows, strict=True):
            assert (got.module, got.shared, got.directions) == (right.module, right.shared, right.directions)
        assert any(row.shared for row in report.rows)
        require_close(found, wanted.adapters(), 2 * SUMS32)
        print(f"{dtype} {side} {chain}: {time.perf_counter() - start:.1f} s", flush=True)
    for dtype, side in ((torch.bfloat16, "left"), (torch.float16, "right")):
        start = time.perf_counter()
        long = make_pool(Workload({"q": (1100, 1040), "k": (64, 1040)}, 3, 8, dtype))
        with dispatch.use_kernels("cpu", table):
            plan = fl.DecompositionPlan(long, TAU, side=side)
            plan.run()
            require_plan(plan)
        kernels = {launch.kernel.fn.__name__ for passed in (plan.gram, plan.combine) for launch in passed.launches}
        assert "half_sums" in kernels and "exact_results" not in kernels, kernels
        print(f"{dtype} {side} on tensor cores: {time.perf_counter() - start:.1f} s", flush=True)


def main() -> None:
    table = {**cpu.KERNELS, **{op: triton.KERNELS[op] for op in PASSES}}
    with contextlib.ExitStack() as stack:
        if sys.argv[1:] == ["emulated"]:
            import emulation

            stack.enter_context(cuda.use_module(emulation.build(), "cpu"))
            table |= {op: cuda.KERNELS[op] for op in SMALL}
        check(table)


if __name__ == "__main__":
    main()
