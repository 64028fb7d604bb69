"""``fastlora compress``."""

from __future__ import annotations

from dataclasses import replace

from fastlora.cli.inputs import load_adapter, parse_one
from fastlora.cli.options import ALL, Energy, One, Out, Rank, command
from fastlora.cli.outputs import output_target, require_place, write_adapter
from fastlora.cli.run import Run


@command(*ALL)
def compress(run: Run, adapter: One, out: Out, rank: Rank = None, energy: Energy = None) -> None:
    """Resize an adapter to a lower rank, keeping as much of it as that rank can."""
    spec = parse_one(adapter)
    target = output_target(run, out, [spec.path])
    run.start()
    from fastlora.merging.compress import compress as compress_adapter

    # What is no plain LoRA can be read at the rank that is asked for: that is its best update of that rank.
    given = load_adapter(replace(run, read_rank=run.read_rank or rank), spec, "compress")
    require_place(run, out, given)
    smaller = compress_adapter(given, rank, energy=energy, memory=run.memory, device=run.device)
    write_adapter(run, smaller, target, out, smaller.notes)
