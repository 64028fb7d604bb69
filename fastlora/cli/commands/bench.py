"""``fastlora bench``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastlora.cli.options import Json, Quiet
from fastlora.cli.run import print_json, print_notices, running
from fastlora.errors import InputError
from fastlora.views.tables import console_of, table_of

if TYPE_CHECKING:
    from fastlora.bench.contest import Row
    from fastlora.bench.timing import Machine


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Cases and workloads (--list); default: every case that takes no hours.", metavar="NAME…"),
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Name the cases and workloads.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the table to this file.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The project's own numbers on this machine, beside plain torch. Takes minutes; close other programs."""
    # Spinning threads would make two of them slower than one on small machines; read before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with running("auto", None, quiet):
        from fastlora.bench.cases import select
        from fastlora.bench.contest import Unavailable, rows
        from fastlora.bench.table import as_dict, as_markdown
        from fastlora.bench.timing import measure_machine, waiting
        from fastlora.cli.commands.bench import show_bench, show_bench_names
        from fastlora.runtime.progress import track

        if listing:
            show_bench_names()
            return
        contests = select(names or ())
        print_notices([w] if (w := waiting()) else [], quiet)
        machine = measure_machine()
        found, skipped = [], []
        for contest in track(contests, "timing"):
            try:
                found += rows(contest, machine)
            except Unavailable as reason:
                skipped.append(f"{contest.what} was left out: {reason}")
        if not found:
            raise InputError("; ".join(skipped))
        if markdown is not None:
            markdown.write_text(as_markdown(machine, found), encoding="utf-8")
        if as_json:
            print_json(as_dict(machine, found))
        elif not quiet:
            show_bench(machine, found)
        print_notices(skipped, quiet)


def show_bench(machine: Machine, rows: list[Row]) -> None:
    from fastlora.bench.table import HEADER, cells, machine_line, notes

    table = table_of(*HEADER)
    for row in rows:
        table.add_row(*cells(row))
    console = console_of()
    console.print(machine_line(machine))
    console.print(table)
    for note in notes(rows):
        console.print(note, markup=False)


def show_bench_names() -> None:
    from fastlora.bench.cases import CASES
    from fastlora.bench.workloads import NAMES

    table = table_of("case", "what is timed", "on", "", title="cases")
    for name, case in CASES.items():
        table.add_row(name, case.summary, ", ".join(case.workloads), "only when named" if case.slow else "")
    console = console_of()
    console.print(table)
    console.print(f"workloads: {', '.join(NAMES)}")
