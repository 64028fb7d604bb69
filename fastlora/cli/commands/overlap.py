"""``fastlora overlap``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli.options import Adapters, Backend, Device, Json, Overwrite, Quiet
from fastlora.cli.run import load_pool, print_json, print_notices, running
from fastlora.errors import InputError


def overlap(
    adapters: Adapters,
    plot: Annotated[Path | None, typer.Option(help="Write the two matrices as a picture.", show_default=False)] = None,
    device: Device = "auto",
    backend: Backend = None,
    as_json: Json = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """How similar adapters are: cosine of ΔW and overlap of their column spaces, for every pair."""
    with running(device, backend, quiet):
        if plot is not None:
            from fastlora.files.pictures import check_picture

            check_picture(plot, overwrite)
        pool, _ = load_pool(adapters, weighted=False, device=device)
        from fastlora.analysis.overlap import overlap as run

        if len(pool) < 2:
            raise InputError("overlap: a pool of one adapter has nothing to compare; give two adapters or more")
        found = run(pool)
        if plot is not None:
            from fastlora.analysis.plots import plot_overlap
            from fastlora.files.output import writing

            with writing(plot):
                plot_overlap(found, plot)
        if as_json:
            modules = {m: {"cosine": c, "subspace": s} for m, (c, s) in found.modules.items()}
            print_json({"names": found.names, "cosine": found.cosine, "subspace": found.subspace, "modules": modules})
        elif not quiet:
            from fastlora.views.results import show_overlap

            show_overlap(found)
        print_notices(pool.notices, quiet)
