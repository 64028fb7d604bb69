"""Progress bars for long work: silent unless switched on, and then only after a second."""

from __future__ import annotations

import contextlib
import contextvars
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

DELAY_SECONDS = 1.0

_shown: contextvars.ContextVar[bool] = contextvars.ContextVar("fastlora_progress", default=False)


@contextlib.contextmanager
def show_progress(on: bool = True) -> Iterator[None]:
    """Shows a bar on stderr for everything inside the block that takes more than a second."""
    token = _shown.set(on)
    try:
        yield
    finally:
        _shown.reset(token)


def track(items: Sequence[T], label: str) -> Iterator[T]:
    """Iterates over ``items``; a bar appears once the loop has run for a second."""
    if not _shown.get():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
    started, task = time.monotonic(), None
    try:
        for done, item in enumerate(items):
            if task is None and time.monotonic() - started > DELAY_SECONDS:
                bar.start()
                task = bar.add_task(label, total=len(items))
            if task is not None:
                bar.update(task, completed=done)
            yield item
    finally:
        if task is not None:
            bar.stop()
