"""Text for a terminal: its width, what is safe to print, lines that are broken between words and never inside one."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterable, Sequence

from rich.cells import cell_len

BOLD, YELLOW = "1", "33"
NARROWEST = 40
NOTHING = 1e-11
"""The share of squares of singular values that float32 rounding and their own roundoff can make of all."""


def terminal_width() -> int:
    """The variable COLUMNS, or the columns of the terminal; 80 where the output is none."""
    given, width = os.environ.get("COLUMNS", ""), 0
    if given.isdecimal():
        width = int(given)
    elif sys.stdout.isatty():
        with contextlib.suppress(OSError):
            width = os.get_terminal_size(sys.stdout.fileno()).columns
    return max(NARROWEST, width or 80)


def escaped(text: str) -> str:
    """Names come from files: what is no printable character is shown as its escape sequence."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def share_text(share: float) -> str:
    """A share in percent, which is 100 % where nothing but rounding is lost and never is rounded up to it."""
    if share >= 1.0 - NOTHING:
        return "100.00 %"
    return f"{math.floor(1e4 * share) / 100:.2f} %"


def styled(text: str, style: str) -> str:
    """Bold or coloured text where standard output is a terminal that shows it."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width``, but for words that are longer, such as paths."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def print_lines(lines: Iterable[str]) -> None:
    """Prints lines as they are."""
    for line in lines:
        print(line)


def print_aside(line: str) -> None:
    """Prints a line to standard error. Where nobody can read it, that is no error: the result is what counts."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def print_paragraph(text: str, *, start: str = "", style: str = BOLD) -> None:
    """A paragraph that fits the terminal; what it starts with is set off."""
    lines = wrapped(escaped(start + text), terminal_width())
    head = escaped(start)
    if head and lines[0].startswith(head):  # a long name of several words may not fit into the first line
        lines[0] = styled(head, style) + lines[0].removeprefix(head)
    print_lines(lines)


def shorten(text: str, width: int) -> str:
    """``text`` in at most ``width`` columns: its start and its end, with ``…`` for what is between."""
    if cell_len(text) <= width:
        return text
    tail_width = max(0, width - 1) // 2
    head, tail = text, text
    while head and cell_len(head) > max(0, width - 1 - tail_width):
        head = head[:-1]
    while tail and cell_len(tail) > tail_width:
        tail = tail[1:]
    return f"{head}…{tail}"


def shorten_apart(texts: Sequence[str], width: int) -> list[str]:
    """:func:`shorten` for many; different texts stay different: ``~2`` marks the second of those that would not."""
    taken: dict[str, str] = {}  # what is printed -> what it stands for
    made: dict[str, str] = {}
    for text in texts:
        count, short = 1, shorten(text, width)
        while taken.get(short, text) != text:
            count += 1
            mark = f"~{count}"
            short = shorten(text, width - len(mark)) + mark
        taken[short] = text
        made[text] = short
    return [made[text] for text in texts]
