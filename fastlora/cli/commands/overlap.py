"""``fastlora overlap``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli.arguments import parse_all
from fastlora.cli.inputs import load_pool, refuse_weights
from fastlora.cli.options import Adapters, Csv, command
from fastlora.cli.outputs import check_table, write_table
from fastlora.cli.run import Run, print_json
from fastlora.errors import InputError


@command("rename", "family", "read_rank", "device", "backend", "as_json", "quiet", "overwrite", "force")
def overlap(
    run: Run,
    adapters: Adapters,
    plot: Annotated[Path | None, typer.Option(help="Write the two matrices as a picture.", show_default=False)] = None,
    csv: Csv = None,
    every: Annotated[bool, typer.Option("--all", help="Print every adapter of a long pool.")] = False,
) -> None:
    """How similar adapters are: cosine of ΔW and overlap of their column spaces, for every pair."""
    specs = parse_all(adapters)
    refuse_weights(specs)
    check_table(run, csv)
    if plot is not None:
        from fastlora.files.pictures import check_picture

        check_picture(plot, run.replace)
    run.start()
    from fastlora.analysis.overlap import overlap as compare
    from fastlora.views.results import overlap_data, overlap_rows, show_overlap

    pool, _ = load_pool(run, specs, run.device)
    if len(pool) < 2:
        raise InputError("overlap: a pool of one adapter has nothing to compare; give two adapters or more")
    similarities = compare(pool)
    data = overlap_data(similarities)
    if csv is not None:
        write_table(run, csv, overlap_rows(data))
    if plot is not None:
        from fastlora.analysis.plots import plot_overlap
        from fastlora.files.disk_errors import writing

        with writing(plot):
            plot_overlap(similarities, plot)
    if run.as_json:
        print_json(data)
    elif not run.quiet:
        show_overlap(data, every, csv)
    run.tell_notes(similarities.notices)
