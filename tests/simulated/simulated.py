"""A device that is none: tensors that say they are on ``cuda:0``, have their values on the CPU and meet no others.

What they prove without a GPU is the host's side: every tensor that the engine and the methods make is where the factors
are, and nothing is copied back and forth by accident. Kernels are those of the CPU, on the values held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled import ON_HOST
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastlora.ops import dispatch
from fastlora.ops.dispatch import Kernel
from fastlora.ops.merge_tiles import TileOutputs, TileResult, TileRule, TileTask
from fastlora.ops.passes import CombineJob, GramJob
from fastlora.runtime import devices

DEVICE = torch.device("cuda", 0)
MAKERS = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.arange, torch.tensor,
    torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like,
}  # fmt: skip
# Copies, and indexing by whole numbers on the CPU, which torch allows.
MIXED = (
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
)


class OnDevice(Tensor):
    """A tensor of the simulated device; ``held`` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype
        )
        made.held = held
        return made

    # To torch's own code it is on the CPU: no guard of a device that this build lacks is entered.
    device = DEVICE
    is_cpu = False
    is_cuda = True

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.held.clone()

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        to = kwargs.pop("device", None)
        flat, spec = tree_flatten((args, kwargs))
        if func not in MIXED:
            for t in flat:
                if isinstance(t, Tensor) and not isinstance(t, OnDevice) and t.dim():
                    raise AssertionError(f"{func}: a tensor {tuple(t.shape)} of the CPU meets one of the device")
        new_args, new_kwargs = tree_unflatten([t.held if isinstance(t, OnDevice) else t for t in flat], spec)
        result = func(*new_args, **new_kwargs)
        if func is torch.ops.aten.copy_.default:
            return args[0]
        if to is not None and torch.device(to).type == "cpu":
            return result
        for given in flat:  # in place: the same object
            if isinstance(given, OnDevice) and given.held is result:
                return given
        return tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, result)


class WithoutFloat64(OnDevice):
    """A tensor of a device that has no float64, as those of Apple are."""

    device = torch.device("mps", 0)
    is_cuda = False

    @staticmethod
    def __new__(cls, held: Tensor) -> WithoutFloat64:
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"a tensor {tuple(held.shape)} in {held.dtype} is made on a device that has no float64")
        made: WithoutFloat64 = OnDevice.__new__(cls, held)  # type: ignore[assignment]
        return made


def _put(x: Tensor, device: object) -> OnDevice:
    return (WithoutFloat64 if str(device).startswith("mps") else OnDevice)(x)


class _Making(TorchFunctionMode):
    """Tensors that are made on or moved to the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in MAKERS and _is_device(kwargs.get("device")):
            device, kwargs["device"] = kwargs["device"], "cpu"
            return _put(func(*args, **kwargs), device)
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):  # as another tensor
            args = args[0], args[1].device, args[1].dtype, *args[2:]
        if func is Tensor.to and (to := [x for x in (*args[1:], kwargs.get("device")) if _is_device(x)]):
            rest = [x for x in args[1:] if not _is_device(x)]
            kwargs.pop("device", None)
            x = args[0]
            if isinstance(x, OnDevice):
                return x.to(*rest) if rest else x
            return _put((x.to(*rest) if rest else x).clone(), to[0])
        if func is Tensor.to and isinstance(args[0], OnDevice) and "cpu" in map(str, (*args[1:], kwargs.get("device"))):
            return args[0].cpu()
        return func(*args, **kwargs)


def _is_device(x: object) -> bool:
    return isinstance(x, str | torch.device) and str(x).startswith(("cuda", "mps"))


def _held(x: Any) -> Any:
    if isinstance(x, GramJob):
        return replace(x, factors=[_held(f) for f in x.factors], out=_held(x.out))
    if isinstance(x, CombineJob):
        outputs = [
            replace(o, out=_held(o.out), terms=[(f, None if c is None else _held(c), at, s) for f, c, at, s in o.terms])
            for o in x.outputs
        ]
        return replace(x, factors=[_held(f) for f in x.factors], outputs=outputs)
    if isinstance(x, TileTask):
        return replace(x, pairs=[None if pair is None else tuple(map(_held, pair)) for pair in x.pairs])
    if isinstance(x, TileRule):
        return x if x.bits is None else replace(x, bits=_held(x.bits))
    if isinstance(x, TileOutputs):
        given = {name: getattr(x, name) for name in ("dense", "right", "left")}
        return replace(x, **{name: None if tensor is None else _held(tensor) for name, tensor in given.items()})
    if isinstance(x, Tensor):
        assert isinstance(x, OnDevice), f"a tensor {tuple(x.shape)} of the CPU is given to a kernel of the device"
        return x.held
    return x


def _kernel(launch: Callable[..., Any]) -> Kernel:
    """A kernel of the host, on the values held."""

    def on_held(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            result = launch(*tree_map(_held, args))
            if isinstance(result, TileResult):
                return result if result.product is None else replace(result, product=OnDevice(result.product))
            return tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, result)

    return Kernel(on_held, dispatch.always)


_submit = ThreadPoolExecutor.submit


def _submit_making(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
    """Threads make tensors on the device too: modes of torch belong to a thread."""

    def making() -> Any:
        with _Making():
            return fn(*args, **kwargs)

    return _submit(self, making)


@contextlib.contextmanager
def simulated_device() -> Iterator[None]:
    """Inside the block, ``"cuda"`` is the simulated device, there for fastlora and not for torch's own functions."""
    of_host = dispatch.kernels(ON_HOST[0])
    assert not isinstance(of_host, str), of_host
    table = {op: _kernel(kernel.launch) for op, kernel in of_host.items()}
    with (
        pytest.MonkeyPatch.context() as patch,
        dispatch.use_kernels("cuda", table),
        dispatch.use_kernels("triton", {}),
        _Making(),
    ):
        patch.setattr(devices, "unavailable", lambda index=None: None)
        patch.setattr(torch.cuda, "current_device", lambda: DEVICE.index)
        # compiled code is told that these tensors are on the CPU, and they have no memory
        patch.setattr(devices, "_other", lambda device: WithoutFloat64.device if device.type == "mps" else None)
        patch.setattr(ThreadPoolExecutor, "submit", _submit_making)
        yield
