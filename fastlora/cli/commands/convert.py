"""``fastlora convert``: an adapter in another format."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from fastlora.cli.inputs import load_adapter, parse_one
from fastlora.cli.options import One, Out, command
from fastlora.cli.outputs import output_target, require_place, write_adapter
from fastlora.cli.run import Run


@command("rename", "family", "read_rank", "dtype", "uniform_rank", "as_json", "quiet", "overwrite", "force")
def convert(
    run: Run,
    adapter: One,
    out: Out,
    to: Annotated[
        str, typer.Option(help="peft, kohya, diffusers, comfy or xlabs.", metavar="FORMAT", show_default=False)
    ],
    keep_private: Annotated[
        bool, typer.Option("--keep-private", help="Keep metadata on the training data: folders, captions.")
    ] = False,
) -> None:
    """Write an adapter in another format: the same ΔW, in the names and scales that its readers agree on."""
    run = replace(run, format=to)
    spec = parse_one(adapter)
    target = output_target(run, out, [spec.path])
    run.start()
    from fastlora.adapters.convert import to_convert

    given = load_adapter(run, spec, "convert")
    ready = to_convert(given, to, family=run.family, keep_private=keep_private)
    require_place(run, out, ready)
    write_adapter(run, ready, target, out, given.notes)
