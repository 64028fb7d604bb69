"""``fastlora merge --dora recombine``: DoRAs of one base model as one DoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastlora.cli.arguments import AdapterSpec
from fastlora.cli.inputs import load_elements
from fastlora.cli.outputs import write_dora
from fastlora.cli.run import Run
from fastlora.errors import InputError

WAYS = ("nearest", "recombine")


def is_recombined(run: Run, way: str | None, options: Mapping[str, object]) -> bool:
    """Whether ``--dora`` asks for a DoRA. ``options``: those that have no meaning for it, by name."""
    if way is None:
        return False
    if way not in WAYS:
        raise InputError(f"--dora {way!r} is unknown; there are {', '.join(WAYS)}")
    if run.dora_base is None:
        raise InputError(f"--dora {way}: what a DoRA changes needs the base model; give --base MODEL")
    used = next((name for name, value in options.items() if value), None)
    if way == "recombine" and used is not None:
        raise InputError(
            f"--dora recombine adds directions and magnitudes with the weights A:0.7 B:0.3; leave out {used}"
        )
    return way == "recombine"


def recombine_doras(
    run: Run,
    specs: Sequence[AdapterSpec],
    out: Path,
    *,
    rank: int | None,
    energy: float | None,
    drop_extras: bool,
) -> None:
    """Recombines adapters and writes the DoRA."""
    from dataclasses import replace

    from fastlora.adapters.dora import DoRA
    from fastlora.adapters.pool import require_updates
    from fastlora.adapters.renaming import Renaming
    from fastlora.merging.default import choose
    from fastlora.merging.recombine import directions, recombine

    assert run.dora_base is not None
    loaded, given, notes = load_elements(run, specs)
    renaming = Renaming(run.changes)
    adapters = [renaming(e if isinstance(e, DoRA) else require_updates(e, "recombine")) for e in loaded]
    renaming.require_used()
    if drop_extras:
        adapters = [replace(a, extras={}) for a in adapters]
    weights = {name: 1.0 if weight is None else weight for name, weight in given.items()}
    if all(weight is None for weight in given.values()):
        choice = choose(directions(adapters), None, rank=None, energy=None)
        weights = choice.weights
        notes += [*choice.notes, *(f"weight of {name}: {weight:.6g}" for name, weight in weights.items())]
    result = recombine(adapters, weights, base=run.dora_base, rank=rank, energy=energy)
    write_dora(run, replace(result, notes=(*notes, *result.notes)), out)
