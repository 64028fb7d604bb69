"""The compiled CUDA kernels: tensors on a device become addresses here, and are checked here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.backends import Kernel

try:
    from fastlora import _core
except ImportError:
    _core = None  # type: ignore[assignment]

# The compiled module, and the type of device that its kernels run on. The tests put the emulator's in their place.
_module: Any = _core if _core is not None and _core.has_cuda else None
_device = "cuda"

# As in csrc/cuda/eigh.cuh and svd_block.cuh.
LARGEST = 256  # of n in eigh, of min(p, q) in svd
LONGEST = 4096  # of max(p, q) in svd


def unavailable() -> str | None:
    if _module is not None:
        return None
    if _core is None:
        return "the compiled module fastlora._core cannot be imported; the cpu backend says why"
    return (
        "this build has no CUDA kernels (built without nvcc, or with FASTLORA_CUDA=OFF): build it again where nvcc is "
        "on the PATH, or use the cpu backend"
    )


def _elsewhere(tensor: Tensor) -> str | None:
    if tensor.device.type == _device:
        return None
    return f"a tensor is on {tensor.device}, this backend needs a CUDA device; move it there or use the cpu backend"


def _aligned(x: Tensor) -> Tensor:
    """The tensor without gaps, at an address that its elements may have."""
    x = x.contiguous()
    return x if x.data_ptr() % x.element_size() == 0 else x.clone()


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _launch(op: str, function: Callable[..., int], device: torch.device, *tensors: Tensor, **sizes: Any) -> None:
    """Calls a kernel of the module on the current stream of the device; it does not wait for the kernel."""
    guard: Any = contextlib.nullcontext()
    stream = 0
    if device.type == "cuda":
        guard, stream = torch.cuda.device(device), torch.cuda.current_stream(device).cuda_stream
    with guard:
        error = function(*(t.data_ptr() for t in tensors), **sizes, stream=stream)
    if error:
        raise RuntimeError(f"fastlora.{op}: CUDA error {error}: {_module.cuda_error_message(error)}")


def _supports_eigh(a: Tensor) -> str | None:
    if a.shape[-1] > LARGEST:
        return f"eigh takes n up to {LARGEST}, got n = {a.shape[-1]}; use torch.linalg.eigh, or the cpu backend"
    return _elsewhere(a)


def _eigh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a = _aligned(a)
    values, vectors = _empty(a, a.shape[:-1]), _empty(a, a.shape)
    info = torch.zeros(a.shape[:-2], dtype=torch.int32, device=a.device)
    _launch(
        "eigh", _module.cuda_eigh, a.device, a, values, vectors, info, batch=info.numel(), n=a.shape[-1],
        is_double=a.dtype == torch.float64,
    )  # fmt: skip
    return values, vectors.mT, info


def _supports_svd(a: Tensor) -> str | None:
    p, q = a.shape[-2:]
    if min(p, q) > LARGEST or max(p, q) > LONGEST:
        return (
            f"svd takes min(p, q) up to {LARGEST} and max(p, q) up to {LONGEST}, got {p} x {q}; use torch.linalg.svd, "
            "or the cpu backend"
        )
    return _elsewhere(a)


def _svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = _aligned(a)
    *batch, p, q = a.shape
    m = min(p, q)
    ut, s, vt = (_empty(a, (*batch, *shape)) for shape in ((m, p), (m,), (m, q)))
    info = torch.zeros(batch, dtype=torch.int32, device=a.device)
    _launch(
        "svd", _module.cuda_svd, a.device, a, ut, s, vt, info, batch=info.numel(), p=p, q=q,
        is_double=a.dtype == torch.float64,
    )  # fmt: skip
    return ut.mT, s, vt, info


KERNELS: Mapping[str, Kernel] = {
    "eigh": Kernel(_eigh, _supports_eigh),
    "svd": Kernel(_svd, _supports_svd),
}
