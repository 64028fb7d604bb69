"""``fastlora inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fastlora.cli.options import Backend, Device, Json, One, Quiet
from fastlora.cli.run import print_json, refuse_weights, require_backend, running

if TYPE_CHECKING:
    pass


def inspect(
    adapter: One,
    every: Annotated[bool, typer.Option("--all", help="Print every module, not the first ones.")] = False,
    device: Device = "auto",
    backend: Backend = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What an adapter holds: modules, ranks, scaling, norms, spectrum; the vectors of (IA)³."""
    with running(device, backend, quiet):
        from fastlora.cli.arguments import parse

        spec = parse(adapter)
        refuse_weights([spec])
        require_backend()
        from fastlora.adapters.loading import load
        from fastlora.adapters.lora import Adapter
        from fastlora.views.adapters import describe

        element = load(spec.path, spec.name)
        if device not in ("auto", "cpu") and isinstance(element, Adapter):
            element = element.to(device)
        data, show = describe(element)
        if as_json:
            print_json(data)
        elif not quiet:
            show(data, every)
