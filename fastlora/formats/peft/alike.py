"""Adapters of one training recipe, of which a pool has hundreds: their configurations are the same to the byte, and
their files have tensors of the same names and shapes. What was understood of the last ones is remembered, so that the
next of a kind takes as long as its tensors do."""

from __future__ import annotations

import functools
import mmap
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.core.data import BaseInfo, LoraData
from fastlora.core.deferred import Later, deferred
from fastlora.core.factors import Factor
from fastlora.core.inert import FIRST_COLUMNS, FIRST_ROW, changes_something
from fastlora.core.updates import Layout, Update
from fastlora.files.mapped_tensors import MappedFile, Place, Runs, array_at
from fastlora.runtime.cpython import paused_collector

MOST_KNOWN, LARGEST_KNOWN = 8, 2**16
"""How many recipes are remembered, and of configurations of how many bytes."""

Signature = tuple[tuple[str, tuple[int, ...], torch.dtype | None], ...]
Places = tuple[tuple[str, str, str, float, Layout], ...]


@dataclass(slots=True)
class Recipe:
    """What the tensors of such adapters are, and what the adapters say of their base model.

    ``places``: of every module its path, the names of its ``B`` and ``A``, its scaling and layout."""

    signature: Signature
    places: Places
    base: BaseInfo
    dtype: torch.dtype
    layout: Mapping[str, Place] | None = None
    """Where the tensors lie in the files that were read last, and their order there."""
    runs: Runs | None = None
    sample: tuple[Place, Place] | None = None
    """Where ``B`` and ``A`` of the first module lie that is not scaled to nothing."""

    def adapter(self, name: str, file: MappedFile) -> LoraData | None:
        """The adapter that a file holds, whose updates are made when they are looked at; ``None`` where it holds other
        tensors, or where one look does not show that the adapter changes something."""
        if file.places is not self.layout or self.runs is None:
            found = [(key, place.shape, place.dtype) for key, place in file.places.items()]
            if tuple(found) != self.signature:
                return None
            self.layout = file.places
            self.runs = Runs([file.places[key] for _, b, a, _, _ in self.places for key in (b, a)])
            pairs = [(file.places[b], file.places[a]) for _, b, a, scaling, _ in self.places if scaling]
            self.sample = pairs[0] if pairs else None
        if self.sample is None:
            return None
        B, A = self.sample
        if not changes_something(array_at(file, B, FIRST_ROW), array_at(file, A, FIRST_COLUMNS)):
            return None
        adapter = LoraData(name, {}, base=self.base, dtype=self.dtype)
        # Of one recipe are the same modules, shapes, dtypes, scalings and layouts.
        make = functools.partial(_updates, self.places, self.layout, self.runs, file.mapping, file.start)
        deferred(adapter, "updates", Later(make, self))
        return adapter


@paused_collector()
def _updates(
    places: Places, layout: Mapping[str, Place], runs: Runs, mapping: mmap.mmap, start: int
) -> dict[str, Update]:
    tensors, factor = runs.tensors(mapping, start), Factor.of
    return {
        path: Update(factor("B", b, layout[key].shape), factor("A", a, layout[other].shape), scaling, kind)
        for (path, key, other, scaling, kind), b, a in zip(places, tensors[::2], tensors[1::2], strict=True)
    }


_known: OrderedDict[bytes, Recipe] = OrderedDict()
"""The recipes of the adapters that were read last, by their configurations."""


def recipe_of(configuration: bytes) -> Recipe | None:
    """The recipe of the adapter that was read last with this configuration."""
    return _known.get(configuration)


def remember(configuration: bytes, adapter: LoraData, tensors: Mapping[str, Tensor]) -> None:
    """Remembers how an adapter was read, if all that it holds are the stored matrices of its updates, and there was
    nothing to tell of it."""
    names = {id(tensor): key for key, tensor in tensors.items()}
    stored = [(path, u.B.stored, u.A.stored, u) for path, u in adapter.updates.items()]
    found = [(path, names.get(id(b)), names.get(id(a)), u) for path, b, a, u in stored]
    places = [(path, b, a, u.scaling, u.layout) for path, b, a, u in found if b is not None and a is not None]
    if len(configuration) >= LARGEST_KNOWN:
        return
    if adapter.extras or adapter.notes or len(places) < len(found) or 2 * len(places) != len(tensors):
        return
    _known[configuration] = Recipe(signature_of(tensors), tuple(places), adapter.base, adapter.dtype)
    _known.move_to_end(configuration)
    while len(_known) > MOST_KNOWN:
        _known.popitem(last=False)


def signature_of(tensors: Mapping[str, Tensor]) -> Signature:
    """What must be equal for two files to hold adapters of one recipe, beside their configurations."""
    return tuple([(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()])
