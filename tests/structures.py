"""Updates of every structure beside each other: stored matrices, lazy sums, parts of decompositions, and empty ones."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from builders import gaussian
from torch import Tensor

import fastlora as fl
from fastlora.core.factors import Factor
from fastlora.core.updates import Update, with_rank_zero
from fastlora.engine.materialise import materialise

N, M = 26, 22
MODULES = [f"model.layers.{i}.q_proj" for i in range(5)]


def stored(seed: int, rank: int = 2, scaling: float = 1.0) -> Update:
    """Two adapters of one hundred have a direction nearly in common, so that there is something to share."""
    near = gaussian(N, 1, seed=seed // 100) + 0.05 * gaussian(N, 1, seed=seed + 1)
    B = torch.cat([near, gaussian(N, rank, seed=seed + 2)[:, 1:]], 1)
    return Update(Factor.of("B", B), Factor.of("A", gaussian(rank, M, seed=seed + 3)), scaling)


def adapter(name: str, update: Update) -> fl.Adapter:
    return fl.Adapter(name, {"m": update})


def total(*terms: tuple[float, Update]) -> Update:
    return fl.Adapter.weighted_sum([(w, adapter(f"x{i}", u)) for i, (w, u) in enumerate(terms)]).updates["m"]


def unique(seed: int) -> Update:
    pool = fl.Pool([adapter("x", stored(seed)), adapter("y", stored(seed + 10))])
    return fl.decompose(pool, 0.5).unique_of("x").updates["m"]


def all_shared(seed: int) -> Update:
    """What is left of an update when all of it is shared: the rounding of what it was computed from."""
    pool = fl.Pool([adapter("x", stored(seed)), adapter("y", stored(seed))])
    return fl.decompose(pool, 0.5).unique_of("x").updates["m"]


def shared(seed: int) -> Update:
    pool = fl.Pool([adapter("x", stored(seed)), adapter("y", stored(seed + 10))])
    return fl.decompose(pool, 0.5).shared.updates["m"]


def nothing_shared(seed: int) -> Update:
    pool = fl.Pool([adapter("x", stored(seed)), adapter("y", stored(seed + 5050))])
    return fl.decompose(pool, 0.9).shared.updates["m"]


def zero_of(seed: int) -> Update:
    update = stored(seed)
    return total((1.0, update), (-1.0, update))


STRUCTURES: dict[str, Callable[[int], Update]] = {
    "stored": stored,
    "scaled": lambda s: stored(s, 3, -2.0),
    "sum of two": lambda s: total((1.0, stored(s)), (0.5, stored(s + 20))),
    "sum of three": lambda s: total((1.0, stored(s)), (-0.5, stored(s + 20, 1)), (2.0, stored(s + 30))),
    "sum with nothing": lambda s: total((1.0, stored(s)), (1.0, nothing_shared(s))),
    "unique": unique,
    "shared": shared,
    "compressed": lambda s: adapter("x", total((1.0, stored(s)), (1.0, stored(s + 20)))).compress(2).updates["m"],
    "nothing shared": nothing_shared,
    "all shared": all_shared,
    "a - a": zero_of,
    "rank 0": lambda s: with_rank_zero(stored(s)),
    "zeros": lambda s: Update(Factor.of("B", torch.zeros(N, 2)), stored(s).A),
    "weight 0": lambda s: total((0.0, stored(s))),
    "no columns": lambda s: Update(Factor.of("B", torch.zeros(N, 0)), Factor.of("A", torch.zeros(0, M))),
}
NOTHING = 1e-7  # updates here have norms of 1 to 30
EMPTY = {"nothing shared", "all shared", "a - a", "rank 0", "zeros", "weight 0", "no columns"}


def as_stored(update: Update) -> Update:
    """The same update as two stored matrices, with what is known about its noise; nothing where only rounding is."""
    if not update.rank or float(delta(update).norm()) < NOTHING:
        return with_rank_zero(update)
    B, A = materialise([update.baked()], torch.float64)[0]
    return Update(Factor.of("B", B), Factor.of("A", A), 1.0, update.layout, update.noise)


def delta(update: Update) -> Tensor:
    B, A = materialise([update.baked()], torch.float64)[0]
    return B @ A


Mix = list[dict[str, Update]]
"""Of every adapter, its updates by module."""


def random_mix(seed: int) -> tuple[list[list[str]], Mix]:
    """Two to four adapters of five modules, every update of a structure that is drawn."""
    draw = random.Random(seed)
    k = draw.randint(2, 4)
    kinds = [[draw.choice(list(STRUCTURES)) for _ in range(k)] for _ in MODULES]
    kinds[0] = draw.choice([["sum of two", "rank 0"], ["rank 0", "sum of two", "stored"][: max(2, k)]])[:k]
    kinds[0] += ["rank 0"] * (k - len(kinds[0]))
    kinds[1] = draw.sample(kinds[0], k)
    mix: Mix = [{} for _ in range(k)]
    for g, module in enumerate(MODULES):
        for i, kind in enumerate(kinds[g]):
            mix[i][module] = STRUCTURES[kind](1000 * (seed + 1) + 100 * g + 40 * (i % 2) + i)
    return kinds, mix


def pool_of(mix: Mix) -> fl.Pool:
    return fl.Pool(fl.Adapter(f"a{i}", updates) for i, updates in enumerate(mix))
