"""Which modules are computed together: grouped by shape, cut into parts that fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from fastlora.core.updates import default_rtol, sources
from fastlora.engine.contracts import PoolView
from fastlora.engine.stream import current as streaming
from fastlora.engine.stream import parts as stream_parts
from fastlora.runtime.memory import batch_bytes, is_bounded
from fastlora.runtime.progress import track

# Modules computed at once: their Gram blocks and coefficients are what is in memory besides the factors.
CHUNK_BYTES = 256 * 2**20


def chunks(count: int, bytes_each: int, most: int = CHUNK_BYTES) -> Iterable[range]:
    """Ranges of modules that fit in memory together. Results do not depend on the split."""
    size = max(1, batch_bytes(most) // max(bytes_each, 1))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class Group(NamedTuple):
    """Modules that are computed in one launch: same adapters, ranks and noise floor."""

    members: tuple[int, ...]
    ranks: tuple[int, ...]
    rtols: tuple[float, ...]

    @property
    def rtol(self) -> float:
        """One noise floor for a chain: that of the coarsest member."""
        return max(self.rtols)


def group_modules(pool: PoolView, modules: Sequence[str], rtol: float | None) -> dict[Group, list[str]]:
    """Modules with at least two adapters, by :class:`Group`."""
    groups: dict[Group, list[str]] = {}
    for module in modules:
        members = tuple(pool.present(module))
        if len(members) < 2:
            continue
        updates = [pool.adapters[i].updates[module] for i in members]
        ranks = tuple(u.rank for u in updates)
        cuts = tuple(default_rtol([u]) if rtol is None else rtol for u in updates)
        groups.setdefault(Group(members, ranks, cuts), []).append(module)
    return groups


def module_parts(pool: PoolView, rtol: float | None, label: str) -> Iterator[tuple[PoolView, Group, list[str]]]:
    """Modules that are computed together, and where their factors are: in the pool, or on the device of a stream."""
    work: list[tuple[Group, list[str]]] = []
    stream = streaming()
    for group, members in group_modules(pool, pool.modules, rtol).items():
        k, r = len(group.members), max(1, *group.ranks)
        size = 8 * 4 * k * k * r * r
        if is_bounded() or stream is not None:
            updates = (pool.adapters[i].updates[m] for m in members for i in group.members)
            size += sum(s.nbytes for s in sources(updates)) // len(members)
        for part in chunks(len(members), size, CHUNK_BYTES if stream is None else stream.group):
            work.append((group, [members[i] for i in part]))
    if stream is None:
        return ((pool, group, part) for group, part in track(work, label))
    moving = stream_parts(pool.names, pool.adapters, [part for _, part in work])
    return ((own, group, part) for (group, part), own in zip(track(work, label), moving, strict=True))
