"""Results that are computed on a device and saved from the host: one buffer and one copy an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fastlora.core.data import LoraData
from fastlora.core.factors import Factor, Side
from fastlora.core.updates import Update
from fastlora.engine.buffers import moved, offsets, origin, staging, views
from fastlora.engine.combine_jobs import WantedFactor, combine_job, stored_as
from fastlora.ops.dispatch import run_pass
from fastlora.runtime import devices

Key = TypeVar("Key")
Place = tuple[str, Side]
"""``(module, side)``."""


def on_host(adapters: Mapping[Key, LoraData], dtypes: Mapping[Key, torch.dtype]) -> Mapping[Key, LoraData]:
    """The adapters as they are saved, in host memory: factors in ``dtypes``, scaling inside ``B``.

    Adapters on the host are returned as they are. Those of a device are computed there in one pass, so that a matrix
    that several share is read once, and copied together; matrices that are saved as they were loaded are not copied
    where the host still has them.
    """
    found = dict(adapters)
    on_device = {key: a for key, a in adapters.items() if a.device.type != "cpu"}
    if not on_device:
        return found
    baked = {key: {m: u.baked() for m, u in a.updates.items() if u.rank} for key, a in on_device.items()}
    computed, buffers = _computed(baked, {key: a.device for key, a in on_device.items()}, dtypes)
    for key, adapter in on_device.items():
        places = _fetched(baked[key], computed[key], buffers[key], dtypes[key])
        updates = dict(adapter.updates)
        for module, update in baked[key].items():
            B, A = Factor.of("B", places[module, "B"]), Factor.of("A", places[module, "A"])
            updates[module] = replace(update, B=B, A=A)
        empty = {m: u for m, u in updates.items() if not u.rank}
        updates |= {m: replace(u, B=replace(u.B, terms=()), A=replace(u.A, terms=())) for m, u in empty.items()}
        found[key] = replace(adapter, updates=updates)
    return found


def _computed(
    baked: Mapping[Key, Mapping[str, Update]],
    where: Mapping[Key, torch.device],
    dtypes: Mapping[Key, torch.dtype],
) -> tuple[dict[Key, dict[Place, tuple[int, Tensor]]], dict[Key, Tensor]]:
    """What has to be computed, by adapter and place: where it starts in the adapter's buffer and the result there."""
    computed: dict[Key, dict[Place, tuple[int, Tensor]]] = {}
    buffers: dict[Key, Tensor] = {}
    wanted: dict[Place, list[WantedFactor]] = {}
    for key, updates in baked.items():
        dtype = dtypes[key]
        factors = {(m, f.side): f for m, u in updates.items() for f in (u.B, u.A) if stored_as(f, dtype) is None}
        layout = [(f.shape, dtype) for f in factors.values()]
        starts, size = offsets(layout)
        with devices.memory_told("computing results"):
            buffers[key] = torch.empty(size, dtype=torch.uint8, device=where[key])
        results = views(buffers[key], starts, layout)
        computed[key] = dict(zip(factors, zip(starts, results, strict=True), strict=True))
        for (place, factor), out in zip(factors.items(), results, strict=True):
            wanted.setdefault(place, []).append(WantedFactor(factor, dtype, out))
    run_pass("combine_pass", [combine_job(of_place) for of_place in wanted.values()])
    return computed, buffers


def _fetched(
    updates: Mapping[str, Update], computed: Mapping[Place, tuple[int, Tensor]], buffer: Tensor, dtype: torch.dtype
) -> dict[Place, Tensor]:
    """Every factor of an adapter on the host."""
    here = staging(buffer.nbytes)
    here.copy_(buffer)
    layout = [(tuple(out.shape), dtype) for _, out in computed.values()]
    found = dict(zip(computed, views(here, [at for at, _ in computed.values()], layout), strict=True))
    kept = {(m, f.side): f.stored for m, u in updates.items() for f in (u.B, u.A) if (m, f.side) not in found}
    missing: dict[Place, Tensor] = {}
    for place, stored in kept.items():
        assert stored is not None
        home = origin(stored)
        if home is None:
            missing[place] = stored
        else:
            found[place] = home
    if missing:
        found |= zip(missing, moved(list(missing.values()), torch.device("cpu")), strict=True)
    return found
