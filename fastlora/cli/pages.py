"""Pages about pools: ``fastlora report``, and ``--html`` of other commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastlora.cli.outputs import check_table
from fastlora.cli.run import Run
from fastlora.errors import InputError

if TYPE_CHECKING:
    from fastlora.adapters.lora import Adapter
    from fastlora.adapters.pool import Pool

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


def write_result_page(run: Run, path: Path, pool: Pool, result: Adapter, told: Sequence[tuple[str, str]]) -> None:
    """The page of a pool beside an adapter that was made of it, and ``told``: how, in words."""
    from dataclasses import replace

    from fastlora.adapters.pool import Pool as MadePool
    from fastlora.analysis.overlap import overlap
    from fastlora.pages.page import Content
    from fastlora.pages.report import write_page

    name, number = "result", 1
    while name.casefold() in {n.casefold() for n in pool.names}:
        number += 1
        name = f"result-{number}"
    whole = MadePool([*pool.adapters, replace(result, name=name)], align=False)
    notices = [*pool.notices, *result.notes]
    content = Content(f"{result.name} of {len(pool)} adapters", whole, overlap(whole), (), name, told, notices)
    write_page(content, path, run.replace)
