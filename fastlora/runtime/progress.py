"""Progress bars for long work: silent unless switched on, and then only after a second."""

from __future__ import annotations

import contextlib
import contextvars
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

DELAY_SECONDS = 1.0

_bars: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("fastlora_progress", default=None)


@contextlib.contextmanager
def show_progress(on: bool = True) -> Iterator[None]:
    """Shows a bar for everything inside the block that takes more than a second, where stderr is a terminal.

    No bar outlives the block, also when it raises: what is printed next stands on a line of its own.
    """
    bars: list[Any] = []
    token = _bars.set(bars if on else None)
    try:
        yield
    finally:
        _bars.reset(token)
        for bar in bars:
            bar.stop()


def is_shown() -> bool:
    """Whether bars are switched on."""
    return _bars.get() is not None


def track(items: Sequence[T], label: str) -> Iterator[T]:
    """Iterates over ``items``; a bar appears once the loop has run for a second."""
    bars = _bars.get()
    if bars is None or not sys.stderr.isatty():
        yield from items
        return
    bar, task = None, None
    started = time.monotonic()
    try:
        for done, item in enumerate(items):
            if bar is None and time.monotonic() - started > DELAY_SECONDS:
                bar = _start_bar()
                bars.append(bar)
                task = bar.add_task(label, total=len(items))
            if bar is not None:
                bar.update(task, completed=done)
            yield item
    finally:
        if bar is not None:
            bar.stop()


@contextlib.contextmanager
def bytes_bar(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` bytes with their rate and the time left; the block calls what it gets with bytes done."""
    bars = _bars.get()
    if bars is None or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
    bar.start()
    bars.append(bar)
    task = bar.add_task(label, total=total)
    try:
        yield lambda done: bar.advance(task, done)
    finally:
        bar.stop()


@contextlib.contextmanager
def share_bar(label: str) -> Iterator[Callable[[float], None]]:
    """A bar over work that others do; the block calls what it gets with the share of it that is done."""
    bars = _bars.get()
    if bars is None or not sys.stderr.isatty():
        yield lambda share: None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(file=sys.stderr), transient=True)
    bar.start()
    bars.append(bar)
    task = bar.add_task(label, total=1.0)
    try:
        yield lambda share: bar.update(task, completed=share)
    finally:
        bar.stop()


def _start_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
    bar.start()
    return bar
