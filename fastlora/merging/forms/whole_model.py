"""What a rule on elements needs to know of all modules together: how many elements of each an adapter keeps when it is
trimmed as one vector, and which sign most places have.

The ``q`` largest magnitudes of a whole adapter are all above a threshold ``θ``. It is bracketed by counting, module by
module, how many elements reach a number, and found exactly once few are left between the ends of the bracket.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch

from fastlora.ops import merge_tiles
from fastlora.ops.merge_tiles import Cut, TileOutputs, TileRule, TileTask

Found = TypeVar("Found")


class Visit(Protocol):
    """Goes through the modules: what ``look(name, updates of all adapters)`` gives, in the order of the model."""

    def __call__(self, look: Callable[[str, TileTask], Found]) -> dict[str, Found]: ...


FEW = 64  # candidates that are looked at one by one
TINY = 5e-324
TIGHTENED = 4  # every so many steps the ends of a bracket are moved to elements, and it is halved


@dataclass(slots=True, eq=False)
class _Search:
    """The threshold of one adapter: at least ``q`` elements reach ``low``, fewer reach ``high``; how many of each
    module do."""

    q: int
    low: float = 0.0
    high: float = math.inf
    at_low: dict[str, int] = field(default_factory=dict)
    at_high: dict[str, int] = field(default_factory=dict)
    guesses: list[float] = field(default_factory=list)
    pull: list[float] = field(default_factory=lambda: [1.0, 1.0])
    steps: int = 0

    @property
    def between(self) -> int:
        """How many elements reach ``low`` and not ``high``."""
        return sum(self.at_low.values()) - sum(self.at_high.values())

    @property
    def is_narrow(self) -> bool:
        """Whether few elements are left, or only one number."""
        return self.between <= FEW or self.is_one_number

    @property
    def is_one_number(self) -> bool:
        """Whether ``low`` is the only number in the bracket."""
        return bool(np.nextafter(self.low, math.inf) >= self.high)

    def pivot(self) -> float:
        """A number inside of the bracket, near the threshold: by false position, where one end stays at half of its
        pull (Illinois)."""
        while self.guesses:
            guess = self.guesses.pop()
            if self.low < guess < self.high:
                return guess
        if math.isinf(self.high):
            return 2.0 * self.low
        above = (sum(self.at_low.values()) - self.q + 0.5) * self.pull[0]
        below = (self.q - 0.5 - sum(self.at_high.values())) * self.pull[1]
        found = self.low + (self.high - self.low) * (above / (above + below))
        rounded = _inside(found, self.low, self.high)
        return _middle(self.low, self.high) if rounded is None or self.is_tight else rounded

    @property
    def is_tight(self) -> bool:
        """Whether the ends of the bracket are moved to elements in this step: where many are equal, few numbers are
        left in it."""
        return self.steps % TIGHTENED == 0

    def tighten(self, elements: Sequence[float]) -> None:
        """Takes the least and the largest element of the bracket as its ends; ``elements`` holds both."""
        self.low, self.high = min(elements), float(np.nextafter(max(elements), math.inf))

    def learn(self, number: float, counts: dict[str, int]) -> None:
        """Takes in how many elements of every module reach a number inside of the bracket."""
        reached = sum(counts.values()) >= self.q
        if reached:
            self.low, self.at_low = number, counts
        else:
            self.high, self.at_high = number, counts
        self.pull = [1.0, self.pull[1] / 2] if reached else [self.pull[0] / 2, 1.0]


def _inside(number: float, low: float, high: float) -> float | None:
    """A float32 near the number where there is one inside of ``(low, high)``; the number itself, if it is."""
    for rounded in (float(np.float32(number)), number):
        if low < rounded < high:
            return rounded
    return None


def _middle(low: float, high: float) -> float:
    """The number in the middle of all that float64 has between the two."""
    first, last = (int(np.float64(x).view(np.int64)) for x in (low, high))
    return float(np.int64((first + last) // 2).view(np.float64))


def counts_kept(visit: Visit, adapters: int, density: float, *, all_equals: bool) -> dict[str, list[int]]:
    """How many elements every adapter keeps in every module, when it keeps the ``⌊density·N⌋`` largest magnitudes of
    its ``N`` elements in all of them: ``{module: one number an adapter}``.

    Of equal magnitudes the first are kept, in the order of the modules' names, or all. Cost: about twenty passes over
    all modules, of two updates for each adapter.
    """

    def first(module: str, task: TileTask) -> tuple[int, list[float], list[int]]:
        size = task.shape[0] * task.shape[1]
        ranks = [(i, max(1, round(density * size))) for i in range(adapters)]
        guesses = [cut.magnitude for cut in merge_tiles.select(task, ranks)] if size else []
        return size, guesses, [_reaching(task, i, TINY) for i in range(adapters)]

    sizes: dict[str, int] = {}
    searches = [_Search(0) for _ in range(adapters)]
    for module, (size, guesses, counts) in visit(first).items():
        sizes[module] = size
        for i, search in enumerate(searches):
            search.guesses += guesses[i : i + 1]
            search.at_low[module] = counts[i]
    q = int(density * sum(sizes.values()))
    for search in searches:
        known = [x for x in search.guesses if x > 0]
        search.guesses = [float(np.nextafter(max(known), math.inf)), min(known)] if known else []
        search.q, search.low, search.at_high = q, TINY, dict.fromkeys(sizes, 0)
    # Where all that is not zero stays, no threshold is needed.
    open_ones = [s for s in searches if 0 < q < sum(s.at_low.values())]
    while moving := [s for s in open_ones if not s.is_narrow]:
        for s in moving:
            s.steps += 1
        _tighten(visit, searches, [s for s in moving if s.is_tight])
        moving = [s for s in moving if not s.is_narrow]
        pivots = {i: s.pivot() for i, s in enumerate(searches) if s in moving}
        reached = visit(partial(_all_reaching, pivots)) if pivots else {}
        for i, pivot in pivots.items():
            searches[i].learn(pivot, {module: counts[i] for module, counts in reached.items()})
    kept = [dict(sizes) if q else dict.fromkeys(sizes, 0) for _ in searches]
    last = _candidates(visit, searches, open_ones)
    for i, search in enumerate(searches):
        if search in open_ones:
            kept[i] = _allotted(search, last[i], all_equals)
    return {module: [k[module] for k in kept] for module in sizes}


def _tighten(visit: Visit, searches: Sequence[_Search], some: Sequence[_Search]) -> None:
    """Moves the ends of brackets to elements."""
    if not some:
        return

    def ends(module: str, task: TileTask) -> dict[int, list[float]]:
        found = {}
        for i, s in enumerate(searches):
            if s in some and s.at_low[module] > s.at_high[module]:
                places = [(i, s.at_high[module] + 1), (i, s.at_low[module])]
                found[i] = [cut.magnitude for cut in merge_tiles.select(task, places)]
        return found

    seen = visit(ends)
    for i, s in enumerate(searches):
        if s in some:
            s.tighten([x for found in seen.values() for x in found.get(i, [])])


def _candidates(
    visit: Visit, searches: Sequence[_Search], open_ones: Sequence[_Search]
) -> list[dict[str, list[float]]]:
    """The magnitudes in the brackets, descending, by adapter and module."""
    found: list[dict[str, list[float]]] = [{} for _ in searches]
    if not open_ones:
        return found

    def look(module: str, task: TileTask) -> list[tuple[int, float]]:
        ranks = [
            (i, rank)
            for i, s in enumerate(searches)
            if s in open_ones and not s.is_one_number
            for rank in range(s.at_high[module] + 1, s.at_low[module] + 1)
        ]
        cuts = merge_tiles.select(task, ranks) if ranks else []
        return [(i, cut.magnitude) for (i, _), cut in zip(ranks, cuts, strict=True)]

    for module, magnitudes in visit(look).items():
        for i, magnitude in magnitudes:
            found[i].setdefault(module, []).append(magnitude)
    for i, s in enumerate(searches):
        if s in open_ones and s.is_one_number:
            found[i] = {m: [s.low] * (n - s.at_high[m]) for m, n in s.at_low.items()}
    return found


def _allotted(search: _Search, candidates: dict[str, list[float]], all_equals: bool) -> dict[str, int]:
    """How many elements of every module are kept, given those in the bracket."""
    left = search.q - sum(search.at_high.values())
    threshold = sorted((x for row in candidates.values() for x in row), reverse=True)[left - 1]
    above = {m: n + sum(x > threshold for x in candidates.get(m, [])) for m, n in search.at_high.items()}
    left = search.q - sum(above.values())
    for module in sorted(above):
        equal = candidates.get(module, []).count(threshold)
        taken = equal if all_equals else min(equal, left)
        above[module] += taken
        left -= taken
    return above


def _all_reaching(pivots: Mapping[int, float], module: str, task: TileTask) -> dict[int, int]:
    """:func:`_reaching` for some adapters."""
    return {i: _reaching(task, i, pivot) for i, pivot in pivots.items()}


def _reaching(task: TileTask, adapter: int, number: float) -> int:
    """How many elements of an update have at least this magnitude, above 0: places where it and its negative are kept,
    and cancel."""
    pair, scale = task.pairs[adapter], task.scales[adapter]
    if pair is None or not scale or 0 in task.shape:
        return 0
    both = TileTask([pair, pair], [scale, -scale], task.shape, task.dtype)
    if task.dtype == torch.float32:  # the least float32 that is not below it
        rounded = np.float32(number)
        number = float(rounded if rounded >= number else np.nextafter(rounded, np.float32(math.inf)))
    cut = Cut(number, task.shape[0] * task.shape[1])
    rule = TileRule("magnitude", [cut, cut], elect="total", votes=[1.0, 1.0], gains=[0.0, 0.0])
    return merge_tiles.merge(both, rule, TileOutputs()).undecided
