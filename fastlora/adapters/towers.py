"""When are two names one module? Parts of models that adapters call differently.

A *tower* is what an adapter has under one name up to the first number: ``model.layers`` holds the tail
``0.mlp.up_proj``. A name without a number is a tower of its own. Two towers can be one if their names end alike, all
tails that both have are equal in shape and layout, no adapter has both, and nothing in their names says that they are
two: ``model.layers`` and ``model.language_model.layers``, but not ``text_model.layers`` and ``vision_model.layers``.
Each is joined to the one it shares the longest end with. Where that is not one, it stays alone. The order of the
adapters plays no part.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import combinations

NEUTRAL = frozenset({"model", "base_model", "module"})
"""Segments that say nothing about a tower."""

MAIN = frozenset(
    "language_model text_model language text llm lm transformer backbone base decoder_model pretrained_model".split()
)
"""Segments that name the main tower of a model, which other versions of its code do not name."""

ROLES = frozenset(
    "encoder decoder cross draft mtp critic actor reward ref reference talker teacher student controlnet refiner"
    " generator discriminator qformer resampler prior aux auxiliary".split()
)
"""Words of a name that tell a tower from a main one: a name without them means another tower."""

AROUND = frozenset({"encoder", "decoder"})
"""Roles that are also names of wrappers around a whole model, whose own path then follows: ``encoder.model.layers``."""

SENSES = {
    "vision": re.compile(r"vis\w*|vit|img|image\w*|video\w*|pixel|siglip"),
    "audio": re.compile(r"audio\w*|speech\w*|sound|voice|acoustic"),
}
"""Words for one role."""


@functools.lru_cache(2**17)
def split(name: str) -> tuple[str, str]:
    """``("model.layers", "0.mlp.up_proj")``: a name up to its first number, which is not at its start, and the rest."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and i and not all(p.isdigit() for p in parts[:i]):
            return ".".join(parts[:i]), ".".join(parts[i:])
    return name, ""


def joined(root: str, tail: str) -> str:
    """The name of a tail in a tower."""
    return f"{root}.{tail}" if tail else root


@functools.lru_cache(2**12)
def roles(root: str) -> frozenset[str]:
    """What the words of a name say about its tower."""
    words = re.findall(r"[a-z]+|\d+", re.sub(r"^(\d+\.)+", "", root.lower()))
    found = {sense for sense, pattern in SENSES.items() if any(map(pattern.fullmatch, words))}
    # ``text_encoder_2`` is another one than ``text_encoder``.
    return frozenset(found | ROLES.intersection(words) | {w for w in words if w.isdigit()})


@dataclass(slots=True)
class Tower:
    """Everything that adapters have under one ``root``: ``tails {tail: signature}``, and which adapters have it."""

    root: str
    tails: dict[str, Hashable] = field(default_factory=dict)
    owners: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Difference:
    """How two roots differ that end alike: what stands before the ``common`` last segments, and the words in which it
    differs, without neutral ones. ``plain``: at most one of the two has such words."""

    common: int
    leads: tuple[str, str]
    words: tuple[str, ...]
    plain: bool
    same_roles: bool
    bare: bool


def towers_of(adapters: Sequence[Mapping[str, Hashable]]) -> dict[str, Tower]:
    """The towers of all adapters, by root."""
    towers: dict[str, Tower] = {}
    for i, names in enumerate(adapters):
        for name, signature in names.items():
            root, tail = split(name)
            tower = towers.get(root)
            if tower is None:
                tower = towers[root] = Tower(root)
            tower.tails.setdefault(tail, signature)
            tower.owners.add(i)
    return towers


@functools.lru_cache(2**14)
def difference(first: str, second: str) -> Difference | None:
    """How two roots differ; ``None`` where their last segments do."""
    one, two = first.split("."), second.split(".")
    common = 0
    while common < min(len(one), len(two)) and one[-1 - common] == two[-1 - common]:
        common += 1
    if not common:
        return None
    leads = one[: len(one) - common], two[: len(two) - common]
    counts = [Counter(w for w in lead if w not in NEUTRAL) for lead in leads]
    extra = [counts[0] - counts[1], counts[1] - counts[0]]
    words = tuple((extra[0] + extra[1]).elements())
    around = common > 1 and not all(leads) and len(words) == 1 and words[0] in AROUND
    return Difference(
        common,
        (".".join(leads[0]), ".".join(leads[1])),
        words,
        not (extra[0] and extra[1]),
        roles(first) == roles(second) or around,
        not all(leads) and common == min(len(one), len(two)) == 1,
    )


Edge = tuple[str, str]


