"""The two halves of a plan's modules: on a device the small matrices of one are computed while the factors of the
other are read, or its results are written.

    the stream:      gram 1,  gram 2,           combine 1 (after chain 1),  combine 2 (after chain 2)
    its own stream:           chain 1 (gram 1), chain 2 (gram 2)

A chain is a row of dependent steps that leaves most of a device idle, and the passes over the factors want little but
its memory. So chains run on a stream of their own, which goes before the other. Results do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastlora.core.updates import sources
from fastlora.decomposition.planned import PlannedPart
from fastlora.engine.schedule import GroupPart
from fastlora.ops.dispatch import Launches

WORTH = 2**26
"""Bytes of factors from which on a pass takes longer than the launches that halves have more."""


def in_halves(groups: Sequence[GroupPart], least: int) -> list[list[GroupPart]]:
    """The modules of every group in two halves of about the same bytes, in order; all in one below ``least`` bytes."""
    sizes = [[sum(s.nbytes for s in sources(row)) for row in group.updates()] for group in groups]
    half = sum(map(sum, sizes)) / 2
    if 2 * half < least:
        return [list(groups)]
    halves: list[list[GroupPart]] = [[], []]
    before = 0
    for group, own in zip(groups, sizes, strict=True):
        cut = 0
        while cut < len(own) and before + own[cut] / 2 <= half:
            before += own[cut]
            cut += 1
        for modules, there in zip((group.modules[:cut], group.modules[cut:]), halves, strict=True):
            if modules:
                there.append(GroupPart(group.group, modules, group.source))
    return [there for there in halves if there] or [list(groups)]


class PlannedHalf(NamedTuple):
    """Modules whose factors are read together: the passes over these, and the small matrices between them."""

    gram: Launches
    parts: list[PlannedPart]
    combine: Launches

    def run_parts(self) -> None:
        """Fills the small matrices from the Gram blocks."""
        for part in self.parts:
            part.run()


@dataclass(frozen=True, slots=True)
class InTurn:
    """Passes one after another."""

    passes: tuple[Any, ...]

    @property
    def launches(self) -> tuple[Any, ...]:
        """Those of a backend that lists them."""
        return tuple([launch for prepared in self.passes for launch in getattr(prepared, "launches", ())])

    def run(self) -> None:
        for prepared in self.passes:
            prepared.run()


def run_in_turn(halves: Sequence[PlannedHalf]) -> None:
    """Every half on the current stream."""
    for half in halves:
        half.gram.run()
        half.run_parts()
        half.combine.run()


def run_beside(first: PlannedHalf, second: PlannedHalf, side: torch.cuda.Stream) -> None:
    """Both halves on the current stream, and their small matrices on ``side``; the current stream waits for all."""
    main = torch.cuda.current_stream(side.device)
    first.gram.run()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        first.run_parts()
        first_is_known = side.record_event()
    second.gram.run()
    side.wait_stream(main)  # for the second's blocks alone, as nothing else follows them yet
    with torch.cuda.stream(side):
        second.run_parts()
    main.wait_event(first_is_known)
    first.combine.run()
    main.wait_stream(side)
    second.combine.run()
