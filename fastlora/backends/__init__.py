"""Where the ops run. A backend is a table of kernels; each says in a sentence why it cannot take a call."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastlora.errors import InputError

ORDER = ("cuda", "triton", "cpu", "reference")  # fastest first

# Backends whose kernels are not part of this version, with the reason that users see.
ABSENT = {
    "cuda": "this version has no CUDA kernels yet; use the cpu backend",
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One op on one backend. ``supports`` returns ``None`` for yes, else the reason for no."""

    launch: Callable[..., Any]
    supports: Callable[..., str | None]


def always(*_: object, **__: object) -> None:
    """``supports`` of a kernel that takes every call."""
    return None


_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastlora_backend", default=None)


def checked_name(name: str) -> str:
    if name not in (*ORDER, "auto"):
        raise InputError(f"backend {name!r} does not exist: use one of auto, {', '.join(ORDER)}")
    return name


def current_backend() -> str:
    """The forced backend, or ``"auto"``."""
    return _chosen.get() or checked_name(os.environ.get("FASTLORA_BACKEND") or "auto")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend inside the block; ``"auto"`` takes the fastest that supports each call.

    A forced backend never falls back to another: a call that it does not support raises.
    """
    token = _chosen.set(checked_name(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def kernels(backend: str) -> Mapping[str, Kernel] | str:
    """The kernels of a backend, or the reason why there are none."""
    if backend in ABSENT:
        return ABSENT[backend]
    module = importlib.import_module(f"fastlora.backends.{backend}")
    reason: str | None = module.unavailable()
    table: Mapping[str, Kernel] = module.KERNELS
    return table if reason is None else reason


def resolve(op: str, *args: Any) -> Kernel:
    """The kernel that takes this call, or a RuntimeError that lists why no backend does."""
    chosen, reasons = current_backend(), []
    for name in ORDER if chosen == "auto" else (chosen,):
        table = kernels(name)
        if isinstance(table, str):
            reason: str | None = table
        elif op not in table:
            reason = f"has no kernel for {op}"
        else:
            reason = table[op].supports(*args)
            if reason is None:
                return table[op]
        reasons.append(f"  {name}: {reason}")
    raise RuntimeError(f"fastlora.{op}: no usable backend (requested {chosen!r})\n" + "\n".join(reasons))
