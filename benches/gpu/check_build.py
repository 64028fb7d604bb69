"""``python -m benches.gpu.check_build``: a kernel of each backend on the device; a sentence and 1 where that fails."""

from __future__ import annotations

import sys

import torch

import fastlora as fl
from fastlora.ops.dispatch import kernels


def main() -> str | None:
    """What is wrong, or ``None``."""
    for backend in ("cuda", "triton"):
        if isinstance(reason := kernels(backend), str):
            return f"{backend}: {reason}"
    a = torch.diag(torch.tensor([3.0, 2.0, 1.0])).to("cuda")
    with fl.use_backend("cuda"):
        values = fl.ops.eigh(a)[0].cpu().sort().values
    if not torch.allclose(values, torch.tensor([1.0, 2.0, 3.0])):
        return f"cuda: the eigenvalues of diag(3, 2, 1) are {values.tolist()}"
    x = torch.arange(1.0, 9.0, device="cuda").reshape(1, 1, 4, 2)
    with fl.use_backend("triton"):
        found = fl.ops.gram(x)
    wanted = x.double().mT @ x.double()
    if not torch.allclose(found.reshape(2, 2).double(), wanted.reshape(2, 2)):
        return f"triton: Gram blocks are {found.flatten().tolist()}, not {wanted.flatten().tolist()}"
    return None


if __name__ == "__main__":
    sys.exit(main())
