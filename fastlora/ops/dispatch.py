"""Which backend runs an op, and why not another."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from fastlora.errors import BackendError, InputError
from fastlora.ops.passes import CombineJob, GramJob, WriteProblem

ORDER = (
    "cuda",
    "triton",
    "cpu",
    "torch",
    "reference",
)

# What "auto" takes: for tensors on a device, the first of these backends that supports the call, and plain torch where
# no compiled one does. On a GPU the slow reference is not among them: it runs there when it is forced.
PLAIN = ("torch",)  # on devices that no kernels were compiled for
STREAMING = {
    "cuda": ("triton", "cuda", "torch"),
    "cpu": ("cpu", "torch", "reference"),
}  # passes over tall factors: memory-bound
SOLVING = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch", "reference")}  # small matrices on chip
RULES: dict[str, Mapping[str, tuple[str, ...]]] = {
    "gram": STREAMING,
    "combine": STREAMING,
    "finite": STREAMING,
    "gram_pass": STREAMING,
    "combine_pass": STREAMING,
    "coefficients": SOLVING,
    "eigh": SOLVING,
    "svd": SOLVING,
    "chain": SOLVING,
    "merge_select": STREAMING,
    "merge_count_varied": STREAMING,
    "merge_row_masks": STREAMING,
    "merge_tiles": STREAMING,
    "similarity": STREAMING,
    "add_products": STREAMING,
    "tucker": SOLVING,
    "difference_products": STREAMING,
}

# Ops that a backend need not have, with the op that does the same in more steps.
SHORTCUTS = {"factor_pass": "combine_pass", "gram_factors": "gram_pass"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One op on one backend. ``supports`` returns ``None`` for yes, else the reason for no.

    ``prepare``: takes the arguments of a call (of a chain, its results too) and returns an object whose ``run()``
    starts it as often as wanted, without allocating or waiting; ``None`` where the backend has no such form.
    """

    launch: Callable[..., Any]
    supports: Callable[..., str | None]
    prepare: Callable[..., Any] | None = None


class Launches(Protocol):
    """Work that was prepared: tables and outputs are there, and :meth:`run` starts it on the current stream."""

    def run(self) -> Any:
        """Starts the work on what its tensors hold by now, and returns what the op returns."""


class RenewableLaunches(Launches, Protocol):
    """Prepared work whose jobs may change: ``combine_pass`` of tensors on the CPU has it."""

    def renew(self) -> None:
        """Takes the scales of terms and the places in files anew from the jobs."""


@dataclass(frozen=True, slots=True)
class _Direct:
    """A backend that prepares nothing: it is called anew every time."""

    op: str
    arguments: tuple[Any, ...]

    def run(self) -> Any:
        return run(self.op, *self.arguments)

    def renew(self) -> None:
        """Every run looks at the jobs."""


def always(*_: object, **__: object) -> None:
    """``supports`` of a kernel that takes every call."""
    return None


_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastlora_backend", default=None)


def checked_name(name: str) -> str:
    """The name, if it is that of a backend or ``"auto"``, else :class:`InputError`."""
    if name not in (*ORDER, "auto"):
        raise InputError(f"backend {name!r} does not exist: use one of auto, {', '.join(ORDER)}")
    return name


