"""``fastlora compose``: an expression over adapters."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fastlora.cli.arguments import parse_all
from fastlora.cli.inputs import load_pool, on_base, refuse_weights
from fastlora.cli.options import ALL, DropExtras, Html, OutAny, command
from fastlora.cli.outputs import output_target, write_element
from fastlora.cli.pages import check_page, write_result_page
from fastlora.cli.run import Run
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


class Command(TyperCommand):
    """Takes ``-a + b`` for an expression, where other commands look for an option ``-a``."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        """Puts a space before an expression that begins with a minus, so that it is not read as an option."""
        return super().parse_args(context, [f" {a}" if _is_expression(a) else a for a in arguments])


def _is_expression(argument: str) -> bool:
    """Whether an argument starts with a minus sign; ``-o out`` and ``-q`` are options."""
    if not argument.startswith("-") or argument.startswith("--") or argument == "-":
        return False
    return argument[1] not in "oqh" or any(c in " +*(|" for c in argument)


@command(*ALL)
def compose(
    run: Run,
    expression: Expression,
    adapters: Named,
    out: OutAny,
    html: Html = None,
    drop_extras: DropExtras = False,
) -> None:
    """Evaluate an expression: + - * /, unique(x | a, …), shared(a, …), compress, negate, analogy, add."""
    from fastlora.expressions.grammar import names, parse

    tree = parse(expression)
    specs = parse_all(adapters)
    refuse_weights(specs)
    unused = [s.name for s in specs if s.name not in names(tree)]
    if unused and {s.name for s in specs} >= set(names(tree)):
        raise InputError(f"the expression does not use {', '.join(unused)}; leave out what it does not name")
    check_page(run, html)
    target = output_target(run, out, [s.path for s in specs])
    run.start()
    run.require_backend()
    from fastlora.adapters.loading import load
    from fastlora.adapters.lora import Adapter
    from fastlora.expressions.compose import compose as evaluate

    # A page compares factors: it refuses what has none before any work.
    pool = None if html is None else load_pool(run, [s for s in specs if s.name in names(tree)])[0]
    if run.family is None and run.read_rank is None and run.dora_base is None:
        named: dict[str, Any] = {s.name: s.path for s in specs}
    else:
        used = [s for s in specs if s.name in names(tree)]
        named = {s.name: on_base(run, load(s.path, s.name, family=run.family, rank=run.read_rank)) for s in used}
    result = evaluate(
        expression,
        named,
        name=out.name,
        drop_extras=drop_extras,
        memory=run.memory,
        device=run.device,
        rename=run.changes,
    )
    write_element(run, result, target, out)
    if html is not None and pool is not None and isinstance(result, Adapter):
        write_result_page(run, html, pool, result)
