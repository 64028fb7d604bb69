"""``fastlora merge``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from fastlora.cli.options import Adapters, Backend, Device, DropExtras, DType, Energy, Json, Out, Overwrite, Quiet, Rank
from fastlora.cli.run import load_pool, output_directory, paths_of, running, write_one
from fastlora.errors import InputError
from fastlora.merging.listing import method_files

OPTIONS = ("rank", "energy", "device", "method")
"""Parameters of a merge that are options of the command."""


def merge(
    adapters: Adapters,
    out: Out,
    method: Annotated[
        str,
        typer.Option(help=f"{', '.join(method_files())}: `fastlora methods` says what each does and takes."),
    ] = "svd",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A parameter of the method, such as density=0.3.", metavar="NAME=VALUE", show_default=False
        ),
    ] = None,
    weights_by: Annotated[
        str | None,
        typer.Option(help="equal_energy, matched_norm or least_interference, in place of :WEIGHT.", show_default=False),
    ] = None,
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
    """Merge adapters into one: Σ wᵢΔWᵢ."""
    with running(device, backend, quiet):
        settings = parse_settings(set_ or ())
        target = output_directory(out, overwrite, paths_of(adapters))
        from fastlora.adapters.pool import Pool
        from fastlora.merging.merge import merge as run

        pool, specs = load_pool(adapters, weighted=weights_by is None, device=device)
        if drop_extras:
            notices, pool = pool.notices, Pool(a.without_extras() for a in pool.adapters)
            pool.notices = notices
        weights = {s.name: 1.0 if s.weight is None else s.weight for s in specs}
        told = []
        if weights_by is not None:
            from fastlora.coefficients.weights import weights as find_weights

            weights = find_weights(pool, weights_by)
            told = [f"weight of {name}: {weight:.6g}" for name, weight in weights.items()]
        merged = run(pool, weights, method=method, rank=rank, energy=energy, **settings)
        write_one(merged, target, out, dtype, as_json, quiet, [*pool.notices, *told, *merged.notes])


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """``{name: value}`` of ``NAME=VALUE`` arguments; what a value means, the method knows."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier() or not value.strip():
            raise InputError(f"--set {text!r}: write NAME=VALUE, such as density=0.3")
        if name in OPTIONS:
            raise InputError(f"--set {text!r}: use the option --{name}")
        if name in ("pool", "weights"):
            raise InputError(f"--set {text!r}: adapters and weights are arguments, PATH:WEIGHT")
        if name in found:
            raise InputError(f"--set {text!r}: {name} is given twice")
        found[name] = value.strip()
    return found
