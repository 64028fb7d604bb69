"""``fastlora apply``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli.arguments import parse_all
from fastlora.cli.inputs import load_element
from fastlora.cli.options import DropExtras, command
from fastlora.cli.run import Run
from fastlora.errors import InputError

Base = Annotated[str, typer.Argument(help="The base model: a folder or a safetensors file.", show_default=False)]
Given = Annotated[
    list[str],
    typer.Argument(help="PATH or NAME=PATH, with :WEIGHT; 1 by default.", metavar="A…", show_default=False),
]
OutModel = Annotated[
    Path, typer.Option("--out", "-o", help="Folder to write, or file where the base is one.", show_default=False)
]


@command("rename", "family", "read_rank", "memory", "quiet")
def apply(
    run: Run,
    base: Base,
    adapters: Given,
    out: OutModel,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that was interrupted.")] = False,
    drop_extras: DropExtras = False,
) -> None:
    """Write a base model with adapters in its weights: LoRA, DoRA, (IA)³, of any size, streamed."""
    specs = parse_all(adapters)
    run.start()
    from fastlora.checkpoints.apply import apply as apply_to
    from fastlora.runtime import ranks

    if ranks.current() is not None:
        raise InputError("apply: one process writes a model; start it without torchrun")

    loaded = {spec.name: load_element(run, spec) for spec in specs}
    if len(loaded) < len(specs):
        raise InputError("apply: two adapters have one name; give names with NAME=PATH")
    pool = {name: element.without_extras() if drop_extras else element for name, element in loaded.items()}  # type: ignore[union-attr]
    weights = {spec.name: 1.0 if spec.weight is None else spec.weight for spec in specs}
    notes = apply_to(base, weights, out, pool=pool, resume=resume)  # type: ignore[arg-type]
    if not run.quiet:
        typer.echo(f"written: {out}")
    run.tell_notes(notes)
