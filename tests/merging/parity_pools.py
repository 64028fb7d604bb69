"""The pools that merge methods are tried on, of every kind, as adapters and as dense matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mixed
import pools
import test_inputs
import torch
from builders import gaussian
from torch import Tensor

import fastlora as fl
from fastlora.merging.input_rows import Statistics


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """A pool with weights, as dense matrices. ``deltas``: the ``ΔW_i [k, n, m]`` by module, without weights.
    ``noise``: by module, the relative size of singular values that are not significant."""

    pool: fl.Pool
    weights: dict[str, float]
    data: Statistics | None
    noise: dict[str, float]

    @property
    def column(self) -> Tensor:
        return torch.tensor([self.weights[n] for n in self.pool.names], dtype=torch.float64)

    def deltas(self, module: str) -> Tensor:
        return mixed.dense(self.pool, module)

    def weighted(self, module: str) -> Tensor:
        return mixed.dense(self.pool, module, self.weights)

    @property
    def chosen(self) -> list[int]:
        """The adapters whose weight is not 0."""
        return self.column.nonzero().flatten().tolist()

    @property
    def names(self) -> list[str]:
        """Those of :attr:`chosen`."""
        return [self.pool.names[i] for i in self.chosen]


SHAPES = {"q": (14, 11), "up": (9, 17)}
NEGATIVE = (0.5, -1.0, 2.0)
Parts = dict[str, pools.Part]


def random_parts(alike: bool, dtype: torch.dtype = torch.float64) -> list[Parts]:
    """Three adapters of two modules, of ragged ranks and scalings, or ``alike``."""
    ranks, scalings = ((3, 3, 3), (0.5,) * 3) if alike else ((2, 4, 3), (1.0, 0.5, -2.0))
    return [
        {
            module: (
                gaussian(n, ranks[i], seed=40 + 10 * i + j, dtype=dtype),
                gaussian(ranks[i], m, seed=70 + 10 * i + j, dtype=dtype) + 0.2,
                scalings[i],
            )
            for j, (module, (n, m)) in enumerate(SHAPES.items())
        }
        for i in range(3)
    ]


def deficient(alike: bool) -> list[Parts]:
    """Repeated columns of ``B`` in one adapter, repeated rows of ``A`` in another, exact in any dtype."""
    parts = random_parts(alike, torch.float32)
    for B, _, _ in parts[0].values():
        B[:, -1] = -2 * B[:, 0]
    for _, A, _ in parts[1].values():
        A[-1] = A[0]
    return parts


def zero(alike: bool) -> list[Parts]:
    """The second adapter as PEFT initialises it."""
    parts = random_parts(alike, torch.float32)
    parts[1] = {m: (torch.zeros_like(B), A, s) for m, (B, A, s) in parts[1].items()}
    return parts


def duplicate(alike: bool) -> list[Parts]:
    parts = random_parts(alike, torch.float32)
    return [parts[0], parts[0], parts[2]]


def missing(alike: bool) -> list[Parts]:
    """Modules that one of three lacks."""
    parts = random_parts(alike, torch.float32)
    return [parts[0], {"q": parts[1]["q"]}, {"up": parts[2]["up"]}]


def planted(alike: bool) -> list[Parts]:
    return [{pools.MODULE: part} for part in pools.cast(pools.planted(3), torch.float32)]


def pool_of(parts: Sequence[Parts]) -> fl.Pool:
    return fl.Pool(pools.make_adapter(f"a{i}", own) for i, own in enumerate(parts))


Kind = Callable[[bool], tuple[fl.Pool, Sequence[float]]]
KINDS: dict[str, Kind] = {
    "random float64": lambda alike: (pool_of(random_parts(alike)), (1.0, 1.0, 1.0)),
    "random float32, negative weights": lambda alike: (pool_of(random_parts(alike, torch.float32)), NEGATIVE),
    "random bfloat16": lambda alike: (pool_of(random_parts(alike, torch.bfloat16)), NEGATIVE),
    "planted float32": lambda alike: (pool_of(planted(alike)), (1.0, 0.5, 0.8)),
    "rank-deficient": lambda alike: (pool_of(deficient(alike)), NEGATIVE),
    "zero": lambda alike: (pool_of(zero(alike)), NEGATIVE),
    "duplicate": lambda alike: (pool_of(duplicate(alike)), NEGATIVE),
    "missing modules": lambda alike: (pool_of(missing(alike)), NEGATIVE),
    "everything": lambda alike: (mixed.mixed_pool(), list(mixed.WEIGHTS.values())),
    "everything bfloat16": lambda alike: (mixed.mixed_pool(dtype=torch.bfloat16), list(mixed.WEIGHTS.values())),
}
"""Pools and weights. With ``alike`` all ranks and scalings are the same, where that can be."""

ALIKE = ("pem",)
OF_TWO = ("slerp",)
REFUSED: dict[tuple[str, str], str] = {
    ("pem", "missing modules"): "the paper adds stored factors, one by one",
    ("pem", "everything"): "the paper adds stored factors of one rank",
    ("pem", "everything bfloat16"): "the paper adds stored factors of one rank",
    ("slerp", "everything"): "there is a way between two adapters alone",
    ("slerp", "everything bfloat16"): "there is a way between two adapters alone",
}
"""Methods that refuse a kind of pool, and why."""


def given_of(method: str, kind: str) -> Given:
    pool, weights = KINDS[kind](method in ALIKE)
    if method in OF_TWO and (method, kind) not in REFUSED:
        pool, weights = pool.subset(pool.names[:2]), weights[:2]
    noise = {}
    for module in pool.modules:
        present = [d for a in pool.adapters if module in a for d in a.updates[module].dtypes()]
        noise[module] = mixed.noise(present)
    data = test_inputs.statistics(pool) if fl.methods()[method].takes_data else None
    return Given(pool, dict(zip(pool.names, weights, strict=True)), data, noise)
