"""``fastlora overlap``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli.arguments import parse_all
from fastlora.cli.inputs import load_pool, refuse_weights
from fastlora.cli.options import Adapters, Csv, Html, command
from fastlora.cli.outputs import check_table, write_arrays, write_table
from fastlora.cli.pages import check_page, write_page_of
from fastlora.cli.run import Run, print_json
from fastlora.errors import InputError

NEAREST = 10  # adapters that --like lists


@command("rename", "family", "read_rank", "dora_base", "device", "backend", "as_json", "quiet", "overwrite", "force")
def overlap(
    run: Run,
    adapters: Adapters,
    clusters: Annotated[bool, typer.Option("--clusters", help="List families of adapters that are alike.")] = False,
    into: Annotated[
        int | None,
        typer.Option(help="How many families: by default as many as the cosines suggest.", show_default=False),
    ] = None,
    like: Annotated[
        str | None, typer.Option(help=f"List the {NEAREST} adapters most like this one.", show_default=False)
    ] = None,
    modules: Annotated[bool, typer.Option("--modules", help="Keep the matrices of every module, too.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the two matrices as a picture.", show_default=False)] = None,
    csv: Csv = None,
    npz: Annotated[
        Path | None, typer.Option(help="Write names and matrices to this NumPy file.", show_default=False)
    ] = None,
    html: Html = None,
    every: Annotated[bool, typer.Option("--all", help="Print every adapter of a long pool.")] = False,
) -> None:
    """How similar adapters are: cosine of ΔW and overlap of their column spaces, for every pair; duplicates, outliers,
    and on request families and neighbours."""
    specs = parse_all(adapters)
    refuse_weights(specs)
    check_table(run, csv)
    check_table(run, npz)
    check_page(run, html)
    if modules and not run.as_json and npz is None:
        raise InputError("--modules: the matrices of modules are not printed; add --npz FILE or --json")
    if plot is not None:
        from fastlora.files.pictures import check_picture

        check_picture(plot, run.replace)
    run.start(lean=True)
    from fastlora.analysis.overlap import overlap as compare
    from fastlora.views.results import overlap_arrays, overlap_data, overlap_rows, show_overlap
    from fastlora.views.similar import findings, show_findings

    pool, _ = load_pool(run, specs, run.device)
    if len(pool) < 2:
        raise InputError("overlap: a pool of one adapter has nothing to compare; give two adapters or more")
    similarities = compare(pool, modules=modules)
    found = findings(similarities, clusters=clusters, into=into, like=like, nearest=NEAREST)
    if csv is not None:
        write_table(run, csv, overlap_rows(overlap_data(similarities)))
    if npz is not None:
        write_arrays(run, npz, similarities.arrays())
    if plot is not None:
        from fastlora.analysis.plots import plot_overlap
        from fastlora.files.disk_errors import writing

        with writing(plot):
            plot_overlap(similarities, plot)
    if html is not None:
        write_page_of(run, html, f"{len(pool)} adapters", pool, similarities)
    if run.as_json:
        print_json(overlap_data(similarities) | found)
    elif not run.quiet:
        if not (clusters or into is not None or like):
            show_overlap(overlap_arrays(similarities), every, csv)
        show_findings(found, every)
    run.tell_notes(similarities.notices)
