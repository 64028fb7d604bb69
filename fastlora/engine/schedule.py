"""Which modules are computed together: grouped by what adapters they have in which shapes, and cut into parts that fit
in memory. No result depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastlora.core.data import LoraData
from fastlora.core.updates import EPSILON, MIN_RTOL, Update, default_rtol, sources
from fastlora.engine.contracts import PoolView
from fastlora.engine.stream import PoolPart, Stream
from fastlora.engine.stream import parts as moved_ahead
from fastlora.runtime import ranks
from fastlora.runtime.memory import batch_bytes, is_bounded
from fastlora.runtime.progress import track

# Modules computed at once: their Gram blocks and coefficients are what is in memory besides the factors.
PART_BYTES = 256 * 2**20

RtolOf = Callable[[Update], float]
"""The noise floor of an update, relative to its largest singular value."""


class Group(NamedTuple):
    """What the modules of one launch have in common: the adapters (their positions in the pool), the ranks, and the
    noise floors where those count."""

    members: tuple[int, ...]
    ranks: tuple[int, ...]
    rtols: tuple[float, ...] = ()

    @property
    def rank(self) -> int:
        """What small matrices are padded to, never 0."""
        return max((1, *self.ranks))

    @property
    def rtol(self) -> float:
        """One noise floor for a chain: that of the coarsest member."""
        return max(self.rtols)

    @property
    def pair_bytes(self) -> int:
        """Of one float64 matrix ``[r, r]`` for every two of the adapters."""
        return 8 * len(self.members) ** 2 * self.rank**2


@dataclass(frozen=True, slots=True)
class GroupPart:
    """Modules of one group that are computed together. ``source`` has their factors: the pool, or its copy on the
    device of a stream."""

    group: Group
    modules: list[str]
    source: PoolView

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters."""
        return tuple(self.source.names[i] for i in self.group.members)

    def updates(self) -> list[list[Update]]:
        """Of every module, that of every adapter: ``[g][k]``."""
        adapters = [self.source.adapters[i].updates for i in self.group.members]
        return [[updates[module] for updates in adapters] for module in self.modules]


def rtol_or_default(rtol: float | None) -> RtolOf:
    """``rtol`` for every update; ``None``: the rounding of its stored dtype."""
    return _default_rtol if rtol is None else (lambda _: rtol)


def _default_rtol(update: Update) -> float:
    """:func:`fastlora.core.updates.default_rtol` of one, at once where both factors are stored."""
    B, A = update.B.stored, update.A.stored
    if B is None or A is None:
        return default_rtol([update])
    left, right = EPSILON[B.dtype], EPSILON[A.dtype]
    largest = left if left > right else right
    return largest if largest > MIN_RTOL else MIN_RTOL


def one_adapter(name: str, updates: Mapping[str, Update]) -> PoolView:
    """The updates of a single adapter, to be computed in parts."""
    return PoolPart([name], [LoraData(name, updates)], list(updates))


def whole_groups(pool: PoolView, *, rtol_of: RtolOf | None = None, least: int = 1) -> list[GroupPart]:
    """The modules that ``least`` adapters or more have, a part for every group, whatever its size.

    ``rtol_of``: keeps modules with other noise floors apart.
    """
    adapters = [a.updates for a in pool.adapters]
    groups: dict[tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]], list[str]] = {}
    for module in pool.modules:
        members = tuple(pool.present(module))
        if len(members) < least:
            continue
        updates = [adapters[i][module] for i in members]
        rtols = () if rtol_of is None else tuple([rtol_of(u) for u in updates])
        groups.setdefault((members, tuple([u.B.rank for u in updates]), rtols), []).append(module)
    return [GroupPart(Group(*kind), modules, pool) for kind, modules in groups.items()]


def parts(
    pool: PoolView,
    label: str,
    *,
    rtol_of: RtolOf | None = None,
    least: int = 1,
    matrices: float = 4,
    most: int = PART_BYTES,
    stream: Stream | None = None,
    shared: bool = False,
) -> Iterator[GroupPart]:
    """The parts of :func:`whole_groups`, in parts that fit in memory.

    ``label``: what progress says. ``matrices``: how many float64 ``[r, r]`` a module takes for every two of its
    adapters; with a bound on memory its factors count too. ``most``: bytes of a part, where no ``stream`` brings the
    factors to its device, part by part. ``shared``: where several ranks work together, only this one's modules: inside
    :func:`fastlora.engine.shares.each`.
    """
    work: list[GroupPart] = []
    most = most if stream is None else stream.group
    groups = whole_groups(pool, rtol_of=rtol_of, least=least)
    for whole in own_modules(groups, matrices) if shared else groups:
        sizes = [int(matrices * whole.group.pair_bytes)] * len(whole.modules)
        if is_bounded() or stream is not None:
            stored = (sum(s.nbytes for s in sources(row)) for row in whole.updates())
            sizes = [small + factors for small, factors in zip(sizes, stored, strict=True)]
        for piece in split_to_fit(sizes, most):
            work.append(GroupPart(whole.group, [whole.modules[i] for i in piece], pool))
    if stream is None:
        return track(work, label)
    moving = moved_ahead(pool.names, pool.adapters, [part.modules for part in work])
    return (GroupPart(p.group, p.modules, there) for p, there in zip(track(work, label), moving, strict=True))


def own_modules(groups: Sequence[GroupPart], matrices: float) -> list[GroupPart]:
    """The modules of groups that are this rank's, balanced by the bytes of their factors and small matrices; all of
    them where one process does all."""
    if ranks.current() is None:
        return list(groups)
    every = [(i, m) for i, whole in enumerate(groups) for m in range(len(whole.modules))]
    sizes = [
        int(matrices * whole.group.pair_bytes) + sum(s.nbytes for s in sources(row))
        for whole in groups
        for row in whole.updates()
    ]
    mine: dict[int, list[str]] = {}
    for i, m in ranks.own(every, sizes):
        mine.setdefault(i, []).append(groups[i].modules[m])
    return [GroupPart(groups[i].group, modules, groups[i].source) for i, modules in mine.items()]


def pair_parts(group: Group, bytes_each: int) -> Iterator[tuple[Group, list[tuple[int, int]]]]:
    """Every two adapters of a group by their places in it, those of the same ranks and noise floors together, cut into
    parts that fit in memory. ``bytes_each``: of one pair, for every element of a matrix ``[r, r]``."""
    alike: dict[Group, list[tuple[int, int]]] = {}
    for i in range(len(group.members)):
        for j in range(i + 1, len(group.members)):
            of_two = Group((0, 1), (group.ranks[i], group.ranks[j]), (group.rtols[i], group.rtols[j]))
            alike.setdefault(of_two, []).append((i, j))
    for of_two, pairs in alike.items():
        for piece in split_to_fit([bytes_each * of_two.rank**2] * len(pairs)):
            yield of_two, [pairs[p] for p in piece]


def split_to_fit(sizes: Sequence[int], most: int = PART_BYTES) -> list[range]:
    """Neighbours whose ``sizes`` in bytes fit in memory together; what is larger than all the room is alone."""
    limit = batch_bytes(most)
    ranges, start, used = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and used + size > limit:
            ranges.append(range(start, i))
            start, used = i, 0
        used += size
    return [*ranges, range(start, len(sizes))] if sizes else []
