"""What unique parts by inputs are to be compared with: the same filter on inputs that tell nothing of the task."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace

import torch

from fastlora.adapters.lora import Adapter
from fastlora.decomposition.input_parts import InputDecomposition, decompose_by_inputs
from fastlora.errors import InputError
from fastlora.merging.input_rows import InputRows, Statistics

KINDS = ("permuted_inputs", "shuffled_tasks")


def input_control(parts: InputDecomposition, kind: str, seed: int) -> dict[str, Adapter]:
    """``{name: unique part}`` by other inputs, in every module as long as the one that it is compared with.

    ``"permuted_inputs"``: the coordinates of every input in another order, one for all adapters: the spectra of the
    covariances stay, and what they say of the adapter's columns does not. ``"shuffled_tasks"``: every adapter gets the
    rows of another one for its own.
    """
    inputs = _permuted(parts.inputs, seed) if kind == "permuted_inputs" else _shuffled(parts, seed)
    settings = parts.settings
    other = decompose_by_inputs(parts.pool, inputs, settings["mu"], settings["ridge"], parts.memory)
    return {name: _as_long(parts, other, name, kind, seed) for name in parts.pool.names}


def _as_long(parts: InputDecomposition, other: InputDecomposition, name: str, kind: str, seed: int) -> Adapter:
    found = other.unique_of(name)
    updates = dict(found.updates)
    lengths = other.lengths(name)
    for module, wanted in parts.lengths(name).items():
        factor = wanted / lengths[module] if lengths[module] > 0 else 0.0
        updates[module] = replace(updates[module], scaling=factor * updates[module].scaling)
    provenance = {"control": kind, "seed": seed, "of": parts.unique_of(name).provenance}
    return replace(found, name=f"{kind}_control({name})", updates=updates, provenance=provenance)


def _permuted(inputs: Statistics, seed: int) -> Statistics:
    """All rows of one length are permuted alike, whoever saw them."""

    def turned(rows: torch.Tensor) -> torch.Tensor:
        width = rows.shape[1]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}\0{width}".encode()))
        return rows[:, torch.randperm(width, generator=generator)].contiguous()

    def of(own: InputRows) -> InputRows:
        return InputRows({s: turned(x) for s, x in own.rows.items()}, own.sites, own.seen)

    return inputs.turned({name: of(own) for name, own in inputs.of.items()})


def _shuffled(parts: InputDecomposition, seed: int) -> Statistics:
    """The rows of the next adapter, in an order that is drawn: nobody keeps its own."""
    names = parts.pool.names
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    following: Mapping[str, str] = {names[i]: names[j] for i, j in zip(order, [*order[1:], order[0]], strict=True)}
    for name, taken in following.items():
        lacking = [m for m in parts.filters[name] if parts.inputs.of[taken].of(m) is None]
        if lacking:
            raise InputError(
                f"control: kind='shuffled_tasks' gives {name!r} the inputs of {taken!r}, which has none of "
                f"{lacking[0]!r}; collect them for all of `pool.modules`"
            )
    return Statistics({name: parts.inputs.of[following[name]] for name in names})
