"""The interpreter's own work, kept out of the way: its garbage collector, and how its threads take turns."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator

HANDOVER_SECONDS = 2e-4
FROZEN_AT_START = 1000  # Python 3.12 begins with 375 frozen objects of its own; a program that freezes has more

_lock = threading.Lock()
_blocks, _before = 0, 0.0


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """No cyclic garbage collection inside the block: adapters have thousands of live objects, none of them garbage,
    and looking through them again and again would take longer than making them.

    What was made goes to the oldest generation unseen, or the end of the block would be the time to look through it.
    Freezing and unfreezing does that, unless the program keeps frozen objects of its own.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() <= FROZEN_AT_START:
            gc.freeze()
            gc.unfreeze()
        gc.enable()


@contextlib.contextmanager
def quick_handover() -> Iterator[None]:
    """Inside the block, threads that run Python take turns more often: one that only starts the next kernel does not
    wait for milliseconds while another prepares or reports. The last block to end sets back what the first found."""
    global _blocks, _before
    with _lock:
        if not _blocks:
            _before = sys.getswitchinterval()
            sys.setswitchinterval(min(_before, HANDOVER_SECONDS))
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                sys.setswitchinterval(_before)
