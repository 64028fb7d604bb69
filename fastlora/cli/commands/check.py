"""``fastlora check``."""

from __future__ import annotations

from typing import Annotated

import typer

from fastlora.cli.options import Csv, Every, command
from fastlora.cli.outputs import check_table, write_table
from fastlora.cli.run import Run, print_json


@command("family", "as_json", "quiet", "overwrite", "force")
def check(
    run: Run,
    file: Annotated[
        str, typer.Argument(help="A single file of an adapter, or org/name/FILE of the Hub.", metavar="FILE")
    ],
    readers: Annotated[
        str | None,
        typer.Option(
            "--for", help="Of diffusers, comfy, a1111, sd-scripts; default: all but the last.", show_default=False
        ),
    ] = None,
    every: Every = False,
    csv: Csv = None,
) -> None:
    """What programs make of a single file: modules that they lose or scale wrongly. Ends with 1 if there are any."""
    check_table(run, csv)
    run.start()
    from fastlora.dialects.check import check as check_file
    from fastlora.views.checks import check_data, check_rows, show_check

    names = None if readers is None else [name.strip() for name in readers.split(",")]
    data = check_data(check_file(file, names, family=run.family))
    if csv is not None:
        write_table(run, csv, check_rows(data))
    if run.as_json:
        print_json(data)
    elif not run.quiet:
        show_check(data, every)
    if not data["clean"]:
        raise typer.Exit(1)
