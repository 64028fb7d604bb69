"""Every kernel once on tiny, odd shapes: what compute-sanitizer runs. Ends with 1 where a result is not finite."""

from __future__ import annotations

import sys

import torch

import fastlora as fl
from fastlora.bench.workloads import Workload, make_pool
from fastlora.decomposition.plan import DecompositionPlan


def require_finite(what: str, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if not bool(torch.isfinite(tensor.cpu()).all()):
            sys.exit(f"{what}: a result is not finite")


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        for n in (1, 5, 17, 33, 48):
            a = torch.randn(3, n, n + 2, generator=generator).to("cuda", dtype)
            require_finite(f"eigh {n}", *fl.ops.eigh_ex(a @ a.mT))
            require_finite(f"svd {n}", *fl.ops.svd_ex(a))
    for dtype in (torch.bfloat16, torch.float32):
        for chain in ("product", "palindrome", "mean"):
            pool = make_pool(Workload({"a": (37, 29), "b": (64, 48)}, 3, 5, dtype)).to("cuda")
            plan = DecompositionPlan(pool, 0.3, chain=chain)
            plan.run()
            for part in plan.parts:
                require_finite(f"plan {chain}", *part.small, part.chain.basis)
            require_finite("results", *(t for own in plan.unique_parts.values() for t in own.values()))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
