"""``fastlora methods``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fastlora.cli.options import command
from fastlora.cli.run import Run, print_json

if TYPE_CHECKING:
    from fastlora.core.parameters import Parameter
    from fastlora.merging.registry import Method


@command("as_json")
def methods(
    run: Run,
    names: Annotated[list[str] | None, typer.Argument(help="Show these alone.", metavar="NAME…")] = None,
) -> None:
    """The methods of `merge`, what they do and which parameters they take."""
    from fastlora.merging.merge import methods as all_methods
    from fastlora.merging.registry import find_method

    chosen = {n: find_method(n) for n in names} if names else all_methods()
    if run.as_json:
        print_json({name: _data(method) for name, method in chosen.items()})
        return
    for name, method in chosen.items():
        typer.echo(f"{name} ({method.form}): {method.summary}")
        typer.echo(f"    from {method.source}")
        typer.echo(f"    needs {method.needs}; cost {method.cost}; rank of the result: {method.rank}")
        for parameter in method.parameters.values():
            typer.echo(f"    {_usage(parameter)}: {parameter.help}")


def _data(method: Method) -> dict[str, object]:
    parameters = {
        p.name: {
            "type": p.kind.__name__,
            "required": p.required,
            "default": None if p.required else p.default,
            "choices": p.choices,
            "help": p.help,
        }
        for p in method.parameters.values()
    }
    return {
        "form": method.form,
        "summary": method.summary,
        "source": method.source,
        "needs": method.needs,
        "cost": method.cost,
        "rank": method.rank,
        "parameters": parameters,
    }


def _usage(parameter: Parameter) -> str:
    """The option as it is typed, with the values that it takes."""
    values = "|".join(parameter.choices) or {bool: "true|false", str: "WORD"}.get(parameter.kind, "NUMBER")
    is_option = parameter.name in ("rank", "energy", "min_energy")
    option = f"--{parameter.name.replace('_', '-')} " if is_option else f"--set {parameter.name}="
    default = "" if parameter.required or parameter.default is None else f" ({parameter.default} by default)"
    return f"{option}{values}{' (needed)' if parameter.required else default}"
