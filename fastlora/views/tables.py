"""Tables for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROWS = 20  # modules printed unless all are asked for
WIDTH = 140  # columns where the output is no terminal


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # the command line knows what to do; rich would exit with 1


def console_of() -> Console:
    # Names come from files and may look like markup.
    width = None if sys.stdout.isatty() else WIDTH
    return _Console(soft_wrap=True, width=width, markup=False, emoji=False, highlight=False)


def table_of(*columns: str, title: str | None = None) -> Table:
    """A table whose first column is never broken."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i == 0, overflow="fold")
    return table


def without_common(modules: Sequence[str]) -> dict[str, str]:
    """Module paths without the leading parts that all have in common, for narrow columns."""
    parts = [m.split(".") for m in modules]
    common = 0
    while len(parts) > 1 and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return {m: ".".join(p[common:]) for m, p in zip(modules, parts, strict=True)}


def show_extras(console: Console, data: dict[str, Any]) -> None:
    """What an adapter holds beside its updates, and its notes."""
    for name, extra in data["extras"].items():
        what = "added to the base model's" if extra["kind"] == "delta" else "replaces the base model's"
        console.print(f"also holds {name} {extra['shape']} ({what})")
    for note in data["notes"]:
        console.print(f"note: {note}")
