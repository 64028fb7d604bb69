"""Options that several commands take, and :func:`command`, which gives a command those that all share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, get_type_hints

import typer

from fastlora.cli.pushing import check_push, push
from fastlora.cli.run import Run
from fastlora.runtime.launch import launched_rank

P = ParamSpec("P")
KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY

ADAPTER_HELP = "PATH, PATH:WEIGHT or NAME=PATH[:WEIGHT]; a PEFT directory, a folder of them or a Hub id."
Adapters = Annotated[list[str], typer.Argument(help=ADAPTER_HELP, metavar="A…", show_default=False)]
One = Annotated[str, typer.Argument(help="An adapter: a PEFT directory or a Hub id.", metavar="A", show_default=False)]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        help="Directory to write, or file (*.safetensors) for single-file formats; must not exist, or --overwrite.",
        show_default=False,
    ),
]
OutDirectory = Annotated[
    Path, typer.Option("--out", "-o", help="Directory to write; must not exist, or --overwrite.", show_default=False)
]
OutAny = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        help="Directory to write, or file (*.safetensors) for task vectors and single-file formats; must not exist, "
        "or --overwrite.",
        show_default=False,
    ),
]
Rank = Annotated[int | None, typer.Option(help="Keep at most this many directions.", show_default=False)]
Energy = Annotated[
    float | None, typer.Option(help="Keep this share of Σσ² (0–1), instead of a rank.", show_default=False)
]
DropExtras = Annotated[
    bool, typer.Option("--drop-extras", help="Leave out biases and replaced modules (modules_to_save).")
]
Csv = Annotated[Path | None, typer.Option("--csv", help="Also write the whole table to this file.", show_default=False)]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html", help="Also write a page about the pool and the result, *.html: docs/pools.md.", show_default=False
    ),
]
Every = Annotated[bool, typer.Option("--all", help="Print every module, not the first ones.")]

Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        help="Take modules called OLD, or OLD.…, for NEW; may be repeated.",
        metavar="OLD=NEW",
        show_default=False,
    ),
]
Family = Annotated[
    str | None,
    typer.Option(
        help="The models that single files are for (sdxl, flux), where their names fit several.", show_default=False
    ),
]
ReadRank = Annotated[
    int | None,
    typer.Option(
        "--read-rank",
        help="Read what is no plain LoRA (LoHa, LoKr, whole matrices) at this rank; default: exactly.",
        show_default=False,
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="The base model: a directory or file. DoRAs are made LoRAs on it, at --read-rank; default: 99 % of ‖ΔW‖².",
        metavar="PATH",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None, typer.Option(help="Bound on resident memory, or on the GPU's: 1GiB.", show_default=False)
]
DType = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: widest of the inputs.", show_default=False)
]
Format = Annotated[
    str | None,
    typer.Option(help="peft, kohya, diffusers or comfy; default: that of the first input.", show_default=False),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N; auto is the CPU.")]
Backend = Annotated[str | None, typer.Option(help="Force a backend: cpu, cuda, triton, reference.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no report, errors only.")]
UniformRank = Annotated[
    bool, typer.Option("--uniform-rank", help="Give all modules the largest rank, filled with zeros.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of fastlora.")]
Force = Annotated[bool, typer.Option("--force", help="Replace whatever is there, also what fastlora did not write.")]
Push = Annotated[
    str | None,
    typer.Option(
        "--push", help="Upload the result to this repository of the Hub.", metavar="ORG/NAME", show_default=False
    ),
]
PushPublic = Annotated[bool, typer.Option("--push-public", help="Make a new repository public; default: private.")]
PushDryRun = Annotated[bool, typer.Option("--push-dry-run", help="Write the result, and say what --push would upload.")]

SHARED: dict[str, Any] = {
    "rename": Map,
    "family": Family,
    "read_rank": ReadRank,
    "dora_base": BaseModel,
    "memory": Memory,
    "dtype": DType,
    "format": Format,
    "uniform_rank": UniformRank,
    "device": Device,
    "backend": Backend,
    "as_json": Json,
    "quiet": Quiet,
    "overwrite": Overwrite,
    "force": Force,
    "push": Push,
    "push_public": PushPublic,
    "push_dry_run": PushDryRun,
}
"""The fields of :class:`Run` as options, in the order of help."""

ALL = tuple(SHARED)
PUSHING = ("push", "push_public", "push_dry_run")


def command(
    *shared: str,
) -> Callable[[Callable[Concatenate[Run, P], None]], Callable[..., None]]:
    """Gives a command, ``name(run, …)``, the options ``shared``, which it finds in ``run``."""

    def decorate(function: Callable[Concatenate[Run, P], None]) -> Callable[..., None]:
        def begin(**given: Any) -> None:
            run = Run(**{name: given.pop(name) for name in shared})
            check_push(run)
            with run.stack:
                function(run, **given)  # type: ignore[call-arg]
            if run.push is not None and not launched_rank():
                push(run, given["out"])

        # typer reads the signature: the command's own parameters, then the shared ones.
        hints = get_type_hints(function, include_extras=True)
        own_parameters = list(inspect.signature(function).parameters.values())[1:]
        parameters = [p.replace(annotation=hints[p.name], kind=KEYWORD_ONLY) for p in own_parameters]
        for name in (s for s in SHARED if s in shared):
            field = Run.__dataclass_fields__[name]
            parameters.append(inspect.Parameter(name, KEYWORD_ONLY, default=field.default, annotation=SHARED[name]))
        begin.__name__, begin.__doc__ = function.__name__, function.__doc__
        begin.__annotations__ = {p.name: p.annotation for p in parameters}
        begin.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return begin

    return decorate
