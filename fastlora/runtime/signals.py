"""Signals that ask a process to end, held back while it is not ready for them."""

from __future__ import annotations

import signal

ENDING = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__]

_before: set[int | signal.Signals] | None = None


def hold() -> None:
    """Has them wait until :func:`release`, in this thread and in those that it starts from now on.

    Threads that run already still take them. Nothing is held where the system cannot, as on Windows."""
    global _before
    if _before is None and hasattr(signal, "pthread_sigmask"):
        _before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def release() -> None:
    """Lets those that came meanwhile act now, and later ones at once; nothing where none are held."""
    global _before
    if _before is not None:
        mask, _before = _before, None
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
