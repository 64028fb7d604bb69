"""Python's garbage collector, paused while many small objects are made that hold no cycles."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


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
        if gc.get_freeze_count() == 0:
            gc.freeze()
            gc.unfreeze()
        gc.enable()
