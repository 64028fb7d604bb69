"""One public op: a torch operator on the outside, a table of backends on the inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora.ops import dispatch

_library: Any = torch.library.Library("fastlora", "DEF")  # type: ignore[no-untyped-call]


class Op:
    """Registers ``torch.ops.fastlora.<name>`` and runs it on the backend that :func:`fastlora.ops.dispatch.resolve`
    names.

    ``check`` looks at shapes and dtypes and raises what the caller sees; it runs first in every call, so eager and
    compiled calls refuse the same things. ``empty`` returns empty results of the right shape. In eager mode a call
    skips torch's dispatcher, which would cost several microseconds.
    """

    def __init__(self, schema: str, check: Callable[..., None], empty: Callable[..., Any]) -> None:
        self.name = schema.split("(")[0]
        # "Tensor a, int b" → ("a", "b")
        self.arguments = tuple(part.split()[-1] for part in schema.split("(")[1].split(")")[0].split(","))
        self.check = check

        def fake(*args: Any) -> Any:
            check(*args)
            return empty(*args)

        _library.define(schema)
        torch.library.register_fake(f"fastlora::{self.name}", fake, lib=_library)
        for key in ("CPU", "CUDA"):
            _library.impl(self.name, self.run, key)
        self.node: Callable[..., Any] = getattr(torch.ops.fastlora, self.name).default

    def __call__(self, *args: Any) -> Any:
        return self.node(*args) if torch.compiler.is_compiling() else self.run(*args)

    def run(self, *args: Any) -> Any:
        """Checks the arguments and runs the op, past torch's dispatcher; refuses tensors that need a gradient."""
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(
                f"fastlora.{self.name} has no gradient: call it under torch.no_grad() or detach its inputs"
            )
        self.check(*args)
        self._require_one_device(args)
        return dispatch.run(self.name, *args)

    def _require_one_device(self, args: tuple[Any, ...]) -> None:
        name_by_device = {a.device: name for name, a in zip(self.arguments, args, strict=True) if isinstance(a, Tensor)}
        if len(name_by_device) > 1:
            where = ", ".join(f"`{name}` on {device}" for device, name in name_by_device.items())
            raise ValueError(f"{self.name}: tensors on different devices ({where}); move them to one with `.to(…)`")


def require_floating(op: str, argument: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raises :class:`TypeError` for an argument whose dtype is not allowed."""
    if tensor.dtype not in allowed:
        names = "/".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: `{argument}` must be {names}, got {tensor.dtype}; cast it first")


def require_dims(op: str, argument: str, tensor: Tensor, shape: str, least: int) -> None:
    """Raises :class:`ValueError` for an argument of fewer than ``least`` dimensions; ``shape`` is what it should be."""
    if tensor.dim() < least:
        raise ValueError(f"{op}: `{argument}` must be {shape}, got shape {tuple(tensor.shape)}")
