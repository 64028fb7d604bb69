"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ADAPTER_HELP = "PATH, PATH:WEIGHT or NAME=PATH[:WEIGHT]; a PEFT directory or a Hub id."
Adapters = Annotated[list[str], typer.Argument(help=ADAPTER_HELP, metavar="A…", show_default=False)]
Memory = Annotated[
    str | None, typer.Option(help="Bound on resident memory, or on the GPU's: 1GiB.", show_default=False)
]
One = Annotated[str, typer.Argument(help="An adapter: a PEFT directory or a Hub id.", metavar="A", show_default=False)]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="Directory to write; must not exist, or --overwrite.", show_default=False)
]
Rank = Annotated[int | None, typer.Option(help="Keep at most this many directions.", show_default=False)]
Energy = Annotated[
    float | None, typer.Option(help="Keep this share of Σσ² (0–1), instead of a rank.", show_default=False)
]
DType = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: widest of the inputs.", show_default=False)
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N; auto is the CPU.")]
Backend = Annotated[str | None, typer.Option(help="Force a backend: cpu, cuda, triton, reference.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no report, errors only.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]
DropExtras = Annotated[
    bool, typer.Option("--drop-extras", help="Leave out biases and replaced modules (modules_to_save).")
]
