"""``fastlora extract``: a full fine-tune as a task vector or a LoRA adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli.options import Energy, OutAny, Rank, command
from fastlora.cli.outputs import output_target, write_element
from fastlora.cli.run import Run
from fastlora.errors import InputError

MODEL_HELP = "a file of tensors (.safetensors, .bin, .pt) or a model's directory."
Base = Annotated[Path, typer.Argument(help=f"The base model: {MODEL_HELP}", metavar="BASE", show_default=False)]
Tuned = Annotated[Path, typer.Argument(help=f"Its fine-tune: {MODEL_HELP}", metavar="TUNED", show_default=False)]


@command("dtype", "uniform_rank", "as_json", "quiet", "overwrite", "force")
def extract(
    run: Run,
    base: Base,
    tuned: Tuned,
    out: OutAny,
    rank: Rank = None,
    energy: Energy = None,
    common_only: Annotated[
        bool, typer.Option("--common-only", help="Leave out parameters that only one of the models has.")
    ] = False,
    biases: Annotated[bool, typer.Option("--biases", help="Keep the changes of biases in the adapter.")] = False,
) -> None:
    """The change from a model to its fine-tune: a task vector, or with --rank or --energy a LoRA adapter."""
    lowrank = rank is not None or energy is not None
    if biases and not lowrank:
        raise InputError("--biases is for an adapter; a task vector holds every parameter (or give --rank N)")
    if run.uniform_rank and not lowrank:
        raise InputError("--uniform-rank is for an adapter; a task vector has no ranks (or give --rank N)")
    if lowrank != (out.suffix != ".safetensors"):
        raise InputError(
            f"--out {out}: "
            + ("an adapter is a directory" if lowrank else "a task vector is a file, NAME.safetensors")
            + ("; leave out --rank and --energy for a task vector" if lowrank else "; give --rank N for an adapter")
        )
    target = output_target(run, out, [base, tuned])
    run.start()
    from fastlora.adapters.task_vector import task_vector

    vector = task_vector(base, tuned, out.stem, common_only=common_only)
    result = vector.extract(rank, energy=energy, biases=biases) if lowrank else vector
    result = replace(result, notes=tuple(dict.fromkeys([*vector.notes, *result.notes])))
    write_element(run, result, target, out)
