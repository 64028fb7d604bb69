"""The compiled CUDA kernels: tensors on a device become addresses here, and are checked here."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.backends.padded import aligned, chain
from fastlora.backends.rows import ChainCall, CoefficientsRow, packed
from fastlora.ops.coefficients import PartCoefficients
from fastlora.ops.dispatch import Kernel

try:
    from fastlora import _core
except ImportError:
    _core = None  # type: ignore[assignment]

# The compiled module, and the type of device that its kernels run on.
_module: Any = _core if _core is not None and _core.has_cuda else None
_device = "cuda"


@contextlib.contextmanager
def use_module(module: Any, device: str = "cuda") -> Iterator[None]:
    """Inside the block, in all threads, the kernels are those of another compiled module, for tensors on this type of
    device: an emulator's run on the CPU. ``None`` is a build without kernels."""
    global _module, _device
    before = _module, _device
    _module, _device = module, device
    try:
        yield
    finally:
        _module, _device = before


def unavailable() -> str | None:
    """Why the compiled CUDA kernels cannot be used, or ``None`` where they can."""
    if _module is not None:
        return _without_device(_module) if _device == "cuda" else None
    if _core is None:
        return "the compiled module fastlora._core cannot be imported; the cpu backend says why"
    return (
        "this build has no CUDA kernels (built without nvcc, or with FASTLORA_CUDA=OFF): build it again where nvcc is "
        "on the PATH, or use the cpu backend"
    )


@functools.cache
def _without_device(module: Any) -> str | None:
    count, reason = module.cuda_device_count()
    if not count:
        return f"there is no CUDA device that can be used ({reason}); use the cpu backend"
    error, architecture = module.cuda_device_code()
    if not error:
        return None
    return (
        f"the CUDA kernels of this build, which are for {module.cuda_archs}, cannot run on the device, "
        f"sm_{architecture} (CUDA error {error}: {module.cuda_error_message(error)}): build it again with "
        f"FASTLORA_CUDA_ARCHS={architecture}-real, or use the torch or cpu backend"
    )


def _elsewhere(tensor: Tensor) -> str | None:
    if tensor.device.type == _device:
        return None
    return f"a tensor is on {tensor.device}, this backend needs a CUDA device; move it there or use the cpu backend"


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _info(a: Tensor) -> Tensor:
    """For a code a matrix, which the kernels write; there is no launch for matrices without elements."""
    make = torch.empty if a.numel() else torch.zeros
    return make(a.shape[:-2], dtype=torch.int32, device=a.device)


