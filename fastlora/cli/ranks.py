"""A command that torchrun started on several ranks: only rank 0 speaks, and a rank that dies ends all. Imports nothing
heavy, since every command begins here."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fastlora.runtime.launch import launched, launched_rank

if TYPE_CHECKING:
    from fastlora.cli.watch import Watch

PATIENCE = 5.0  # seconds that a rank which ends waits for rank 0 to end first: torchrun stops all when one has ended


def quiet() -> None:
    """Lets ranks other than 0 say nothing."""
    if launched_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


_watch: Watch | None = None


@contextlib.contextmanager
def joined(lost: Callable[[str], None]) -> Iterator[None]:
    """Inside the block, the ranks of torchrun share the work and watch each other; nothing without torchrun."""
    global _watch
    if not launched():
        yield
        return
    from fastlora.cli.watch import Watch, connected
    from fastlora.runtime import ranks

    with ranks.distributed():
        _watch = Watch(connected(), lost)
        try:
            yield
        finally:
            if sys.exc_info()[0] is None:
                ranks.together("the end of the command")
            _watch.end()


def wait_for_first() -> None:
    """A rank that fails ends after rank 0, which has to say why: torchrun stops the others when one has ended."""
    if launched_rank() and _watch is not None:
        _watch.first_is_gone.wait(PATIENCE)
