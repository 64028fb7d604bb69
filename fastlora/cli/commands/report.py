"""``fastlora report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli.arguments import parse_all
from fastlora.cli.inputs import load_pool, refuse_weights
from fastlora.cli.options import Adapters, command
from fastlora.cli.pages import check_page
from fastlora.cli.run import Run, print_json
from fastlora.errors import InputError


@command("rename", "family", "read_rank", "dora_base", "device", "backend", "as_json", "quiet", "overwrite", "force")
def report(
    run: Run,
    adapters: Adapters,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The page to write, *.html; must not exist, or --overwrite."),
    ] = Path("report.html"),
    threshold: Annotated[
        float | None,
        typer.Option(help="τ of what pairs share; default: 0.3, or twice what chance would give.", show_default=False),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.", show_default=False)] = None,
) -> None:
    """Write a page about a pool: similarities, families, outliers, a card for each adapter, what pairs share."""
    specs = parse_all(adapters)
    refuse_weights(specs)
    check_page(run, out, "--out")
    if threshold is not None and not 0 <= threshold < 1:
        raise InputError(f"--threshold {threshold:g}: must be at least 0 and below 1")
    run.start()
    pool, _ = load_pool(run, specs, run.device)
    if len(pool) < 2:
        raise InputError("report: a pool of one adapter has nothing to compare; give two adapters or more")
    from fastlora.pages.report import report as write
    from fastlora.runtime.ranks import from_first

    write(pool, out, threshold=threshold, title=title, overwrite=run.replace)
    size = from_first("the page", lambda: out.stat().st_size)
    if run.as_json:
        data = {"out": str(out), "adapters": len(pool), "modules": len(pool.modules), "bytes": size}
        print_json(data | {"notices": list(pool.told)})
    elif not run.quiet:
        typer.echo(f"{out}: {len(pool)} adapters, {len(pool.modules)} modules, {size / 1e6:.1f} MB")
    run.tell_notes(pool.told)
