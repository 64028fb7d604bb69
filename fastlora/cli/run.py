"""One run of a command: the options that commands share, and what they switch on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import typer

from fastlora.cli.arguments import parse_renaming
from fastlora.cli.exits import end_all
from fastlora.cli.ranks import joined
from fastlora.errors import InputError
from fastlora.files.earlier import Overwrite
from fastlora.views.text import escaped, print_aside


@dataclass(frozen=True, slots=True)
class Run:
    """The options that commands share; a command has the default of those that it does not take."""

    memory: str | None = None
    dtype: str | None = None
    format: str | None = None
    device: str = "auto"
    backend: str | None = None
    as_json: bool = False
    quiet: bool = False
    overwrite: bool = False
    force: bool = False
    uniform_rank: bool = False
    rename: list[str] | None = None
    family: str | None = None
    read_rank: int | None = None
    dora_base: str | None = None
    push: str | None = None
    push_public: bool = False
    push_dry_run: bool = False
    stack: ExitStack = field(default_factory=ExitStack, repr=False)
    """What is switched on until the command ends."""

    def start(self, lean: bool = False) -> None:
        """Switches on the backend, the bound on memory and progress. It imports torch, which takes a second: a command
        tells wrong arguments before. ``lean``: without what the command never asks for, on a CPU."""
        from fastlora.runtime.cpython import paused_collector
        from fastlora.runtime.lean import lean_torch

        leave_out = lean_torch() if lean and self.on_host and self.backend in (None, "auto", "cpu") else nullcontext()
        with paused_collector(), leave_out:  # a tenth of the import, which makes no garbage; and a quarter
            from fastlora.ops.dispatch import current_backend, use_backend
            from fastlora.runtime import devices, memory
            from fastlora.runtime.progress import show_progress

        self.changes  # noqa: B018  (wrong ones are told before any work)
        self.stack.enter_context(joined(end_all, self.device))
        devices.parse(self.device)
        self.stack.enter_context(use_backend(self.backend or current_backend()))
        self.stack.enter_context(show_progress(not self.quiet))
        bound = memory.parse(self.memory)
        if self.on_host:  # else it is the device's memory that is bounded
            self.stack.enter_context(memory.bounded(bound))

    @property
    def replace(self) -> Overwrite:
        """What may be replaced of what exists."""
        return "force" if self.force else self.overwrite

    @property
    def changes(self) -> dict[str, str]:
        """``{old: new}`` names of modules."""
        return parse_renaming(self.rename or ())

    @property
    def on_host(self) -> bool:
        """Whether tensors stay on the CPU, or where they are."""
        return self.device in ("auto", "cpu")

    def require_backend(self) -> None:
        """Says before any work what the first op would stumble over."""
        from fastlora.backends import cpu
        from fastlora.ops.dispatch import current_backend, kernels

        name = current_backend()
        reason = None if name == "auto" else kernels(name)
        if isinstance(reason, str):
            raise InputError(f"backend {name!r} cannot be used: {reason}")
        if name in ("auto", "cpu"):
            try:
                if cpu.unavailable() is None:
                    cpu.isa()
            except RuntimeError as error:  # FASTLORA_ISA names what does not exist or does not run here
                raise InputError(str(error)) from None

    def tell_notes(self, lines: Iterable[str]) -> None:
        """Notes on standard error, each once."""
        if not self.quiet:
            for line in dict.fromkeys(lines):
                print_aside(f"note: {escaped(line)}")


def print_json(data: object) -> None:
    """Prints plain data as JSON; tensors become lists, and numbers that JSON lacks ``null``."""
    typer.echo(json.dumps(_plain(data), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    """What JSON has: no tensors, no keys but strings, and ``null`` for the numbers that it lacks."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
