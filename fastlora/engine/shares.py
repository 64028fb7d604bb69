"""Work on modules that several ranks share: each computes its own, and all get every result.

The contract for whatever walks over parts that do not depend on each other: *these are all of them, with their bytes;
give me mine.* Three steps, and none changes anything where one process does all:

1. ``ranks.own(items, sizes)``, or ``parts(…, shared=True)`` for the modules of a pool, gives a rank its items.
2. ``each(what, work, adapters)`` runs ``work`` on every rank, raises the error of one on all, and returns everybody's
   results by name. Results travel; stored matrices of ``adapters`` inside them do not.
3. What is added up over modules is added up afterwards, in the order of one process, so that it has the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastlora.core.data import LoraData
from fastlora.core.updates import sources
from fastlora.engine.contracts import PoolView
from fastlora.runtime import ranks

Key = TypeVar("Key")
Value = TypeVar("Value")

# Stored matrices of an adapter of which a few numbers are compared between ranks, and how many.
SAMPLED, NUMBERS = 32, 64


def each(
    what: str, work: Callable[[], Mapping[Key, Value]], adapters: Sequence[LoraData], alike: str = ""
) -> dict[Key, Value]:
    """Everybody's results of ``work``, which gives those of the own items by name; in no order that counts.

    ``what``: names the work in errors. ``adapters``: what the results are made of; ranks that read others are refused.
    ``alike``: says what else they have to have alike.
    """
    if ranks.current() is None:
        return dict(work())
    known = list(_stored(adapters))
    results: dict[Key, Value] = {}
    for some in ranks.gathered(what, work, known, alike + _digest(adapters, known)):
        results |= some
    return results


def own_of_pool(pool: PoolView) -> list[str]:
    """The modules of a pool that are this rank's, balanced by ``n·m`` and the adapters that have them; all of them
    where one process does all."""
    sizes = []
    for module in pool.modules if ranks.current() is not None else ():
        present = pool.present(module)
        n, m = pool.adapters[present[0]].updates[module].shape
        sizes.append(n * m * len(present))
    return ranks.own(pool.modules, sizes)


def _stored(adapters: Sequence[LoraData]) -> Iterator[Tensor]:
    for adapter in adapters:
        yield from sources(adapter.updates.values())


def _digest(adapters: Sequence[LoraData], known: Sequence[Tensor]) -> str:
    """Of what the adapters are: names, shapes, scalings, and a sample of their numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for adapter in adapters:
        facts = [(m, u.shape, u.rank, u.scaling) for m, u in adapter.updates.items()]
        digest.update(repr((adapter.name, facts)).encode())
    step = max(1, len(known) // (SAMPLED * max(1, len(adapters))))
    for tensor in known[::step]:
        sample = tensor.reshape(-1) if tensor.is_contiguous() else tensor[0]
        middle = len(sample) // 2
        numbers = sample[middle : middle + NUMBERS].detach().cpu().contiguous()
        digest.update(bytearray(numbers.view(torch.uint8).numpy()))
    return digest.hexdigest()
