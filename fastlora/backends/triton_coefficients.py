"""The op ``coefficients`` in Triton: two launches, prepared once and started as often as wanted."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora.backends import Kernel
from fastlora.reference.coefficients import Coefficients

LARGEST = 128  # of r: a program holds three matrices [r, r] in registers
ROWS = 16  # of H that are mixed at once


@dataclass(frozen=True, slots=True)
class Plan:
    """The arguments of both launches."""

    projected: Tensor
    other: Tensor
    basis: Tensor
    scaling: Tensor
    strength: Tensor
    out: Coefficients

    def run(self) -> None:
        import triton

        from tritonkernels import coefficients as kernels

        out = self.out
        g, k, w, r = out.H.shape
        if not g * k:
            return
        size = triton.next_power_of_2(r)
        warps = max(1, size // 8)
        with _on(self.basis.device):
            kernels.reduce[(g * k,)](
                self.projected, self.other, self.basis, self.scaling, self.strength,
                out.H, out.norms, out.shared, out.removal,
                k, r, w, out.removal.shape[2], out.removal.stride(-2), out.removal.stride(-1),
                R=size, num_warps=min(warps, 16), enable_fp_fusion=False,
            )  # fmt: skip
            kernels.mix[(g * k,)](
                out.H, out.shared, self.scaling, out.mixing,
                k, r, w, out.mixing.stride(-2), out.mixing.stride(-1),
                K=triton.next_power_of_2(k), R=size, ROWS=ROWS, num_warps=min(warps, 4), enable_fp_fusion=False,
            )  # fmt: skip


def _on(device: torch.device) -> Any:
    """Triton launches on the current device: make it that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _launch(*arguments: Any) -> None:
    Plan(*arguments).run()


def _supports(
    projected: Tensor, other: Tensor, basis: Tensor, scaling: Tensor, strength: Tensor, out: Coefficients
) -> str | None:
    for tensor in (projected, other, basis, scaling, strength, *out):
        if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"a tensor is on {tensor.device}, Triton needs a CUDA device"
        if tensor.dtype != torch.float64:
            return f"coefficients takes float64, got {tensor.dtype}"
    if not all(t.is_contiguous() for t in (projected, other, basis, scaling, strength, *out[:3])):
        return "coefficients takes contiguous tensors"
    if other.shape[-1] > LARGEST:
        return f"coefficients takes ranks up to {LARGEST}, got {other.shape[-1]}; use the cpu backend"
    return None


KERNEL = Kernel(_launch, _supports, Plan)
