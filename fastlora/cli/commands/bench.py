"""``fastlora bench``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli.options import Csv, command
from fastlora.cli.outputs import check_table, write_table
from fastlora.cli.run import Run, print_json
from fastlora.errors import InputError
from fastlora.views.text import escaped, print_aside


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
    base: Annotated[
        str | None,
        typer.Option(help="Instead: this checkout beside another revision of it, alternated.", metavar="REV"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="With --base: runs of each.", min=1)] = 3,
    tests: Annotated[
        list[str] | None,
        typer.Option(help="With --base: what must pass in both first; default: tests/ops.", metavar="PATH"),
    ] = None,
) -> None:
    """The project's own numbers on this machine, beside plain torch. Takes minutes; close other programs."""
    # Spinning threads would make two of them slower than one on small machines; read before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    check_table(run, csv)
    check_table(run, markdown)
    run.start()
    if base is not None:
        if markdown is not None or listing:
            raise InputError(f"--base prints ratios alone; leave out {'--list' if listing else '--markdown'}")
        _against(run, base, names or (), rounds, tests, csv)
        return
    from fastlora.bench.cases import names_data, select
    from fastlora.bench.contest import Unavailable, rows
    from fastlora.bench.table import as_dict, as_markdown
    from fastlora.bench.timing import measure_machine, waiting
    from fastlora.files.disk_errors import writing
    from fastlora.files.output import replacing
    from fastlora.runtime.progress import track
    from fastlora.views.benchmarks import bench_rows, show_bench, show_bench_names

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


def _against(
    run: Run, revision: str, names: Sequence[str], rounds: int, tests: Sequence[str] | None, csv: Path | None
) -> None:
    """Times this checkout beside another revision."""
    import fastlora
    from fastlora.bench import revisions, worktrees
    from fastlora.bench.cases import select
    from fastlora.bench.timing import describe, waiting
    from fastlora.views.benchmarks import comparison_rows, show_comparison

    select(names)
    root = worktrees.checkout(Path(str(fastlora.__file__)))
    chosen = revisions.tests_of(root, tests or revisions.TESTS)
    run.tell_notes([w] if (w := waiting()) else [])

    def tell(line: str) -> None:
        if not run.quiet:
            print_aside(escaped(line))

    found = revisions.compare(root, revision, names, rounds, chosen, tell)
    if not found.lines:
        raise InputError("; ".join(found.notes) or "nothing was timed")
    data = {"machine": describe(), "rounds": rounds, "tests": chosen, **asdict(found)}
    data["rows"], data["notices"] = data.pop("lines"), data.pop("notes")
    if csv is not None:
        write_table(run, csv, comparison_rows(data))
    if run.as_json:
        print_json(data)
    elif not run.quiet:
        show_comparison(data)
    run.tell_notes(found.notes)
