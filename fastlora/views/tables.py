"""Tables that fit a terminal: names are shortened in the middle, words are never broken, and columns without room
continue in a second table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len

from fastlora.views.text import escaped, print_lines, print_paragraph, shorten_apart, terminal_width, wrapped

Data = dict[str, Any]
"""Plain data, as ``--json`` prints it."""

ROWS = 20  # modules or adapters printed unless all are asked for
GAP = 2  # spaces between columns
LEAST_NAME = 24  # columns that a shortened name has at the least
EASY_NAME, EASY_HEADING, EASY_TEXT = 32, 16, 24
LONGEST_WORD = 40  # of a text: a longer one, such as a path, sticks out
LEAST_HEADING = 10  # the same for a name that is a heading

SHRINKING = ("number", "named", "text", "name")
"""Kinds of columns, the first to give up room first: headings are broken into lines before names are shortened."""


@dataclass(slots=True)
class Column:
    """``kind``: ``"name"``: cells are shortened in the middle. ``"text"``: cells are broken between words.
    ``"number"``: cells stay as they are. ``"named"``: numbers below a name, which is shortened."""

    heading: str
    kind: str
    cells: list[str] = field(default_factory=list)

    @property
    def natural(self) -> int:
        """The width at which nothing is broken or shortened."""
        return max(cell_len(text) for text in (self.heading, *self.cells))

    @property
    def least(self) -> int:
        """The smallest width at which no word is broken and names can be told apart."""
        longest = max((cell_len(cell) for cell in self.cells), default=0)
        if self.kind == "named":
            return max(longest, min(cell_len(self.heading), LEAST_HEADING))
        heading = max(map(cell_len, self.heading.split(" ")))
        if self.kind == "number":
            return max(heading, longest)
        if self.kind == "name":
            return max(heading, min(longest, LEAST_NAME))
        return max([heading, *(min(LONGEST_WORD, cell_len(word)) for cell in self.cells for word in cell.split(" "))])

    @property
    def comfortable(self) -> int:
        """A width at which it is read with ease."""
        most = {"number": self.least, "named": EASY_HEADING, "name": EASY_NAME, "text": EASY_TEXT}[self.kind]
        return max(self.least, min(self.natural, most))


class Table:
    """A table of columns that are given as ``kind:heading``; see :class:`Column` for the kinds.

    The first ``keys`` columns name the rows: each table has them, where there has to be more than one.
    """

    def __init__(self, *columns: str, title: str = "", keys: int = 1) -> None:
        self.title = title
        self.keys = keys
        self.columns: list[Column] = []
        for column in columns:
            kind, _, heading = column.partition(":")
            self.columns.append(Column(escaped(heading), kind))

    def add(self, *cells: object) -> None:
        """Adds a row."""
        for column, cell in zip(self.columns, cells, strict=True):
            column.cells.append(escaped(str(cell)))

    def lines(self, width: int) -> list[str]:
        """The table, or the tables that it takes, in lines of at most ``width`` columns."""
        lines: list[str] = []
        for part in _parts(self.columns, self.keys, width):
            lines += [""] if lines else []
            lines += _drawn(part, _widths(part, width))
        return [self.title, *lines] if self.title else lines

    def print(self) -> None:
        """Prints the table between empty lines; one without headings is no more than aligned lines."""
        lines = self.lines(terminal_width())
        print_lines(["", *lines, ""] if any(column.heading for column in self.columns) else lines)


def _taken(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _parts(columns: list[Column], count: int, width: int) -> list[list[Column]]:
    """The columns of each table, the first ``count`` in all of them. Where one table does not do, none is crowded."""
    if _taken([column.least for column in columns]) <= width:
        return [columns]
    keys = columns[:count]
    taken_by_keys = _taken([column.comfortable for column in keys])
    parts, taken = [list(keys)], taken_by_keys
    for column in columns[count:]:
        if len(parts[-1]) > count and taken + GAP + column.comfortable > width:
            parts.append(list(keys))
            taken = taken_by_keys
        parts[-1].append(column)
        taken += GAP + column.comfortable
    return parts


def _widths(columns: list[Column], width: int) -> list[int]:
    """Natural widths, less what is too much, taken from the widest columns of the most patient kind."""
    widths, least = [column.natural for column in columns], [column.least for column in columns]
    for kind in SHRINKING:
        while _taken(widths) > width:
            slack = [i for i, c in enumerate(columns) if c.kind == kind and widths[i] > least[i]]
            if not slack:
                break
            widest = max(slack, key=lambda i: widths[i])
            widths[widest] -= 1
    if _taken(widths) > width:  # one column and the names do not fit: the names give way further
        widths[0] = max(4, widths[0] - (_taken(widths) - width))
    return widths


def _drawn(columns: list[Column], widths: list[int]) -> list[str]:
    headings = _headings(columns, widths)
    cells = [_cells(column, width) for column, width in zip(columns, widths, strict=True)]
    lines = []
    if any(column.heading for column in columns):
        lines = [*_row(columns, widths, headings, bottom=True), "─" * _taken(widths)]
    for row in zip(*cells, strict=True):
        lines += _row(columns, widths, list(row))
    return lines


def _headings(columns: list[Column], widths: list[int]) -> list[list[str]]:
    """Headings in lines; those that are names are shortened, but stay apart."""
    named = [i for i, c in enumerate(columns) if c.kind == "named"]
    short: dict[int, str] = {}
    for width in {widths[i] for i in named}:
        alike = [i for i in named if widths[i] == width]
        short |= dict(zip(alike, shorten_apart([columns[i].heading for i in alike], width), strict=True))
    return [[short[i]] if i in short else wrapped(c.heading, widths[i]) for i, c in enumerate(columns)]


def _cells(column: Column, width: int) -> list[list[str]]:
    """The lines of every cell."""
    if column.kind == "text":
        return [wrapped(cell, width) for cell in column.cells]
    return [[cell] for cell in (shorten_apart(column.cells, width) if column.kind == "name" else column.cells)]


def _row(columns: list[Column], widths: list[int], cells: list[list[str]], bottom: bool = False) -> list[str]:
    """The lines of a row; numbers stand to the right."""
    height = max(map(len, cells))
    lines = []
    for y in range(height):
        parts = []
        for column, width, cell in zip(columns, widths, cells, strict=True):
            at = y - (height - len(cell)) if bottom else y
            text = cell[at] if 0 <= at < len(cell) else ""
            space = " " * max(0, width - cell_len(text))
            parts.append(space + text if column.kind in ("number", "named") else text + space)
        lines.append((" " * GAP).join(parts).rstrip())
    return lines


def without_common(modules: Sequence[str]) -> dict[str, str]:
    """Module paths without the leading parts that all have in common, for narrow columns."""
    parts = [m.split(".") for m in modules]
    common = 0
    while len(parts) > 1 and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return {m: ".".join(p[common:]) for m, p in zip(modules, parts, strict=True)}


def print_extras(data: dict[str, Any]) -> None:
    """What an adapter holds beside its updates, and its notes."""
    for name, extra in data["extras"].items():
        what = "added to the base model's" if extra["kind"] == "delta" else "replaces the base model's"
        print_paragraph(f"also holds {name} {extra['shape']} ({what})")
    for note in data["notes"]:
        print_paragraph(f"note: {note}")
