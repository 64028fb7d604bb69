"""``fastlora modulate``: operators on direction and magnitude, from text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from fastlora.cli.inputs import load_adapters, parse_one
from fastlora.cli.options import ALL, DropExtras, Energy, One, Out, Rank, command
from fastlora.cli.outputs import output_target, require_place, write_adapter
from fastlora.cli.run import Run
from fastlora.errors import InputError

if TYPE_CHECKING:
    from fastlora.adapters.lora import Adapter
    from fastlora.dipm import Operator


FORMS = {
    "reverse": "reverse[:λ]",
    "scale": "scale:λ",
    "shift": "shift:SOURCE:TARGET[:λ]",
    "interpolate": "interpolate:OTHER:t",
    "remove": "remove:OTHER[,OTHER…][:λ]",
}


@command(*ALL)
def modulate(
    run: Run,
    adapter: One,
    out: Out,
    op: Annotated[
        list[str] | None,
        typer.Option(
            help=f"An operator, applied in the order given: {', '.join(FORMS.values())}; λ is 1 by default.",
            metavar="OP",
            show_default=False,
        ),
    ] = None,
    granularity: Annotated[str, typer.Option(help="column (of ΔW), component (of its SVD) or matrix.")] = "column",
    on: Annotated[str, typer.Option(help="What is decoupled: product (ΔW), B or A.")] = "product",
    rank: Rank = None,
    energy: Energy = None,
    drop_extras: DropExtras = False,
) -> None:
    """Change direction and magnitude of an adapter's updates (DiPM)."""
    parsed = [_parse(text) for text in op or ()]
    specs = {text: parse_one(text) for text in dict.fromkeys([adapter, *(o for p in parsed for o in p[1])])}
    target = output_target(run, out, [s.path for s in specs.values()])
    run.start()
    from fastlora.dipm import modulate as modulate_adapter

    # One path is one adapter, however it is written: an operator between an adapter and itself is the identity.
    distinct = {spec.path.resolve(): spec for spec in reversed(specs.values())}
    adapters = load_adapters(run, list(distinct.values()), "modulate")
    loaded = {path: a.without_extras() if drop_extras else a for path, a in zip(distinct, adapters, strict=True)}
    known = {text: loaded[spec.path.resolve()] for text, spec in specs.items()}
    require_place(run, out, known[adapter])
    operators = [_operator(name, [known[o] for o in others], strength) for name, others, strength in parsed]
    result = modulate_adapter(
        known[adapter],
        operators,
        granularity=granularity,
        on=on,
        rank=rank,
        energy=energy,
        memory=run.memory,
        device=run.device,
    )
    write_adapter(run, result, target, out, result.notes)


def _parse(text: str) -> tuple[str, list[str], float | None]:
    """``(operator, other adapters, strength)`` of ``shift:SOURCE:TARGET:0.3`` and the like."""
    name, *fields = text.split(":")
    if name not in FORMS:
        raise InputError(f"--op {text!r}: there is no operator {name!r}; use {', '.join(FORMS.values())}")
    count = {"shift": 2, "interpolate": 1, "remove": 1}.get(name, 0)
    strength = _number(fields[-1]) if len(fields) == count + 1 else None
    needed = name in ("scale", "interpolate")
    if len(fields) not in (count, count + 1) or (len(fields) == count + 1) != (strength is not None):
        needed = True
    if not all(fields[:count]) or (needed and strength is None):
        raise InputError(f"--op {text!r}: write {FORMS[name]}, λ and t being numbers and paths without ':'")
    others = [o for o in fields[0].split(",") if o] if name == "remove" else fields[:count]
    return name, others, strength


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _operator(name: str, others: list[Adapter], strength: float | None) -> Operator:
    from fastlora import dipm

    if name == "remove":
        return dipm.remove(others, 1.0 if strength is None else strength)
    make: Callable[..., Operator] = getattr(dipm, name)
    return make(*others) if strength is None else make(*others, strength)
