"""A prepared decomposition by the device's own kernels on CPU tensors: Triton's interpreter for the passes, and the
emulator for the chain where it is given. Its own process: the interpreter must be on before Triton is imported.

``TRITON_INTERPRET=1 python whole_path.py [emulated]``
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("cuda", "methods", ".")]

import pools

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.ops import dispatch

TAU = 0.5
PASSES = ("gram_pass", "combine_pass")


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


def check() -> None:
    for dtype, side, chain in (
        (torch.bfloat16, "left", "product"),
        (torch.float32, "right", "product"),
        (torch.float16, "left", "mean"),
    ):
        start = time.perf_counter()
        pool = pool_of(dtype)
        with fl.use_backend("cpu"):
            wanted = fl.decompose(pool, TAU, chain=chain, side=side)
            expected = wanted.adapters()
        plan = fl.DecompositionPlan(pool, TAU, chain=chain, side=side, dtype=torch.float32)
        plan.run()
        report = plan.decomposition().report
        for got, right in zip(report.rows, wanted.report.rows, strict=True):
            assert (got.module, got.shared, got.directions) == (right.module, right.shared, right.directions)
        assert any(row.shared for row in report.rows)
        found = plan.adapters()
        with fl.use_backend("cpu"):
            require_close(found, expected, 2e-5)
        print(f"{dtype} {side} {chain}: {time.perf_counter() - start:.1f} s", flush=True)


def main() -> None:
    for op in PASSES:
        dispatch.RULES[op] = {"cpu": ("triton",)}
    if sys.argv[1:] == ["emulated"]:
        import emulation

        from fastlora.backends import cuda

        cuda._module, cuda._device = emulation.build(), "cpu"
        for op in ("chain", "coefficients"):
            dispatch.RULES[op] = {"cpu": ("cuda",)}
    check()


if __name__ == "__main__":
    main()
