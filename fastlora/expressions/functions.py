"""The functions of the expression language: what they take, and what they do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from fastlora.adapters.pool import Pool, require_updates
from fastlora.core.vector_space import VectorSpace
from fastlora.decomposition.decompose import decompose
from fastlora.errors import InputError
from fastlora.merging import arithmetic
from fastlora.merging.compress import compress

Options = dict[str, Any]
MANY = 1 << 20


class Placement(NamedTuple):
    """Where functions compute and within what memory, as :func:`fastlora.decompose` takes both."""

    device: torch.device | None
    memory: int | None


Computation = Callable[[Sequence[VectorSpace], Sequence[float], Options, Placement], VectorSpace]


class Word:
    """The type of an option that is a word."""


class NumberOrWord:
    """The type of an option that is a number, or a word for what is none."""


@dataclass(frozen=True, slots=True)
class Function:
    """One function.

    ``adapters``: how many it takes, at least and at most, without the one before a bar. ``numbers``: how many numbers
    may follow, given the number of adapters. ``needs_names``: the adapters make a pool, where names differ.
    """

    usage: str
    run: Computation
    adapters: tuple[int, int]
    numbers: Callable[[int], Collection[int]] = lambda adapters: (0,)
    options: Mapping[str, type] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    has_target: bool = False
    needs_names: bool = False


CUTS = {
    "threshold": NumberOrWord, "chain": Word, "side": Word, "rank": int, "energy": float, "rtol": float,
    "weighting": Word, "rho": float,
}  # fmt: skip
CUT_WORDS = {"chain": "product", "side": "left", "weighting": "energy"}
SEMANTICS = {"semantics": Word}


def _pool(elements: Sequence[VectorSpace], what: str) -> Pool:
    return Pool([require_updates(e, what) for e in elements], align=False)


def _unique(
    elements: Sequence[VectorSpace], numbers: Sequence[float], options: Options, where: Placement
) -> VectorSpace:
    pool = _pool(elements, "unique")
    target, *others = pool.names
    parts = decompose(
        pool, mode="iterative", target=target, order=others, memory=where.memory, device=where.device, **options
    )
    return replace(parts.unique_of(target), name=f"unique({target} | {', '.join(others)})")


def _shared(
    elements: Sequence[VectorSpace], numbers: Sequence[float], options: Options, where: Placement
) -> VectorSpace:
    pool = _pool(elements, "shared")
    shared = decompose(pool, memory=where.memory, device=where.device, **options).shared
    return replace(shared, name=f"shared({', '.join(pool.names)})")


def _compress(
    elements: Sequence[VectorSpace], numbers: Sequence[float], options: Options, where: Placement
) -> VectorSpace:
    if numbers and "rank" in options:
        raise InputError("compress: the rank is given twice")
    if any(n != int(n) for n in numbers):
        raise InputError(f"compress: the rank {numbers[0]:g} is no whole number; a share is written energy=0.9")
    rank = int(numbers[0]) if numbers else options.get("rank")
    return compress(
        require_updates(elements[0], "compress"),
        rank,
        energy=options.get("energy"),
        memory=where.memory,
        device=where.device,
    )


def _negate(
    elements: Sequence[VectorSpace], numbers: Sequence[float], options: Options, where: Placement
) -> VectorSpace:
    return arithmetic.negate(elements[0], *numbers, **options)


def _analogy(
    elements: Sequence[VectorSpace], numbers: Sequence[float], options: Options, where: Placement
) -> VectorSpace:
    first, second, third = elements
    return arithmetic.analogy(first, second, third, *numbers, **options)


def _add(elements: Sequence[VectorSpace], numbers: Sequence[float], options: Options, where: Placement) -> VectorSpace:
    return arithmetic.add(elements, numbers or None, **options)


FUNCTIONS: Mapping[str, Function] = {
    "unique": Function(
        "unique(x | a, b, …): what x does not share with a, then b, …; options threshold=0.85, chain, side, rank, "
        "energy, rtol, weighting, rho",
        _unique,
        (1, MANY),
        options=CUTS,
        words=CUT_WORDS,
        has_target=True,
        needs_names=True,
    ),
    "shared": Function(
        "shared(a, b, …): what all share; options threshold=0.85, chain, side, rank, energy, rtol, weighting, rho",
        _shared,
        (2, MANY),
        options=CUTS,
        words=CUT_WORDS,
        needs_names=True,
    ),
    "compress": Function(
        "compress(x, rank) or compress(x, energy=0.9)",
        _compress,
        (1, 1),
        numbers=lambda adapters: (0, 1),
        options={"rank": int, "energy": float},
    ),
    "negate": Function(
        "negate(x) or negate(x, strength)",
        _negate,
        (1, 1),
        numbers=lambda adapters: (0, 1),
        options=SEMANTICS,
        words={"semantics": "pem"},
    ),
    "analogy": Function(
        "analogy(a, b, c) or analogy(a, b, c, c0, c1): c0·a + c1·(b − c); option semantics=pem",
        _analogy,
        (3, 3),
        numbers=lambda adapters: (0, 1, 2),
        options=SEMANTICS,
        words={"semantics": "pem"},
    ),
    "add": Function(
        "add(a, b, …) or add(a, b, …, weight of a, weight of b, …); option semantics=pem",
        _add,
        (1, MANY),
        numbers=lambda adapters: (0, adapters),
        options=SEMANTICS,
        words={"semantics": "pem"},
    ),
}

WORDS = frozenset(key for f in FUNCTIONS.values() for key, kind in f.options.items() if kind is Word)
"""Options whose value is a word."""
