"""Sums of adapters that were asked for before: with other weights they are written again in half the time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastlora.adapters.loading import Element
from fastlora.adapters.lora import Adapter
from fastlora.adapters.repeated_sum import RepeatedSum
from fastlora.expressions.compose import restated
from fastlora.integrations.serving.requests import Stamp

MOST_SUMS = 16
MOST_BYTES = 256 * 2**20
"""Of what is kept of all of them; their adapters are mapped files."""


@dataclass(frozen=True, slots=True, eq=False)
class KeptSum:
    """A sum of the adapters ``stamps`` names, in their order, while their files stay as they are. ``mix``: it, with
    some weights and at its full rank."""

    stamps: Mapping[str, Stamp]
    mix: Adapter
    repeated: RepeatedSum

    @classmethod
    def of(
        cls,
        mix: Adapter,
        elements: Mapping[str, Element],
        weights: Mapping[str, float],
        stamps: Mapping[str, Stamp],
        most_rank: int,
        *,
        uniform_rank: bool,
    ) -> KeptSum | None:
        """The sum ``mix`` of some elements with ``weights``; ``None`` where it cannot be written again."""
        adapters = [element for name in weights if isinstance(element := elements[name], Adapter)]
        if len(adapters) < len(weights):
            return None
        repeated = RepeatedSum.of(mix, adapters, list(weights.values()), most_rank, uniform_rank or None)
        return None if repeated is None else cls({name: stamps[name] for name in weights}, mix, repeated)

    def at(self, text: str, weights: Mapping[str, float]) -> Adapter | None:
        """What the expression ``text`` stands for, cut; ``None`` where it is made in another way."""
        return self.repeated.at(restated(self.mix, text, weights), list(weights.values()))

    def write(self, result: Adapter, weights: Mapping[str, float], folder: Path) -> list[str]:
        """Writes what :meth:`at` returned last; returns what is worth telling."""
        return self.repeated.write(result, list(weights.values()), folder)


class KeptSums:
    """The sums that were written last. One thread at a time uses them."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], KeptSum] = {}  # the ones used last at the end

    def take(self, names: Iterable[str], known: Mapping[str, Stamp]) -> KeptSum | None:
        """The sum of these adapters, if their files are still the same; it is kept no longer, so that what fails with
        it is begun anew."""
        kept = self._sums.pop(tuple(names), None)
        return kept if kept is not None and all(known[n] == stamp for n, stamp in kept.stamps.items()) else None

    def put(self, kept: KeptSum) -> None:
        """Keeps a sum, and drops those that were not used for longest where they are too many or too large."""
        self._sums[tuple(kept.stamps)] = kept
        while len(self._sums) > MOST_SUMS or sum(k.repeated.nbytes for k in self._sums.values()) > MOST_BYTES:
            del self._sums[next(iter(self._sums))]

    def forget(self, name: str) -> None:
        """Drops what is made of an adapter that is no longer as it was: its files would stay on the disk."""
        self._sums = {names: kept for names, kept in self._sums.items() if name not in names}
