"""How a command ends: exit codes, signals, one message for whatever went wrong."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from fastlora.cli.ranks import leave, remove_unfinished
from fastlora.errors import FastloraError
from fastlora.runtime import signals
from fastlora.runtime.launch import LAUNCHED, launched_rank
from fastlora.views.text import escaped, print_aside

if TYPE_CHECKING:
    from fastlora.files.output import OutputDirectory


# Newer typer has a copy of click inside, older typer uses click: this is the class in both.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

UNPRINTABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EAGAIN, errno.ECONNRESET)


class _Stopped(BaseException):
    """A signal asked to stop; no ``except Exception`` on the way takes this for an error."""


GRACE = 1.0
"""Seconds in which a rank that is gone is noticed."""

_saying = threading.Lock()

outputs: list[OutputDirectory] = []
"""What the command writes; nothing of it is left when a signal stops the command."""

_signals: list[tuple[int, float]] = []
"""What was received, and when."""

_listening = False
"""Whether a signal still stops the command: not once its exit code is known."""


def _stop(number: int, _: object) -> None:
    # Senders like timeout(1) signal twice, and cleaning up takes less than a second. One later than that is
    # heard again: compiled code can lose an exception that is raised inside it.
    now = time.monotonic()
    if _listening and (not _signals or now - _signals[-1][1] > 1.0):
        _signals.append((number, now))
        raise _Stopped


def open_streams() -> None:
    """Puts nothing in the place of standard streams that are closed (``>&-``). Python has ``None`` there, and the first
    file that is opened would get their number: what somebody prints would land in a result."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


def listen() -> None:
    """Makes the signals that ask a process to end stop the command, which then cleans up."""
    global _listening
    _listening = True
    for number in signals.ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)


def end_all(lost: int) -> None:
    """Ends this process, where the rank ``lost`` of the run is gone: nothing it waits for would come. What is
    unfinished is removed, and one of the ranks that are left says why."""
    with _saying:
        remove_unfinished()
        for output in outputs:
            output.discard(whole=True)
        if launched_rank() == (1 if lost == 0 else 0):
            why = "killed, out of memory, or its machine is gone"
            _say(f"error: rank {lost} ended without a word ({why}); {_what_is_left()}")
        if not launched_rank():
            leave(failed=True)
        os._exit(2)


def guarded(run: Callable[[], object]) -> int:
    """Runs a command; its exit code. Errors that are no user's are raised."""
    global _listening
    try:
        signals.release()
        code = run()
        sys.stdout.flush()
        leave(failed=False)
        _listening = False
        return code if isinstance(code, int) else 0
    except BaseException as error:
        if LAUNCHED in os.environ:
            _settle(error)
        try:
            with _saying:
                return _told(error)
        finally:
            leave(failed=True)


def _told(error: BaseException) -> int:
    """Says what went wrong; the exit code. Raises an error that is no user's again."""
    global _listening
    _listening = bool(_signals)  # cleaning up may be stopped again, telling of an error may not
    if _signals:  # also where compiled code made another error of it
        for output in outputs:
            output.discard()
        _listening = False
        _complain(f"interrupted: {_what_is_left()}")
        return 128 + _signals[0][0]
    # typer makes SystemExit(1) of a broken pipe.
    cause = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(cause, BrokenPipeError):
        _leave_stdout()  # the reader went away: not an error of ours, and nothing more to say
        return 0
    message = _message(error)
    if message is None:
        sys.stderr = sys.__stderr__  # of a rank that is quiet otherwise
        raise error
    _complain(f"error: {message}")
    return 2


def _what_is_left() -> str:
    written = [str(output.path) for output in outputs if output.written]
    again = [output.again for output in outputs] or ["run the same command again"]
    return f"no output is left half-written; {f'{written[0]} is complete' if written else again[0]}"


def _settle(error: BaseException) -> None:
    """Where torchrun started this: a signal, or a connection that broke, may come of another rank that is gone. Then
    that is what is told, by :func:`end_all` in another thread, which ends the process. torchrun's own signals do not
    come in between."""
    global _listening
    _listening = False
    if _signals or type(error).__name__ == "RankError":
        time.sleep(GRACE)


def _message(error: BaseException) -> str | None:
    """What to tell about an error that is none of the program; ``None`` for those that are."""
    if isinstance(error, FastloraError):
        return str(error)
    if isinstance(error, UsageError):
        return _usage(error)
    if isinstance(error, MemoryError):
        return "out of memory; close other programs or use fewer adapters at once"
    if isinstance(error, OSError) and error.errno in UNPRINTABLE:
        _leave_stdout()
        return f"the result could not be printed: {error.strerror}"
    return None


def _usage(error: Any) -> str:
    message = str(error.format_message()).rstrip(".")
    return message if error.ctx is None else f"{message}; see `{error.ctx.command_path} --help`"


def _complain(text: str) -> None:
    print_aside("\n".join(map(escaped, text.split("\n"))))


def _say(text: str) -> None:
    """As :func:`_complain`, also of a rank that is quiet otherwise."""
    print(escaped(text), file=sys.__stderr__, flush=True)


def _leave_stdout() -> None:
    """Python writes what is left in the buffer when it ends: into nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