def same_towers(towers: Mapping[str, Tower], settled: Set[str]) -> list[list[str]]:
    """Roots that are one tower: lists of two and more. ``settled`` roots are what they are called."""
    groups: dict[str, list[Tower]] = {}
    for tower in towers.values():
        if tower.root not in settled:
            groups.setdefault(tower.root.rpartition(".")[2], []).append(tower)
    possible: dict[Edge, Difference] = {}
    for group in groups.values():
        for one, two in combinations(group, 2):
            how = difference(one.root, two.root)
            if how is not None and how.plain and _fit(one, two):
                possible[one.root, two.root] = how
    if not possible:
        return []
    possible = _without_worse(possible, towers)
    certain = _unambiguous(possible, towers)
    certain = _supported(certain, towers)
    return _components(certain, towers)


def _fit(one: Tower, two: Tower) -> bool:
    """Whether no adapter has both, and what both have is alike."""
    if one.owners & two.owners:
        return False
    shared = one.tails.keys() & two.tails.keys()
    return bool(shared) and all(one.tails[t] == two.tails[t] for t in shared)


def _neighbours(edges: Mapping[Edge, Difference]) -> dict[str, list[tuple[str, Difference]]]:
    found: dict[str, list[tuple[str, Difference]]] = {}
    for (one, two), how in edges.items():
        found.setdefault(one, []).append((two, how))
        found.setdefault(two, []).append((one, how))
    return found


def _without_worse(edges: dict[Edge, Difference], towers: Mapping[str, Tower]) -> dict[Edge, Difference]:
    """Leaves out a pair where one of the two ends more alike with another tower of the same adapter."""
    near = _neighbours(edges)

    def better(root: str, other: str, how: Difference) -> bool:
        return any(
            rival != other
            and towers[rival].owners & towers[other].owners
            and its.common > how.common
            and its.same_roles
            for rival, its in near[root]
        )

    return {(a, b): how for (a, b), how in edges.items() if not better(a, b, how) and not better(b, a, how)}


def _unambiguous(edges: dict[Edge, Difference], towers: Mapping[str, Tower]) -> dict[Edge, Difference]:
    """Leaves out towers that could be one with two that are not one."""
    near = _neighbours(edges)

    def doubtful(root: str, other: str, how: Difference) -> bool:
        for rival, its in near[root]:
            if rival == other or _may_join(towers[rival], towers[other]):
                continue
            if its.common < how.common or (not how.words and its.words):
                continue
            # A name with words of its own says what it is; a bare one could be any of them.
            if not its.same_roles and not how.bare:
                continue
            return True
        return False

    return {
        (a, b): how
        for (a, b), how in edges.items()
        if how.same_roles and not doubtful(a, b, how) and not doubtful(b, a, how)
    }


def _supported(edges: dict[Edge, Difference], towers: Mapping[str, Tower]) -> dict[Edge, Difference]:
    """Leaves out single modules that would be one by an unknown word that nothing else is explained by; and numbers in
    the words, unless they stand first."""
    support = Counter[tuple[str, ...]]()
    for (one, two), how in edges.items():
        shared = towers[one].tails.keys() & towers[two].tails.keys()
        support[tuple(sorted(how.leads))] += sum(1 for _ in shared) + (2 if "" not in shared else 0)

    def holds(one: str, two: str, how: Difference) -> bool:
        if "" not in towers[one].tails or MAIN.issuperset(how.words):
            return True
        return support[tuple(sorted(how.leads))] >= 2

    return {(a, b): how for (a, b), how in edges.items() if holds(a, b, how)}


def _components(edges: Mapping[Edge, Difference], towers: Mapping[str, Tower]) -> list[list[str]]:
    """Connected roots, in the order of the towers; without those in which one adapter would have two."""
    near = _neighbours(edges)
    seen: set[str] = set()
    components = []
    order = {root: i for i, root in enumerate(towers)}
    for root in sorted(near, key=order.__getitem__):
        if root in seen:
            continue
        component: list[str] = []
        waiting = [root]
        while waiting:
            at = waiting.pop()
            if at not in seen:
                seen.add(at)
                component.append(at)
                waiting += [other for other, _ in near[at]]
        component.sort(key=order.__getitem__)
        if all(_may_join(towers[one], towers[two]) for one, two in combinations(component, 2)):
            components.append(component)
    return components


def _may_join(one: Tower, two: Tower) -> bool:
    how = difference(one.root, two.root)
    alike = all(one.tails[t] == two.tails[t] for t in one.tails.keys() & two.tails.keys())
    return how is not None and how.plain and how.same_roles and alike and not one.owners & two.owners
