"""``python3 -m fastlora.bench.gpu.profiled``: every kernel once, between the marks that a profiler waits for."""

from __future__ import annotations

import argparse

import torch

import fastlora as fl
from fastlora.bench.gpu.events import FULL, TAU, TINY, Sizes
from fastlora.bench.solvers import gram
from fastlora.bench.workloads import make_pool


def main(sizes: Sizes) -> None:
    """One eager run of the main decomposition, of eigh and of svd; all of it ran before, so nothing is compiled."""
    plan = fl.DecompositionPlan(make_pool(sizes.workload).to("cuda"), TAU)
    squares = [gram(n, sizes.batch, torch.float32).to("cuda") for n in (16, 32, 64, 128)]

    def run() -> None:
        plan.run()
        for a in squares:
            fl.ops.eigh_ex(a)
        for a in squares[:3]:
            fl.ops.svd_ex(a)
        torch.cuda.synchronize()

    run()
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaProfilerStart()
    run()
    runtime.cudaProfilerStop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="inputs that show whether everything runs")
    main(TINY if parser.parse_args().tiny else FULL)