def _launch(op: str, function: Callable[..., int], device: torch.device, *arguments: Any, **sizes: Any) -> None:
    """Calls a kernel of the module on the current stream of the device; it does not wait for the kernel."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with _on(device):
        error = function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), **sizes, stream=stream)
    _raise_for(op, error)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _raise_for(op: str, error: int) -> None:
    if error:
        raise RuntimeError(
            f"fastlora.{op}: CUDA error {error}: {_module.cuda_error_message(error)}. It may come from something that "
            "was started earlier: CUDA_LAUNCH_BLOCKING=1 makes every call tell its own"
        )


def _supports_eigh(a: Tensor) -> str | None:
    largest = _core.CUDA_LARGEST_EIGH
    if a.shape[-1] > largest:
        return f"eigh takes n up to {largest}, got n = {a.shape[-1]}; use torch.linalg.eigh, or the cpu backend"
    return _elsewhere(a)


def _eigh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a = aligned(a)
    values, vectors = _empty(a, a.shape[:-1]), _empty(a, a.shape)
    info = _info(a)
    _launch(
        "eigh", _module.cuda_eigh, a.device, a, values, vectors, info, batch=info.numel(), n=a.shape[-1],
        is_double=a.dtype == torch.float64,
    )  # fmt: skip
    return values, vectors.mT, info


def _supports_svd(a: Tensor) -> str | None:
    p, q = a.shape[-2:]
    largest, longest = _core.CUDA_LARGEST_SVD, _core.CUDA_LONGEST_SVD
    if min(p, q) > largest or max(p, q) > longest:
        return (
            f"svd takes min(p, q) up to {largest} and max(p, q) up to {longest}, got {p} x {q}; use torch.linalg.svd, "
            "or the cpu backend"
        )
    return _elsewhere(a)


def _svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = aligned(a)
    *batch, p, q = a.shape
    m = min(p, q)
    ut, s, vt = (_empty(a, (*batch, *shape)) for shape in ((m, p), (m,), (m, q)))
    info = _info(a)
    _launch(
        "svd", _module.cuda_svd, a.device, a, ut, s, vt, info, batch=info.numel(), p=p, q=q,
        is_double=a.dtype == torch.float64,
    )  # fmt: skip
    return ut.mT, s, vt, info


def _supports_chain(
    left: Tensor,
    right: Tensor,
    floor: Tensor | None,
    threshold: float,
    kind: str,
    rtol: float,
    rank: int,
    energy: float,
) -> str | None:
    k, r = left.shape[-4], left.shape[-1]
    largest, largest_mean = _core.CUDA_LARGEST_RANK, _core.CUDA_LARGEST_MEAN
    if r > largest:
        return f"chain takes ranks up to {largest}, got r = {r}; compress the adapters, or use the cpu backend"
    if kind == "mean" and k * r > largest_mean:
        return (
            f"the mean chain takes k·r up to {largest_mean}, got {k}·{r} = {k * r}; use the product or palindrome "
            "chain, or the cpu backend"
        )
    for tensor in (left, right, floor):
        if tensor is not None and (reason := _elsewhere(tensor)):
            return reason
        if tensor is not None and tensor.device != left.device:
            return f"tensors are on {left.device} and {tensor.device}; move them to one device"
    return None


class PreparedChain:
    """A chain on tensors that stay where they are: ``run()`` starts it on what they hold by then.

    Its inputs and results are contiguous; the workspace is allocated here, once.
    """

    def __init__(self, *arguments: Any) -> None:
        self._call = ChainCall(*arguments)
        row, left = self._call.row(_core.CHAIN_KINDS, 0), self._call.left
        with _on(left.device):
            error, size = _module.cuda_chain_workspace(row.groups, row.k, row.r, row.width, row.kind)
        _raise_for("chain", error)
        self._workspace = left.new_empty(size // left.element_size())
        self._row = packed(row, _core.CHAIN_FIELDS)

    def run(self) -> None:
        """Starts the chain on the current stream, without waiting for it."""
        _launch("chain", _module.cuda_chain, self._workspace.device, self._row, self._workspace)


def _supports_coefficients(
    projected: Tensor, other: Tensor, basis: Tensor, scaling: Tensor, strength: Tensor, out: PartCoefficients
) -> str | None:
    for tensor in (projected, other, basis, scaling, strength, *out):
        if reason := _elsewhere(tensor):
            return reason
        if tensor.dtype != torch.float64:
            return f"coefficients takes float64, got {tensor.dtype}"
    whole = projected, other, basis, scaling, strength, *out[:3]
    turned = [x for x in (out.removal, out.mixing) if not x.is_contiguous() and not x.mT.is_contiguous()]
    if turned or not all(t.is_contiguous() for t in whole):
        return "coefficients takes contiguous tensors; of `removal` and `mixing` also the transposed ones"
    return None


class PreparedCoefficients:
    """Coefficients on tensors that stay where they are: ``run()`` computes them from what these hold by then."""

    def __init__(
        self, projected: Tensor, other: Tensor, basis: Tensor, scaling: Tensor, strength: Tensor, out: PartCoefficients
    ) -> None:
        self._tensors = (projected, other, basis, scaling, strength, *out)
        self._row = packed(
            CoefficientsRow.of(projected, other, basis, scaling, strength, out), _core.COEFFICIENT_FIELDS
        )

    def run(self) -> None:
        """Starts the kernel on the current stream, without waiting for it."""
        _launch("coefficients", _module.cuda_coefficients, self._tensors[0].device, self._row)


def _coefficients(*arguments: Any) -> None:
    PreparedCoefficients(*arguments).run()


KERNELS: Mapping[str, Kernel] = {
    "chain": Kernel(functools.partial(chain, PreparedChain), _supports_chain, PreparedChain),
    "coefficients": Kernel(_coefficients, _supports_coefficients, PreparedCoefficients),
    "eigh": Kernel(_eigh, _supports_eigh),
    "svd": Kernel(_svd, _supports_svd),
}
