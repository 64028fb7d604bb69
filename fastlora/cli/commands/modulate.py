"""``fastlora modulate``: operators on direction and magnitude, from text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastlora.cli.options import Backend, Device, DropExtras, DType, Energy, Json, One, Out, Overwrite, Quiet, Rank
from fastlora.cli.run import output_directory, require_backend, running, write_one
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


def modulate(
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
    dtype: DType = None,
    device: Device = "auto",
    backend: Backend = None,
    as_json: Json = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """Change direction and magnitude of an adapter's updates (DiPM)."""
    with running(device, backend, quiet, on_cpu="modulate"):
        parsed = [_parse(text) for text in op or ()]
        paths = {text: _path(text) for text in dict.fromkeys([adapter, *(o for p in parsed for o in p[1])])}
        target = output_directory(out, overwrite, list(paths.values()))
        from fastlora.adapters.loading import load
        from fastlora.adapters.pool import require_updates
        from fastlora.dipm import modulate as run
        from fastlora.runtime.progress import track

        require_backend()
        # One path is one adapter, however it is written: an operator between an adapter and itself is the identity.
        loaded: dict[Path, Adapter] = {}
        for text, path in track(list(paths.items()), "loading"):
            if path.resolve() not in loaded:
                found = require_updates(load(path, _name(text)), "modulate")
                loaded[path.resolve()] = found.without_extras() if drop_extras else found
        known = {text: loaded[path.resolve()] for text, path in paths.items()}
        operators = [_operator(name, [known[o] for o in others], strength) for name, others, strength in parsed]
        result = run(known[adapter], operators, granularity=granularity, on=on, rank=rank, energy=energy)
        write_one(result, target, out, dtype, as_json, quiet, result.notes)


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


def _path(text: str) -> Path:
    from fastlora.cli.arguments import parse

    spec = parse(text)
    if spec.weight is not None:
        raise InputError(f"{spec.name}: weights have no meaning for this command; leave out `:{spec.weight:g}`")
    return spec.path


def _name(text: str) -> str:
    from fastlora.cli.arguments import parse

    return parse(text).name


def _operator(name: str, others: list[Adapter], strength: float | None) -> Operator:
    from fastlora import dipm

    if name == "remove":
        return dipm.remove(others, 1.0 if strength is None else strength)
    make: Callable[..., Operator] = getattr(dipm, name)
    return make(*others) if strength is None else make(*others, strength)
