"""Ops on devices without float64: what needs it is computed on the host, from copies, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora.core.float64 import has_float64
from fastlora.ops.dispatch import device_of

OF_HOST = (torch.float64, torch.complex128)  # results that stay there


def float64_of_host(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, where the device of a call has float64; else the same on the host. What it writes is copied back, and
    so are results, but for those in float64."""

    def launch(*args: Any) -> Any:
        if device_of(*args) == "cpu":
            return kernel(*args)
        device, pairs = _where(args), list[tuple[Tensor, Tensor]]()
        if has_float64(device):
            return kernel(*args)
        result = kernel(*(_mapped(a, lambda x: _on_host(x, pairs)) for a in args))
        for given, copy in pairs:
            if copy._version:  # it was written
                given.copy_(copy)
        return _mapped(result, lambda x: x if x.dtype in OF_HOST else x.to(device))

    return launch


def _where(args: tuple[Any, ...]) -> torch.device:
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x)
        return x

    for a in args:
        _mapped(a, keep)
    return next((x.device for x in found if x.device.type != "cpu"), torch.device("cpu"))


def _on_host(x: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    if x.device.type == "cpu":
        return x
    for given, copy in pairs:
        if given is x:
            return copy
    pairs.append((x, x.detach().to("cpu")))
    return pairs[-1][1]


def _mapped(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Tensors in records and sequences."""
    if isinstance(x, Tensor):
        return change(x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return dataclasses.replace(x, **{f.name: _mapped(getattr(x, f.name), change) for f in dataclasses.fields(x)})
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_mapped(v, change) for v in x))
    if type(x) in (list, tuple):
        return type(x)(_mapped(v, change) for v in x)
    return x
