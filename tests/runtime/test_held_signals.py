"""Signals wait while they are held, and act when they are released."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import pytest

from fastlora.runtime import signals


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="the system cannot hold signals back")
def test_signals_wait() -> None:
    heard: list[int] = []
    me = threading.get_ident()  # other threads of the test process hold nothing, and would take a signal sent to it

    def hear(number: int, _: FrameType | None) -> None:
        heard.append(number)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    handler = signal.signal(signal.SIGTERM, hear)
    try:
        signals.hold()
        signals.hold()  # the first one counts
        signal.pthread_kill(me, signal.SIGTERM)
        waited = not heard
        signals.release()
        assert waited and heard == [signal.SIGTERM]
        signal.pthread_kill(me, signal.SIGTERM)
        assert heard == [signal.SIGTERM] * 2
        signals.release()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    finally:
        signal.signal(signal.SIGTERM, handler)
