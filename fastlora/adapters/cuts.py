"""The decompositions that an extraction is made of. They do not depend on each other: ranks that work together share
them, and what is made of them comes afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.adapters.differences import ParameterChange
from fastlora.engine import shares
from fastlora.engine.low_rank import LowRank, operations
from fastlora.engine.tile_source import TileSource
from fastlora.runtime import ranks
from fastlora.runtime.progress import track

SAMPLED, NUMBERS = 16, 64  # changes of which a few numbers are compared between ranks, and how many


class Cut(NamedTuple):
    """``B [n, r]``, ``A [r, m]`` in float32, the ``Σσ²`` that they keep and that of all."""

    left: Tensor
    right: Tensor
    kept: float
    total: float

    @staticmethod
    def of(found: LowRank) -> Cut:
        """A decomposition as it is kept."""
        return Cut(found.left.float().contiguous(), found.right.float().contiguous(), found.kept, found.total)

    @property
    def turned(self) -> Cut:
        """That of the transpose."""
        return Cut(self.right.mT.contiguous(), self.left.mT.contiguous(), self.kept, self.total)


class Job(NamedTuple):
    """A change to be cut, or one of its ``expert`` matrices; or, if it is not ``cut``, to be measured alone."""

    key: str
    change: ParameterChange
    expert: int | None = None
    cut: bool = True

    @property
    def matrix(self) -> TileSource:
        """What is cut."""
        return self.change.matrix() if self.expert is None else self.change.expert(self.expert)


def computed(
    jobs: Sequence[Job], cut: Callable[[TileSource, str], LowRank], rank: int | None, *, exact: bool
) -> tuple[dict[str, Cut], dict[str, float]]:
    """``{key: cut}`` and ``{key: ‖·‖²}`` of all jobs, each computed by one rank; ``rank``, ``exact``: as ``cut`` has
    them, by which the jobs are balanced."""
    label = "extracting"

    def work() -> dict[str, Cut | float]:
        mine = ranks.own(jobs, [_cost(job, rank, exact=exact) for job in jobs] if ranks.current() else ())
        return {job.key: done(job) for job in track(mine, label)}

    def done(job: Job) -> Cut | float:
        return Cut.of(cut(job.matrix, job.key)) if job.cut else job.change.square()

    found = shares.each(label, work, (), _alike(jobs) if ranks.current() else "")
    cuts = {key: one for key, one in found.items() if isinstance(one, Cut)}
    return cuts, {key: one for key, one in found.items() if not isinstance(one, Cut)}


def compared(tensors: Mapping[str, Sequence[Tensor]], look: Callable[[str], float]) -> dict[str, float]:
    """What ``look`` says of every parameter, each looked at by one rank; ``tensors``: what it reads."""

    def work() -> dict[str, float]:
        sizes = [sum(t.nbytes for t in some) for some in tensors.values()]
        return {name: look(name) for name in ranks.own(list(tensors), sizes)}

    shapes = {name: [tuple(t.shape) for t in some] for name, some in tensors.items()} if ranks.current() else {}
    return shares.each("comparing the models", work, (), repr(shapes))


def _cost(job: Job, rank: int | None, *, exact: bool) -> int:
    shape = job.change.shape
    if job.expert is not None:
        shape = shape[1:]
    n, m = (shape[0], shape[1:].numel()) if len(shape) else (1, 1)
    return operations(n, m, rank, exact=exact) if job.cut else 4 * n * m


def _alike(jobs: Sequence[Job]) -> str:
    """What all ranks have to have alike: names, shapes, and a few numbers of some changes."""
    digest = hashlib.blake2b(repr([(job.key, tuple(job.change.shape)) for job in jobs]).encode(), digest_size=16)
    for job in jobs[:: max(1, len(jobs) // SAMPLED)]:
        matrix = job.matrix
        n, m = matrix.shape
        tile = torch.empty(1, min(m, NUMBERS), dtype=torch.float64)
        matrix.tile(slice(n // 2, n // 2 + 1), slice(0, min(m, NUMBERS)), tile)
        digest.update(bytearray(tile.numpy()))
    return digest.hexdigest()
