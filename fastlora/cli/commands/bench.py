"""``fastlora bench``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli.options import Csv, command
from fastlora.cli.outputs import check_table, write_table
from fastlora.cli.run import Run, print_json
from fastlora.errors import InputError
from fastlora.views.benchmarks import bench_rows, show_bench, show_bench_names


@command("as_json", "quiet", "overwrite", "force")
def bench(
    run: Run,
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Cases and workloads (--list); default: every case that takes no hours.", metavar="NAME…"),
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Name the cases and workloads.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the table to this file.", show_default=False)
    ] = None,
    csv: Csv = None,
) -> None:
    """The project's own numbers on this machine, beside plain torch. Takes minutes; close other programs."""
    # Spinning threads would make two of them slower than one on small machines; read before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    check_table(run, csv)
    check_table(run, markdown)
    run.start()
    from fastlora.bench.cases import names_data, select
    from fastlora.bench.contest import Unavailable, rows
    from fastlora.bench.table import as_dict, as_markdown
    from fastlora.bench.timing import measure_machine, waiting
    from fastlora.files.disk_errors import writing
    from fastlora.files.output import replacing
    from fastlora.runtime.progress import track

    if listing:
        show = print_json if run.as_json else show_bench_names
        show(names_data())
        return
    contests = select(names or ())
    run.tell_notes([w] if (w := waiting()) else [])
    machine = measure_machine()
    result_rows, skipped = [], []
    for contest in track(contests, "timing"):
        try:
            result_rows += rows(contest, machine)
        except Unavailable as reason:
            skipped.append(f"{contest.what} was left out: {reason}")
    if not result_rows:
        raise InputError("; ".join(skipped))
    if markdown is not None:
        with replacing(markdown, overwrite=run.replace) as staging, writing(markdown):
            staging.write_text(as_markdown(machine, result_rows), encoding="utf-8")
    data = as_dict(machine, result_rows)
    if csv is not None:
        write_table(run, csv, bench_rows(data))
    if run.as_json:
        print_json(data)
    elif not run.quiet:
        show_bench(data)
    run.tell_notes(skipped)
