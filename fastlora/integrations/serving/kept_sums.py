"""Sums that were asked for before: with other weights they are written again in a third of the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastlora.adapters.lora import Adapter
from fastlora.adapters.repeated_sum import RepeatedSum
from fastlora.core.vector_space import VectorSpace
from fastlora.expressions.compose import restated
from fastlora.integrations.serving.requests import Stamp

MOST_SUMS = 16
MOST_BYTES = 256 * 2**20
"""Of what is kept of all of them; their adapters are mapped files."""

Weights = Mapping[object, float]
"""Of what is added up: :func:`fastlora.expressions.sums.term_weights`."""


@dataclass(frozen=True, slots=True, eq=False)
class KeptSum:
    """A sum of the terms ``adds``, adapters and results of functions, while the files that ``stamps`` are of stay as
    they are. ``mix``: it, with some weights and at its full rank."""

    adds: tuple[object, ...]
    stamps: Mapping[str, Stamp]
    mix: Adapter
    repeated: RepeatedSum

    @classmethod
    def of(
        cls,
        mix: Adapter,
        terms: Sequence[tuple[float, VectorSpace]],
        weights: Weights,
        stamps: Mapping[str, Stamp],
        most_rank: int,
        *,
        uniform_rank: bool,
    ) -> KeptSum | None:
        """The sum ``mix`` of ``terms`` with ``weights``; ``None`` where it cannot be written again."""
        adapters = [(w, a) for w, a in terms if isinstance(a, Adapter)]
        if [w for w, _ in adapters] != list(weights.values()):
            return None
        repeated = RepeatedSum.of(mix, adapters, most_rank, uniform_rank or None)
        return None if repeated is None else cls(tuple(weights), dict(stamps), mix, repeated)

    def at(self, text: str, weights: Weights) -> Adapter | None:
        """What the expression ``text`` stands for, cut; ``None`` where it is made in another way."""
        own = list(weights.values())
        return self.repeated.at(restated(self.mix, text, own), own)

    def write(self, result: Adapter, weights: Weights, folder: Path) -> list[str]:
        """Writes what :meth:`at` returned last; returns what is worth telling."""
        return self.repeated.write(result, list(weights.values()), folder)


class KeptSums:
    """The sums that were written last. One thread at a time uses them."""

    def __init__(self) -> None:
        self._sums: dict[tuple[object, ...], KeptSum] = {}  # the ones used last at the end

    def take(self, weights: Weights, known: Mapping[str, Stamp]) -> KeptSum | None:
        """The sum of these terms, if all files are still the same; it is kept no longer, so that what fails with it is
        begun anew."""
        kept = self._sums.pop(tuple(weights), None)
        return kept if kept is not None and kept.stamps == known else None

    def put(self, kept: KeptSum) -> None:
        """Keeps a sum, and drops those that were not used for longest where they are too many or too large."""
        self._sums[kept.adds] = kept
        while len(self._sums) > MOST_SUMS or sum(k.repeated.nbytes for k in self._sums.values()) > MOST_BYTES:
            del self._sums[next(iter(self._sums))]

    def forget(self, name: str) -> None:
        """Drops what is made of an adapter that is no longer as it was: its files would stay on the disk."""
        self._sums = {adds: kept for adds, kept in self._sums.items() if name not in kept.stamps}
