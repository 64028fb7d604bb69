"""``fastlora convert``: an adapter in another format."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from fastlora.cli.inputs import load_element, parse_one
from fastlora.cli.options import PUSHING, One, Out, command
from fastlora.cli.outputs import output_target, require_place, write_adapter, write_dora
from fastlora.cli.run import Run
from fastlora.errors import InputError


@command("rename", "family", "read_rank", "dtype", "uniform_rank", "as_json", "quiet", "overwrite", "force", *PUSHING)
def convert(
    run: Run,
    adapter: One,
    out: Out,
    to: Annotated[
        str, typer.Option(help="peft, kohya, diffusers, comfy, xlabs or mlx.", metavar="FORMAT", show_default=False)
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
    from fastlora.adapters.dora import DoRA
    from fastlora.adapters.pool import require_updates

    loaded = load_element(run, spec)
    if isinstance(loaded, DoRA):
        if run.uniform_rank:
            raise InputError(f"--uniform-rank: the factors of DoRA adapter {loaded.name!r} are written as they are")
        write_dora(run, to_convert(loaded, to, family=run.family, keep_private=keep_private), out)
        return
    given = require_updates(loaded, "convert")
    ready = to_convert(given, to, family=run.family, keep_private=keep_private)
    require_place(run, out, ready)
    write_adapter(run, ready, target, out, given.notes)
