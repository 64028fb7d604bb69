"""``--push org/name``: results on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fastlora.errors import InputError
from fastlora.views.text import escaped, print_aside

if TYPE_CHECKING:
    from fastlora.cli.run import Run


def check_push(run: Run) -> None:
    """Refuses, before any work, what could not be pushed."""
    if run.push is None:
        if run.push_dry_run or run.push_public:
            raise InputError(
                f"--push-{'dry-run' if run.push_dry_run else 'public'}: say where to; give --push ORG/NAME"
            )
        return
    from fastlora.files import hub_upload

    hub_upload.check_repository(run.push)
    if not run.push_dry_run:
        hub_upload.require_client()


def push(run: Run, out: Path) -> None:
    """Uploads what a command wrote, or says what it would upload."""
    if run.push is None:
        return
    from fastlora.files import hub_upload

    upload = hub_upload.upload_of(out, run.push)
    count = f"{len(upload.names)} files" if len(upload.names) > 1 else "1 file"
    what = f"{count}, {upload.size / 1e6:.1f} MB"
    if run.push_dry_run:
        seen = "public" if run.push_public else "private"
        _tell(run, f"would push {what} to {run.push} (made {seen} where it is new): {', '.join(upload.names)}")
        return
    url = hub_upload.send(
        hub_upload.require_client(), upload, public=run.push_public, replace=bool(run.overwrite or run.force)
    )
    _tell(run, f"pushed {what}: {url}")


def _tell(run: Run, line: str) -> None:
    if run.as_json:
        print_aside(escaped(line))
    elif not run.quiet:
        typer.echo(escaped(line))
