"""Times on a CUDA device: by events, each answer checked first, inputs that are not in the L2 cache.

``python3 -m fastlora.bench.gpu.cases OUT`` runs each case in a process of its own and appends one JSON object a line to
``OUT`` as it finishes each measurement, or ``failed`` with a sentence; ``--tiny`` on inputs that show whether
everything runs, and nothing about time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

import fastlora as fl
from fastlora.bench.contest import Unavailable, require
from fastlora.bench.gpu import apart
from fastlora.bench.gpu.checks import require_plan
from fastlora.bench.gpu.events import FULL, TAU, TINY, Sizes, captured, copy_bandwidth, device_seconds
from fastlora.bench.gpu.launches import launches
from fastlora.bench.gpu.plain import plain
from fastlora.bench.gpu.sweeps import sweeps
from fastlora.bench.solvers import gram, identity
from fastlora.bench.timing import Action
from fastlora.bench.workloads import make_pool, write_pool
from fastlora.decomposition.plan import DecompositionPlan


def limits(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Measures the bandwidth of a copy, which the floors of other cases are computed from."""
    yield {"key": "copy", "bytes_per_second": copy_bandwidth(sizes)}


def decompose(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """The whole decomposition and its two passes, as CUDA graphs and launched from Python."""
    pool = make_pool(sizes.workload)
    _require_same(make_pool(sizes.workload.head(sizes.checked)))
    plan = DecompositionPlan(pool.to("cuda"), TAU)
    plan.run()
    require_plan(plan)
    read = sum(
        f.stored.nbytes for a in pool.adapters for u in a.updates.values() for f in (u.B, u.A) if f.stored is not None
    )
    written = sum(t.nbytes for t in _results(plan))
    blocks = plan.block_bytes
    bandwidth = copy_bandwidth(sizes)
    graph = plan.capture()
    for result in _results(plan):
        result.fill_(torch.nan)
    seconds = device_seconds(graph.replay, sizes)
    require_plan(plan)  # what the replays left
    yield {"key": "decompose", "seconds": seconds, "floor": (read + written) / bandwidth,
           "note": f"CUDA graph; {read / 1e6:.0f} MB read once, {written / 1e6:.0f} MB written"}  # fmt: skip
    eager = device_seconds(plan.run, sizes, head_start=0)
    yield {"key": "decompose, eager", "seconds": eager, "floor": (read + written) / bandwidth}
    for key, run, moved in (
        ("gram", plan.gram.run, read + blocks),
        ("combine", plan.combine.run, read + written),
    ):
        yield {"key": key, "seconds": device_seconds(captured(run), sizes), "floor": moved / bandwidth}
    for i, part in enumerate(plan.parts):
        yield {"key": f"chain and coefficients, group {i}", "seconds": device_seconds(captured(part.run), sizes)}


def _results(plan: DecompositionPlan) -> list[Tensor]:
    unique = [t for factors in plan.unique_parts.values() for t in factors.values()]
    return unique + [t for pair in plan.shared_parts.values() for t in pair]


def _require_same(pool: fl.Pool) -> None:
    """Gram blocks, chain and coefficients on the device against the CPU backend: ``ΔW`` of every result, in float32."""
    plan = DecompositionPlan(pool.to("cuda"), TAU, dtype=torch.float32)
    plan.run()
    made, wanted = plan.adapters(), fl.decompose(pool, TAU).adapters()
    for part, adapter in wanted.items():
        result = made[part].to("cpu")
        for module in adapter.modules:
            require(f"{part} {module}", result.delta(module), adapter.delta(module), 2e-5)


def eigh(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Times eigendecompositions of ``[batch, n, n]`` in float32, of most sizes against torch and CuPy."""
    for n in (16, 32, 33, 64, 128):
        a = gram(n, sizes.batch, torch.float32).to("cuda")
        values, vectors = fl.ops.eigh(a)
        tolerance = 200 * torch.finfo(a.dtype).eps
        require("eigh", (vectors * values[..., None, :]) @ vectors.mT, a, tolerance)
        require("orthogonality", vectors.mT @ vectors, identity(n, sizes.batch, a.dtype).to("cuda"), tolerance)
        copies = [a.clone() for _ in range(8)]
        ours = device_seconds(_rotated(fl.ops.eigh_ex, copies), sizes)
        yield {"key": f"eigh {n}", "seconds": ours, "floor": None, "note": f"{sizes.batch} matrices"}
        opponents: dict[str, Callable[[], Action]] = {}
        if n != 33:
            opponents["cupy"] = partial(_cupy_eigh, a, values)
        if n > 32:
            opponents["torch"] = partial(_torch, torch.linalg.eigh, a)
        for name, opponent in opponents.items():
            yield _against(f"eigh {n} {name}", ours, opponent, sizes)


def _rotated(op: Callable[[Tensor], object], inputs: list[Tensor]) -> Action:
    """Calls an op on one input after the other."""
    state = {"next": 0}

    def run() -> object:
        state["next"] += 1
        return op(inputs[state["next"] % len(inputs)])

    return run


def _against(key: str, ours: float, opponent: Callable[[], Action], sizes: Sizes) -> dict[str, Any]:
    """A row; an opponent that fails here, in whatever way, is named as not measured and stops nothing else."""
    try:
        theirs = device_seconds(opponent(), replace(sizes, rounds=min(7, sizes.rounds)))
    except Unavailable as reason:
        return {"key": key, "skipped": str(reason)}
    except Exception as error:
        return {"key": key, "skipped": f"{type(error).__name__}: {_last_line(error)}"}
    return {"key": key, "seconds": ours, "opponent": theirs}


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[-1]


def _torch(op: Callable[..., object], a: Tensor, **options: Any) -> Action:
    return partial(op, a, **options)


def _cupy_eigh(a: Tensor, wanted: Tensor) -> Action:
    try:
        import cupy
    except ImportError as error:
        raise Unavailable(f"CuPy is not installed ({error})") from None
    x = cupy.from_dlpack(a)  # CuPy's and torch's current streams are both the default one
    require("CuPy's values", from_dlpack(cupy.linalg.eigh(x)[0]), wanted, 1e-4)
    return partial(cupy.linalg.eigh, x)


def svd(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Times singular value decompositions of ``[batch, n, n]`` in float32 against torch."""
    for n, batch in ((16, sizes.batch), (32, sizes.batch), (64, sizes.batch // 4)):
        a = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(0)).to("cuda")
        u, s, vh = fl.ops.svd(a)
        tolerance = 200 * torch.finfo(a.dtype).eps
        require("svd", (u * s[..., None, :]) @ vh, a, tolerance)
        require("orthogonality", vh @ vh.mT, identity(n, batch, a.dtype).to("cuda"), tolerance)
        ours = device_seconds(_rotated(fl.ops.svd_ex, [a.clone() for _ in range(8)]), sizes)
        yield _against(f"svd {n} torch", ours, partial(_torch, torch.linalg.svd, a, full_matrices=False), sizes)


def files(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Wall time from files to files against copying as many bytes as are written."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        inputs = write_pool(sizes.workload, root / "in")

        def ours() -> None:
            shutil.rmtree(root / "out", ignore_errors=True)
            start = time.perf_counter()
            fl.decompose(fl.Pool.load(inputs), TAU, device="cuda").save(root / "out")
            times.append(time.perf_counter() - start)

        def copy() -> None:
            shutil.rmtree(root / "copy", ignore_errors=True)
            (root / "copy").mkdir()
            start = time.perf_counter()
            for i, source in enumerate(results):
                shutil.copyfile(source, root / "copy" / str(i))
            times.append(time.perf_counter() - start)

        times: list[float] = []
        ours()
        results = sorted((root / "out").rglob("*.safetensors"))
        for source in results:
            source.rename(root / f"{len(list(root.iterdir()))}.safetensors")
        results = sorted(root.glob("*.safetensors"))
        medians = {}
        for name, run in (("ours", ours), ("copy", copy)):
            run()
            times.clear()
            for _ in range(3):
                run()
            medians[name] = statistics.median(times)
        size = sum(f.stat().st_size for f in results)
        yield {"key": "files", "seconds": medians["ours"], "floor": medians["copy"],
               "note": f"wall time; {size / 1e6:.0f} MB written, shutil.copyfile on one thread"}  # fmt: skip


CASES: dict[str, Callable[[Sizes], Iterator[dict[str, Any]]]] = {
    "limits": limits, "decompose": decompose, "launches": launches, "plain": plain, "files": files, "eigh": eigh,
    "svd": svd, "sweeps": sweeps,
}  # fmt: skip


def main() -> int:
    """Runs the cases that the command line names; returns how many of them failed, the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", nargs="*", default=[name for name in CASES if name != "sweeps"], choices=list(CASES))
    parser.add_argument("--tiny", action="store_true", help="inputs that show whether everything runs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of all together; a case has half of it")
    arguments = parser.parse_args()
    sizes = TINY if arguments.tiny else FULL
    works = [(name, partial(_measure, name, sizes, arguments.out)) for name in arguments.cases]
    failed = 0
    apart.preload()
    for ended in apart.run(works, limit=arguments.seconds / 2, whole=arguments.seconds):
        print(f"{ended.name}: {ended.seconds:.1f} s{f', {ended.reason}' if ended.reason else ''}", flush=True)
        failed += ended.reason is not None
        if ended.reason is not None and ended.reason != f"ended with {TOLD}":
            _append(arguments.out, {"key": ended.name, "failed": ended.reason})
    return failed


TOLD = 3  # how a process ends that has told of its failure itself


def _measure(name: str, sizes: Sizes, out: Path) -> None:
    try:
        for row in CASES[name](sizes):
            _append(out, row)
    except Exception as error:
        traceback.print_exc()
        _append(out, {"key": name, "failed": f"{type(error).__name__}: {_last_line(error)}"})
        sys.stderr.flush()
        os._exit(TOLD)  # without what a device in error makes of an ordinary end


def _append(out: Path, row: dict[str, Any]) -> None:
    text = json.dumps(row)
    print(text, flush=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
