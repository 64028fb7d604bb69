"""``fastlora apply``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastlora.cli.arguments import AdapterSpec, parse_all
from fastlora.cli.commands.merge import parse_settings
from fastlora.cli.exits import outputs
from fastlora.cli.inputs import load_element, refuse_weights
from fastlora.cli.options import DropExtras, Energy, Rank, command
from fastlora.cli.run import Run, print_json
from fastlora.errors import InputError

if TYPE_CHECKING:
    from fastlora.adapters.loading import Element

Base = Annotated[str, typer.Argument(help="The base model: a folder or a safetensors file.", show_default=False)]
Given = Annotated[
    list[str],
    typer.Argument(help="PATH or NAME=PATH, with :WEIGHT; 1 by default.", metavar="A…", show_default=False),
]
OutModel = Annotated[
    Path, typer.Option("--out", "-o", help="Folder to write, or file where the base is one.", show_default=False)
]
Expression = Annotated[
    str | None,
    typer.Option("--expr", help='What is applied, such as "a - unique(b | a)"; docs/compose.md.', show_default=False),
]
MethodName = Annotated[
    str | None,
    typer.Option(
        help="A merge method in place of the sum: ties, svd, …; what works on elements is applied without a cut.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A parameter of the method, such as density=0.3.", metavar="NAME=VALUE", show_default=False
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run that was interrupted.")]
ModelDType = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, bfloat16 or float16, of all tensors; default: each its own.", show_default=False
    ),
]


@command("rename", "family", "read_rank", "memory", "backend", "as_json", "quiet", "overwrite", "force")
def apply(
    run: Run,
    base: Base,
    adapters: Given,
    out: OutModel,
    expr: Expression = None,
    method: MethodName = None,
    set_: Settings = None,
    rank: Rank = None,
    energy: Energy = None,
    model_dtype: ModelDType = None,
    resume: Resume = False,
    drop_extras: DropExtras = False,
) -> None:
    """Write a base model with adapters in its weights: LoRA, DoRA, (IA)³, of any size, streamed."""
    specs = parse_all(adapters)
    parameters: dict[str, object] = {**parse_settings(set_ or ()), "rank": rank, "energy": energy}
    parameters = {name: value for name, value in parameters.items() if value is not None}
    if parameters and method is None:
        raise InputError(f"{next(iter(parameters))}: is a parameter of a method; give --method too")
    if expr is not None:
        refuse_weights(specs)
        if method is not None:
            raise InputError("--expr and --method: an expression says itself how adapters are merged; give one of both")
    run.start()
    import torch

    from fastlora.checkpoints.apply import apply_to, model_output
    from fastlora.core.dtypes import parse_dtype

    kept = None if model_dtype is None else parse_dtype(model_dtype, torch.float32)
    output = model_output(Path(base).expanduser(), out, overwrite=run.replace, resume=resume)
    output.refuse_inputs(spec.path for spec in specs if spec.path.exists())
    outputs.append(output)
    loaded = {spec.name: load_element(run, spec) for spec in specs}
    if len(loaded) < len(specs):
        raise InputError("apply: two adapters have one name; give names with NAME=PATH")
    pool = {name: without_extras(element) if drop_extras else element for name, element in loaded.items()}
    weights = {spec.name: 1.0 if spec.weight is None else spec.weight for spec in specs}
    given = weights if expr is None else composed(run, expr, specs, pool)
    notes = apply_to(Path(base), given, output, pool=pool, method=method, dtype=kept, parameters=parameters)
    if run.as_json:
        print_json({"out": str(out), "notices": notes})
        return
    if not run.quiet:
        typer.echo(f"written: {out}")
    run.tell_notes(notes)


def without_extras(element: Element) -> Element:
    """The adapter without what stands beside its modules; a task vector has nothing there."""
    found: Element = element.without_extras() if hasattr(element, "without_extras") else element
    return found


def composed(run: Run, expression: str, specs: list[AdapterSpec], elements: dict[str, Element]) -> Element:
    """What an expression makes of adapters that are loaded."""
    from fastlora.expressions.compose import compose
    from fastlora.expressions.grammar import names, parse

    used = names(parse(expression))
    unused = [spec.name for spec in specs if spec.name not in used]
    if unused and elements.keys() >= set(used):
        raise InputError(f"the expression does not use {', '.join(unused)}; leave out what it does not name")
    return compose(expression, elements, memory=run.memory)
