"""A LoRA of what a fine-tune changed in one weight, against torch's decompositions of the difference."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

import fastlora as fl
from fastlora.bench.contest import OURS, Contest, Task
from fastlora.bench.timing import Contender, thread_counts

LOW, DENSE = "torch.svd_lowrank of the difference", "torch.linalg.svd of the difference"
RANK, PLANTED, EXTRA, ROUNDS = 16, 16, 10, 2
ROWS = 512
WORSE = 1e-4
"""Of the least error among the contenders."""


def extract() -> list[Contest]:
    """The contests of two weights of a 7B model; the dense decomposition of the smaller one, once."""
    return [
        Contest(_what(4096, 4096), (LOW, DENSE), partial(_prepare, 4096, 4096, dense=True)),
        Contest(_what(11008, 4096), (LOW,), partial(_prepare, 11008, 4096, dense=False)),
    ]


def _what(n: int, m: int) -> str:
    return f"extract rank {RANK} of one {n}×{m} weight in bfloat16"


def _prepare(n: int, m: int, *, dense: bool) -> Task:
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(n, m, generator=generator)).bfloat16()
    planted = torch.randn(n, PLANTED, generator=generator) @ torch.randn(PLANTED, m, generator=generator)
    tuned = (base.float() + 0.01 * planted + 0.002 * torch.randn(n, m, generator=generator)).bfloat16()
    ways = {OURS: partial(_ours, base, tuned), LOW: partial(_low, base, tuned)}
    errors = {name: _error(base, tuned, *way()) for name, way in ways.items()}
    if errors[OURS] > (1 + WORSE) * errors[LOW]:
        raise AssertionError(f"the error {errors[OURS]:.6g} is above torch's {errors[LOW]:.6g}; it is not timed")
    contenders = {name: Contender(way, thread_counts()) for name, way in ways.items()}
    if dense:
        contenders[DENSE] = Contender(partial(_dense, base, tuned), thread_counts()[-1:], rounds=1)
    return Task(contenders, 4 * base.nbytes + tuned.nbytes * 4, note=f"{DENSE}: run once")


def _ours(base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
    update = fl.extract({"q.weight": base}, {"q.weight": tuned}, rank=RANK).updates["q"]
    return update.B.terms[0].source, update.A.terms[0].source


def _low(base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
    left, sigma, right = torch.svd_lowrank(tuned.float() - base.float(), q=RANK + EXTRA, niter=ROUNDS)
    root = sigma[:RANK].sqrt()
    return left[:, :RANK] * root, (right[:, :RANK] * root).mT


def _dense(base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
    left, sigma, right = torch.linalg.svd(tuned.float() - base.float(), full_matrices=False)
    root = sigma[:RANK].sqrt()
    return left[:, :RANK] * root, root[:, None] * right[:RANK]


def _error(base: Tensor, tuned: Tensor, left: Tensor, right: Tensor) -> float:
    """``‖ΔW − B A‖``, by blocks of rows in float64."""
    squares = 0.0
    for first in range(0, len(base), ROWS):
        rows = slice(first, first + ROWS)
        delta = tuned[rows].double() - base[rows].double()
        squares += float((delta - left[rows].double() @ right.double()).square().sum())
    return math.sqrt(squares)