def current_backend() -> str:
    """The forced backend, or ``"auto"``."""
    chosen = _chosen.get() or os.environ.get("FASTLORA_BACKEND")
    return checked_name(chosen) if chosen else "auto"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend inside a ``with`` block; ``"auto"`` takes the fastest that supports each call.

    Args:
        name: ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpu"``, ``"torch"`` or ``"reference"``; ``fastlora info`` says
            which of them can be used here, and why the others cannot. Outside of blocks the environment's
            ``FASTLORA_BACKEND`` counts.

    Raises:
        InputError: a name that does not exist.
        BackendError: from a call inside the block that the backend does not take, with its reason. A forced backend
            never falls back to another.
    """
    token = _chosen.set(checked_name(name))
    try:
        yield
    finally:
        _chosen.reset(token)


_given: dict[str, Mapping[str, Kernel]] = {}


@contextlib.contextmanager
def use_kernels(backend: str, table: Mapping[str, Kernel]) -> Iterator[None]:
    """Inside the block, in all threads, the kernels of a backend are those of ``table``: kernels that are being
    developed, or of a device that is simulated."""
    before = dict(_given)
    _given[checked_name(backend)] = table
    try:
        yield
    finally:
        _given.clear()
        _given.update(before)


@functools.cache
def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"fastlora.backends.{backend}")


def kernels(backend: str) -> Mapping[str, Kernel] | str:
    """The kernels of a backend, or the reason why there are none."""
    if backend in _given:
        return _given[backend]
    module = _module(backend)
    reason: str | None = module.unavailable()
    table: Mapping[str, Kernel] = module.KERNELS
    return table if reason is None else reason


def candidates(op: str, device: str) -> tuple[str, ...]:
    """The backends that ``"auto"`` tries for tensors on a kind of device, in order; none for tensors without data."""
    return () if device == "meta" else RULES[op].get(device, PLAIN)


def device_of(*args: Any) -> str:
    """The kind of device of the first tensor of a call or of its jobs; ``"cpu"`` where there is none."""
    for arg in args:
        if hasattr(arg, "device"):
            return str(arg.device.type)
        if isinstance(arg, list | tuple):
            for job in arg:
                for tensor in job.factors:
                    return "cpu" if tensor.is_cpu else str(tensor.device.type)
                for output in getattr(job, "outputs", ()):
                    if output.out is not None:
                        return str(output.out.device.type)
    return "cpu"


def resolve(op: str, *args: Any) -> Kernel:
    """The kernel that takes this call, or a :class:`BackendError` that lists why no backend does."""
    chosen, reasons = current_backend(), []
    device = device_of(*args)
    for name in candidates(op, device) if chosen == "auto" else (chosen,):
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
    head = f"fastlora.{op}: no usable backend (requested {chosen!r})"
    raise BackendError("\n".join([head, *reasons, _way_out(op, device, chosen, args)]))


def shortcut(op: str, device: str, argument: Any) -> Any:
    """What one of the :data:`SHORTCUTS` returns, of the backend that takes its longer form on this kind of device;
    ``None`` where it has none."""
    chosen = current_backend()
    for name in candidates(SHORTCUTS[op], device) if chosen == "auto" else (chosen,):
        table = kernels(name)
        if not isinstance(table, str):
            return _launched(SHORTCUTS[op], table[op], argument) if op in table else None
    return None


def _way_out(op: str, device: str, chosen: str, args: Sequence[Any]) -> str:
    takers = [] if chosen == "auto" else [name for name in candidates(op, device) if _takes(name, op, args)]
    if takers:
        both = ", and a whole decomposition on a GPU needs both triton and cuda" if device == "cuda" else ""
        return f"  use_backend('auto') (`--backend auto`) takes {takers[0]} here{both}"
    if device == "cpu":
        return "  `fastlora info` says which backends work here, and why others do not"
    if device == "cuda":
        return (
            "  compute on the CPU (`.to('cpu')`, `--device cpu`), or by the slow formulas where the tensors are: "
            "use_backend('reference')"
        )
    return f"  there are no kernels for tensors on {device}: move them with `.to('cpu')` or `.to('cuda')`"


def _takes(backend: str, op: str, args: Sequence[Any]) -> bool:
    table = kernels(backend)
    return not isinstance(table, str) and op in table and table[op].supports(*args) is None


def run(op: str, *args: Any) -> Any:
    """The result of an op on the backend that takes the call; memory that runs out on a device is told by name."""
    return _launched(op, resolve(op, *args), *args)


def _launched(op: str, kernel: Kernel, *args: Any) -> Any:
    try:
        return kernel.launch(*args)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's: importing torch is left to those who compute
            raise
        from fastlora.runtime.devices import out_of_memory

        raise out_of_memory(f"fastlora.{op}") from None


def prepared(op: str, *args: Any) -> Launches:
    """The op on the backend that takes the call, prepared where that backend can: tables, addresses and workspace are
    made here, once, and every ``run()`` works on what the same tensors hold by then."""
    kernel = resolve(op, *args)
    found: Launches = _Direct(op, args) if kernel.prepare is None else kernel.prepare(*args)
    return found


def run_pass(op: str, jobs: Sequence[GramJob] | Sequence[CombineJob]) -> WriteProblem | None:
    """One pass on the backend that takes it."""
    problem: WriteProblem | None = run(op, jobs) if jobs else None
    return problem
