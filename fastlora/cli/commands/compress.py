"""``fastlora compress``."""

from __future__ import annotations

from fastlora.cli.options import Backend, Device, DType, Energy, Json, One, Out, Overwrite, Quiet, Rank
from fastlora.cli.run import load_pool, output_directory, paths_of, running, write_one


def compress(
    adapter: One,
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    dtype: DType = None,
    device: Device = "auto",
    backend: Backend = None,
    as_json: Json = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """Resize an adapter to a lower rank, keeping as much of it as that rank can."""
    with running(device, backend, quiet):
        target = output_directory(out, overwrite, paths_of([adapter]))
        from fastlora.merging.compress import compress as run

        pool, _ = load_pool([adapter], weighted=False, device=device)
        smaller = run(pool.adapters[0], rank, energy=energy)
        write_one(smaller, target, out, dtype, as_json, quiet, smaller.notes)
