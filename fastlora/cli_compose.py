"""``fastlora compose``: an expression over adapters. Imports nothing heavy until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from fastlora.cli import (
    Backend,
    Device,
    DropExtras,
    DType,
    Json,
    Memory,
    Overwrite,
    Quiet,
    _notices,
    _output,
    _print_json,
    _refuse_weights,
    _require_backend,
    _running,
    _write_one,
    app,
)
from fastlora.errors import InputError

if TYPE_CHECKING:
    from fastlora.composition import Element

EXAMPLE = "0.6*a + 0.4*b - 0.3*unique(c | a, b)"
Expression = Annotated[
    str, typer.Argument(help=f'Such as "{EXAMPLE}"; docs/compose.md.', metavar="EXPRESSION", show_default=False)
]
Named = Annotated[
    list[str],
    typer.Argument(
        help="What the names mean: PEFT directories, Hub ids, task vectors.",
        metavar="NAME=PATH…",
        show_default=False,
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        help="Directory to write (for task vectors a file, *.safetensors); must not exist, or --overwrite.",
        show_default=False,
    ),
]


class _Command(TyperCommand):
    """Takes ``-a + b`` for an expression, where other commands look for an option ``-a``."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        return super().parse_args(context, [f" {a}" if _is_expression(a) else a for a in arguments])


def _is_expression(argument: str) -> bool:
    """Whether an argument starts with a minus sign; ``-o out`` and ``-q`` are options."""
    if not argument.startswith("-") or argument.startswith("--") or argument == "-":
        return False
    return argument[1] not in "oqh" or any(c in " +*(|" for c in argument)


@app.command(cls=_Command)
def compose(
    expression: Expression,
    adapters: Named,
    out: Out,
    drop_extras: DropExtras = False,
    memory: Memory = None,
    dtype: DType = None,
    device: Device = "auto",
    backend: Backend = None,
    as_json: Json = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """Evaluate an expression: + - * /, unique(x | a, …), shared(a, …), compress, negate, analogy, add."""
    with _running(device, backend, quiet, on_cpu="compose"):
        from fastlora.expression import names, parse
        from fastlora.locate import parse_all

        tree = parse(expression)  # before the imports that take a second
        specs = parse_all(adapters)
        _refuse_weights(specs)
        unused = [s.name for s in specs if s.name not in names(tree)]
        if unused and {s.name for s in specs} >= set(names(tree)):
            raise InputError(f"the expression does not use {', '.join(unused)}; leave out what it does not name")
        target = _target(out, overwrite, [s.path for s in specs])
        _require_backend()
        from fastlora.composition import compose as run
        from fastlora.memory import bounded
        from fastlora.memory import parse as parse_memory

        result = run(expression, {s.name: s.path for s in specs}, name=out.name, drop_extras=drop_extras, memory=memory)
        with bounded(parse_memory(memory)):
            _write(result, target, out, dtype, as_json, quiet, overwrite)


def _target(out: Path, overwrite: bool, inputs: list[Path]) -> Any:
    """The output directory; ``None`` for the file of a task vector."""
    if out.suffix != ".safetensors":
        return _output(out, overwrite, inputs)
    from fastlora.output import check_file

    if out.resolve() in [p.resolve() for p in inputs]:
        raise InputError(f"the output {out} is an input; write to another file")
    check_file(out, overwrite=overwrite)
    return None


def _write(
    result: Element, target: Any, out: Path, dtype: str | None, as_json: bool, quiet: bool, overwrite: bool
) -> None:
    from fastlora.adapter import Adapter
    from fastlora.finetune import TaskVector

    if isinstance(result, TaskVector) != (target is None):
        needed = "a file, NAME.safetensors" if target is not None else "a directory"
        raise InputError(f"the result is {result.kind}, which is written as {needed}; change --out {out}")
    if isinstance(result, Adapter):
        _write_one(result, target, out, dtype, as_json, quiet, result.notes)
        return
    if isinstance(result, TaskVector):
        result.save(out, dtype=dtype, overwrite=overwrite)
        found = {"kind": "task vector", "parameters": len(result.deltas)}
        said = f"task vector of {len(result.deltas)} parameters"
    else:
        from fastlora.formats.ia3 import write

        with target as staging:
            write(staging, result, dtype)
        found = {"kind": "IA3", "modules": len(result.vectors)}
        said = f"(IA)³, {len(result.vectors)} modules"
    notices = [*result.notes, *(target.notices if target is not None else [])]
    if as_json:
        _print_json({"out": str(out), **found, "notices": notices})
    elif not quiet:
        typer.echo(f"{out}: {said}")
    _notices(notices, quiet)
