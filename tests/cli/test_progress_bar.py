"""The progress bar: when it is drawn, and that nothing of it outlives its loop."""

from __future__ import annotations

import io
import threading
import time

import pytest

from fastlora.runtime import progress

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that loops are measured by, and a terminal that can draw, whatever the tests run in."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def watched(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, clock: list[float], step: float, on: bool) -> str:
    """What a loop of four steps prints to ``stream``."""
    monkeypatch.setattr("sys.stderr", stream)
    with progress.show_progress(on):
        for _ in progress.track(range(4), "loading"):
            clock[0] += step
    return stream.getvalue()


@pytest.mark.parametrize(("step", "shown"), [(0.33, False), (0.34, True)])
def test_progress_waits_a_second(step: float, shown: bool, monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    """The last step begins after three."""
    assert ("loading" in watched(monkeypatch, Terminal(), clock, step, True)) == shown


@pytest.mark.parametrize(("terminal", "on"), [(True, False), (False, True)])
def test_progress_is_for_a_terminal_that_is_not_quiet(
    terminal: bool, on: bool, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    assert watched(monkeypatch, Terminal() if terminal else io.StringIO(), clock, 5.0, on) == ""


def test_no_bar_outlives_an_error(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    """Rich erases a bar that ends, and with it what was printed below it in the meantime."""
    # By identity: a thread of an earlier test may end meanwhile.
    stream, threads = Terminal(), set(threading.enumerate())
    monkeypatch.setattr("sys.stderr", stream)
    with pytest.raises(ValueError, match="stop"), progress.show_progress():
        loop = progress.track(range(3), "loading")  # held here, so that only the block can end the bar
        for i in loop:
            clock[0] += 2.0
            if i == 2:
                assert "loading" in stream.getvalue() and set(threading.enumerate()) - threads
                raise ValueError("stop")
    shown = stream.getvalue()
    assert shown.rfind(SHOW_CURSOR) > shown.rfind(HIDE_CURSOR) >= 0, "the bar has given the terminal back"
    for _ in range(60_000):  # the thread that draws may take a moment to see that it is to end
        if not set(threading.enumerate()) - threads:
            break
        time.sleep(0.01)
    assert not set(threading.enumerate()) - threads, "nothing draws the bar any more"
    assert stream.getvalue() == shown
    del loop
    assert stream.getvalue() == shown
