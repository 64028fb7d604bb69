"""``fastlora extract``: a full fine-tune as a task vector or a LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli.options import PUSHING, Energy, OutAny, Rank, command
from fastlora.cli.outputs import output_target, write_element
from fastlora.cli.run import Run
from fastlora.errors import InputError

MODEL_HELP = "a file of tensors (.safetensors, .bin, .pt) or a model's directory."
Base = Annotated[Path, typer.Argument(help=f"The base model: {MODEL_HELP}", metavar="BASE", show_default=False)]
Tuned = Annotated[Path, typer.Argument(help=f"Its fine-tune: {MODEL_HELP}", metavar="TUNED", show_default=False)]

Include = Annotated[
    list[str] | None,
    typer.Option(help="Take these modules only: q_proj, layers.*.mlp or a regular expression.", metavar="PATTERN"),
]
Exclude = Annotated[list[str] | None, typer.Option(help="Leave these modules out.", metavar="PATTERN")]
Whole = Annotated[
    list[str] | None,
    typer.Option(help="Keep these modules whole, as the fine-tune has them (modules_to_save).", metavar="PATTERN"),
]


@command("memory", "dtype", "format", "uniform_rank", "as_json", "quiet", "overwrite", "force", *PUSHING)
def extract(
    run: Run,
    base: Base,
    tuned: Tuned,
    out: OutAny,
    rank: Rank = None,
    energy: Energy = None,
    common_only: Annotated[
        bool,
        typer.Option("--common-only", help="Leave out parameters, and rows of embeddings, that only one of them has."),
    ] = False,
    include: Include = None,
    exclude: Exclude = None,
    whole: Whole = None,
    biases: Annotated[bool, typer.Option("--biases", help="Keep the changes of biases in the adapter.")] = False,
    fan_in_fan_out: Annotated[
        bool | None,
        typer.Option(
            "--fan-in-fan-out/--no-fan-in-fan-out",
            help="Weights are stored [in, out], as Conv1D has them; by default config.json says it.",
            show_default=False,
        ),
    ] = None,
    tied: Annotated[
        bool | None,
        typer.Option(
            "--tied/--no-tied",
            help="The output head is the input embedding; by default config.json says it.",
            show_default=False,
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="keep (whole), factor or skip embeddings; default: factor.",
            show_default=False,
        ),
    ] = None,
    norms: Annotated[
        str | None, typer.Option(help="keep (whole) or skip norms; default: skip, with a note.", show_default=False)
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Decompose large weights exactly, too; takes minutes each, not a second.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random numbers for large weights.")] = 0,
    base_model: Annotated[
        str | None, typer.Option(help="What the adapter names as its base model.", metavar="NAME", show_default=False)
    ] = None,
) -> None:
    """The change from a model to its fine-tune: a task vector, or with --rank or --energy a LoRA adapter."""
    lowrank = rank is not None or energy is not None
    given = {
        "--biases": biases,
        "--whole": bool(whole),
        "--fan-in-fan-out": fan_in_fan_out is not None,
        "--base-model": base_model is not None,
        "--embeddings": embeddings is not None,
        "--norms": norms is not None,
        "--exact": exact,
        "--seed": seed != 0,
        "--uniform-rank": bool(run.uniform_rank),
        "--format": run.format is not None,
    }
    for option in (option for option, is_given in given.items() if is_given and not lowrank):
        raise InputError(f"{option} is for an adapter; a task vector holds every parameter's change (or give --rank N)")
    if run.format in (None, "peft") and lowrank != (out.suffix != ".safetensors"):
        raise InputError(
            f"--out {out}: "
            + ("an adapter is a directory" if lowrank else "a task vector is a file, NAME.safetensors")
            + ("; leave out --rank and --energy for a task vector" if lowrank else "; give --rank N for an adapter")
        )
    target = output_target(run, out, [base, tuned])
    run.start()
    if not lowrank:
        from fastlora.adapters.task_vector import task_vector

        vector = task_vector(
            base,
            tuned,
            out.stem,
            common_only=common_only,
            include=include or (),
            exclude=exclude or (),
            tied=tied,
        )
        write_element(run, vector, target, out)
        return
    from fastlora.adapters.extract import extract as extract_adapter

    result = extract_adapter(
        base,
        tuned,
        rank=rank,
        energy=energy,
        exact=exact,
        seed=seed,
        embeddings=embeddings,  # type: ignore[arg-type]
        norms=norms,  # type: ignore[arg-type]
        include=include,
        exclude=exclude,
        whole=whole or (),
        memory=run.memory,
        name=out.stem,
        common_only=common_only,
        tied=tied,
        fan_in_fan_out=fan_in_fan_out,
        biases=biases,
        base_model=base_model or None,
    )
    write_element(run, result, target, out)
