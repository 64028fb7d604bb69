"""The interpreter's own work, kept out of the way: its garbage collector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

FROZEN_AT_START = 1000  # Python 3.12 begins with 375 frozen objects of its own; a program that freezes has more


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
