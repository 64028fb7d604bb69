"""Gram blocks that were computed before, so that a factor is not read again for the same inner products.

After ``enter(cache)`` every Gram pass of the thread, or of the task, looks its blocks up in the cache:
:class:`fastlora.PoolGram` does that, and whoever reads Gram blocks says in its docstring that they may come from there.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from fastlora.core.factors import source_key
from fastlora.ops.passes import GramJob

MatrixKey = tuple[int, int, tuple[int, ...]]


class GramCache:
    """Gram blocks ``X_iᵀ X_j`` of pairs of held matrices, by the place of the matrices in memory.

    Only blocks of two *held* matrices are kept: what is computed along the way would otherwise fill the memory. Held
    matrices stay alive as long as the cache, so no other matrix can take their place, and must not be changed.
    """

    def __init__(self) -> None:
        self._held: dict[MatrixKey, Tensor] = {}
        self._blocks: dict[tuple[MatrixKey, MatrixKey, bool], Tensor] = {}

    def hold(self, sources: Iterable[Tensor]) -> None:
        """Keeps stored matrices alive; blocks of pairs of them are kept from then on."""
        for source in sources:
            self._held.setdefault(source_key(source), source)

    def run(self, jobs: Sequence[GramJob], launch: Callable[[list[GramJob]], object]) -> None:
        """Fills the blocks of the jobs: known ones are copied, the others computed by ``launch`` and kept."""
        missing, owners = [], []
        for job in jobs:
            keys = [source_key(f) for f in job.factors]
            absent = [b for b in job.blocks if not self._copy(keys[b[0]], keys[b[1]], job.rows, job.block(b))]
            if absent:
                used = sorted({i for i, _, _ in absent} | {j for _, j, _ in absent})
                at = {i: place for place, i in enumerate(used)}
                blocks = [(at[i], at[j], offset) for i, j, offset in absent]
                missing.append(replace(job, factors=[job.factors[i] for i in used], blocks=blocks))
                owners.append([keys[i] for i in used])
        if missing:
            launch(missing)
        for job, keys in zip(missing, owners, strict=True):
            for block in job.blocks:
                first, second = keys[block[0]], keys[block[1]]
                if first in self._held and second in self._held:
                    self._blocks[first, second, job.rows] = job.block(block).clone()

    def _copy(self, first: MatrixKey, second: MatrixKey, rows: bool, out: Tensor) -> bool:
        block = self._blocks.get((first, second, rows))
        if block is None:
            swapped = self._blocks.get((second, first, rows))
            if swapped is None:
                return False
            block = swapped.mT
        out.copy_(block)
        return True


_entered: contextvars.ContextVar[tuple[GramCache, ...]] = contextvars.ContextVar("fastlora_gram_cache", default=())
"""Of this thread or task, the last one in use. No tokens: whoever entered in one thread may leave in another, where
nothing was entered."""


def entered() -> tuple[GramCache, ...]:
    """The caches that this thread (or task) has entered; the last one is in use."""
    return _entered.get()


def enter(cache: GramCache) -> None:
    """From here on, this thread (or task) does not compute Gram blocks again that the cache has."""
    _entered.set((*_entered.get(), cache))


def leave(cache: GramCache) -> None:
    """Takes back the last :func:`enter` of the cache in this thread (or task), if there was one."""
    caches = _entered.get()
    last = max((i for i, other in enumerate(caches) if other is cache), default=None)
    if last is not None:
        _entered.set((*caches[:last], *caches[last + 1 :]))


def run_through_cache(jobs: list[GramJob], launch: Callable[[list[GramJob]], object]) -> None:
    """One Gram pass: ``launch`` gets the jobs, or only what the cache in use does not have."""
    caches = entered()
    if caches:
        caches[-1].run(jobs, launch)
    else:
        launch(jobs)
