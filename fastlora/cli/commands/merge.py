"""``fastlora merge``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fastlora.cli.options import Adapters, Backend, Device, DropExtras, DType, Energy, Json, Out, Overwrite, Quiet, Rank
from fastlora.cli.run import load_pool, output_directory, paths_of, running, write_one

if TYPE_CHECKING:
    pass


def merge(
    adapters: Adapters,
    out: Out,
    method: Annotated[
        str,
        typer.Option(help="svd: best rank-r approximation of the sum; cat: the exact sum; pem: sum of the factors."),
    ] = "svd",
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
        merged = run(pool, weights, method=method, rank=rank, energy=energy)
        write_one(merged, target, out, dtype, as_json, quiet, [*pool.notices, *told, *merged.notes])
