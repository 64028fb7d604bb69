"""Pages about pools: ``fastlora report``, and ``--html`` of other commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastlora.cli.outputs import check_table
from fastlora.cli.run import Run
from fastlora.errors import InputError

if TYPE_CHECKING:
    from fastlora.adapters.lora import Adapter
    from fastlora.adapters.pool import Pool
    from fastlora.analysis.similar import Overlap
    from fastlora.decomposition.report import Report

SUFFIXES = (".html", ".htm")


def check_page(run: Run, path: Path | None, option: str = "--html") -> None:
    """Refuses, before any work, a page that could not be made or written."""
    if path is None:
        return
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{option} {path}: a page is a file *.html")
    check_table(run, path)
    from fastlora.pages.rendering import require_jinja

    require_jinja()


def write_page_of(
    run: Run, path: Path, title: str, pool: Pool, similarities: Overlap | None, reports: Sequence[Report] = ()
) -> None:
    """The page of a pool and what decompositions of it found; ``similarities``: its own, if they are known."""
    from fastlora.analysis.overlap import overlap
    from fastlora.pages.page import Content
    from fastlora.pages.report import write_page

    content = Content(title, pool, overlap(pool) if similarities is None else similarities, reports)
    write_page(content, path, run.replace)


def write_result_page(
    run: Run, path: Path, pool: Pool, result: Adapter, kept: Mapping[str, float | None] | None = None
) -> None:
    """The page of a pool beside an adapter that was made of it, and how; ``kept``: the energy of each in the result."""
    from dataclasses import replace

    from fastlora.adapters.pool import Pool as MadePool
    from fastlora.analysis.overlap import overlap
    from fastlora.core.card import figures_of, recipe_yaml
    from fastlora.pages.page import Content
    from fastlora.pages.report import write_page

    name, number = "result", 1
    while name.casefold() in {n.casefold() for n in pool.names}:
        number += 1
        name = f"result-{number}"
    whole = MadePool([*pool.adapters, replace(result, name=name)], align=False)
    figures = figures_of(result.provenance)
    figures |= {f"energy kept of {n}": f"{100 * x:.2f} %" for n, x in (kept or {}).items() if x is not None}
    told = [*figures.items(), ("recipe of the result", recipe_yaml(result.provenance))]
    content = Content(
        f"{result.name} of {len(pool)} adapters", whole, overlap(whole), result=name, told=told, notices=pool.notices
    )
    write_page(content, path, run.replace)
