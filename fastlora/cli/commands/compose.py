"""``fastlora compose``: an expression over adapters. Imports nothing heavy until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fastlora.cli.options import Backend, Device, DropExtras, DType, Json, Memory, Overwrite, Quiet
from fastlora.cli.run import output_target, refuse_weights, require_backend, running, write_element
from fastlora.errors import InputError

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


class Command(TyperCommand):
    """Takes ``-a + b`` for an expression, where other commands look for an option ``-a``."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        return super().parse_args(context, [f" {a}" if _is_expression(a) else a for a in arguments])


def _is_expression(argument: str) -> bool:
    """Whether an argument starts with a minus sign; ``-o out`` and ``-q`` are options."""
    if not argument.startswith("-") or argument.startswith("--") or argument == "-":
        return False
    return argument[1] not in "oqh" or any(c in " +*(|" for c in argument)


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
    with running(device, backend, quiet, on_cpu="compose"):
        from fastlora.cli.arguments import parse_all
        from fastlora.expressions.grammar import names, parse

        tree = parse(expression)  # before the imports that take a second
        specs = parse_all(adapters)
        refuse_weights(specs)
        unused = [s.name for s in specs if s.name not in names(tree)]
        if unused and {s.name for s in specs} >= set(names(tree)):
            raise InputError(f"the expression does not use {', '.join(unused)}; leave out what it does not name")
        target = output_target(out, overwrite, [s.path for s in specs])
        require_backend()
        from fastlora.expressions.compose import compose as run
        from fastlora.runtime.memory import bounded
        from fastlora.runtime.memory import parse as parse_memory

        result = run(expression, {s.name: s.path for s in specs}, name=out.name, drop_extras=drop_extras, memory=memory)
        with bounded(parse_memory(memory)):
            write_element(result, target, out, dtype, as_json, quiet, overwrite)
