"""One name for every module of a pool, where its adapters name them differently.

:mod:`fastlora.adapters.towers` says which names are one. Here one adapter's names are chosen for all: those
that know the most modules, and then those under which the fewest get a name that no adapter has. What stays apart
although it ends alike is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeVar

from fastlora.adapters.apart import WAY_OUT, Names, disjoint, modules_apart, towers_apart
from fastlora.adapters.renaming import LISTED, named_alike, parts_of, renamed, settled_names, signatures
from fastlora.adapters.towers import NEUTRAL, Tower, joined, same_towers, split, towers_of
from fastlora.adapters.unwrapping import unwrapped
from fastlora.core.data import AdapterData
from fastlora.core.names import PLAIN_WRAPPER

X = TypeVar("X", bound=AdapterData)

Roots = Sequence[str | None]
"""The root of an adapter in each group of roots that are one."""


@dataclass(slots=True)
class Alignment:
    """``names``: ``{name: new name}`` of what changes, for each adapter. ``notices``: what was done."""

    names: list[dict[str, str]]
    notices: list[str] = field(default_factory=list)


def aligned(records: Sequence[X], *, strict: bool = False) -> tuple[list[X], list[str]]:
    """The adapters under one naming of their modules, and notices.

    ``strict``: adapters that have nothing in common, by the names of modules or of towers, are refused.
    """
    if named_alike(records):
        return list(records), []
    settled = settled_names(records)
    labels = [record.name for record in records]
    records, told = unwrapped(records)
    found = align(labels, [signatures(record) for record in records], settled)
    found.notices[:0] = told
    result = [renamed(record, names) for record, names in zip(records, found.names, strict=True)]
    final = [parts_of(record) for record in result]
    apart = modules_apart(labels, [signatures(record) for record in result], settled)
    if strict:
        found.notices += disjoint(result, final, apart, settled)
    parts_apart = towers_apart(labels, [signatures(record) for record in result], {split(n)[0] for n in settled})
    return result, [*found.notices, *(f"{text}; {WAY_OUT}" for text in (*apart.values(), *parts_apart))]


def align(labels: Sequence[str], adapters: Sequence[Names], settled: Set[str] = frozenset()) -> Alignment:
    """One naming for adapters called ``labels`` with the given names and signatures."""
    result = Alignment([{} for _ in adapters])
    towers = towers_of(adapters)
    same = same_towers(towers, {split(name)[0] for name in settled})
    if same:
        targets, foreign = _targets(adapters, towers, same)
        said = [_rename(*of_one) for of_one in zip(adapters, targets, result.names, strict=True)]
        result.notices += _told(labels, said)
        if foreign:
            result.notices.append(
                f"{len(foreign)} modules keep their names ({', '.join(foreign[:LISTED])}): no adapter has them beside "
                f"the names that were taken for the others, and they may be called differently there; {WAY_OUT}"
            )
    return result


def _targets(
    adapters: Sequence[Names], towers: Mapping[str, Tower], same: list[list[str]]
) -> tuple[list[dict[str, str]], list[str]]:
    """``{root: new root}`` for each adapter, and new names that do not belong to the naming of the others."""
    of_root = {root: c for c, roots in enumerate(same) for root in roots}
    own = [[next((r for r in roots if i in towers[r].owners), None) for roots in same] for i in range(len(adapters))]
    roots = [{split(name)[0] for name in names} for names in adapters]
    known = {name for names in adapters for name in names}
    best: tuple[tuple[int, int, int], list[dict[str, str]], list[str]] | None = None
    for reference in dict.fromkeys(map(tuple, own)):
        if not any(reference):
            continue
        chosen = _chosen(reference, own, same)
        fixed = _roots_of_naming(reference, own, roots)
        targets = [
            _of_adapter(names, mine, chosen, of_root, fixed, towers) for names, mine in zip(adapters, own, strict=True)
        ]
        made, foreign = _price(adapters, targets, of_root, fixed, known)
        wrapped = sum(PLAIN_WRAPPER in root.split(".") for root in chosen)
        if best is None or (len(foreign), made, wrapped) < best[0]:
            best = (len(foreign), made, wrapped), targets, foreign
    assert best is not None
    return best[1], best[2]


def _roots_of_naming(reference: Roots, own: Sequence[Roots], roots: Sequence[set[str]]) -> set[str]:
    """The roots of all adapters that name things as the reference does: no group differently, and some path alike."""
    found = {root for mine, some in zip(own, roots, strict=True) if tuple(mine) == reference for root in some}
    alike = {root for root in found if "." in root}
    for mine, some in zip(own, roots, strict=True):
        if some & alike and all(a is None or b is None or a == b for a, b in zip(mine, reference, strict=True)):
            found |= some
    return found


def _chosen(reference: Roots, own: Sequence[Roots], same: list[list[str]]) -> list[str]:
    """The root of every group: the reference's own, else that of the adapter that agrees with it most."""
    agreeing = sorted(
        own, key=lambda mine: -sum(a is not None and a == b for a, b in zip(mine, reference, strict=True))
    )
    chosen = []
    for c, roots in enumerate(same):
        candidates = (r for r in [reference[c], *(mine[c] for mine in agreeing)] if r is not None)
        chosen.append(next(candidates, roots[0]))
    return chosen


def _of_adapter(
    names: Names,
    mine: Roots,
    chosen: list[str],
    of_root: Mapping[str, int],
    fixed: Set[str],
    towers: Mapping[str, Tower],
) -> dict[str, str]:
    """What one adapter's roots become: those of groups what was chosen; others, unless they are ``fixed``, what a
    change of prefixes says that explains a group."""
    roots = dict.fromkeys(split(name)[0] for name in names)
    targets = {root: chosen[of_root[root]] for root in roots if root in of_root}
    rules = dict.fromkeys(
        _prefixes(old, new)
        for old, new in zip(mine, chosen, strict=True)
        if old is not None and old != new and "" not in towers[old].tails
    )
    for root in roots:
        if root in targets or root in fixed:
            continue
        # What is inserted in one part need not be in others. What begins with all that was taken away is of that part.
        own = [new for strip, put in rules if (new := _exchanged(root, strip, put)) is not None]
        if len(own) == 1 and own[0] not in towers:
            targets[root] = own[0]
    return targets


def _exchanged(root: str, strip: str, put: str) -> str | None:
    """The root with one beginning for another, where it has it, and where that is a part's and at least as long."""
    words = [w for w in strip.split(".") if w and w not in NEUTRAL]
    if not words or not root.startswith(strip) or strip.count(".") < put.count("."):
        return None
    return put + root[len(strip) :]


def _prefixes(old: str, new: str) -> tuple[str, str]:
    """The beginnings in which two roots differ: ``("", "model.")``."""
    one, two = old.split("."), new.split(".")
    while one and two and one[-1] == two[-1]:
        one.pop()
        two.pop()
    return "".join(f"{p}." for p in one), "".join(f"{p}." for p in two)


def _price(
    adapters: Sequence[Names],
    targets: Sequence[Mapping[str, str]],
    of_root: Mapping[str, int],
    fixed: Set[str],
    known: Set[str],
) -> tuple[int, list[str]]:
    """How many modules get a name that no adapter has; and those that have a name of another adapter's naming."""
    made: dict[str, None] = {}
    foreign: dict[str, None] = {}
    for names, roots in zip(adapters, targets, strict=True):
        for name in names:
            root, tail = split(name)
            at = roots.get(root, root)
            new = joined(at, tail)
            if new not in known:
                made[new] = None
            if at not in fixed and (at == root or root in of_root):
                foreign[new] = None
    return len(made), list(foreign)


def _rename(names: Names, targets: Mapping[str, str], changes: dict[str, str]) -> str:
    """Adds to ``changes`` what the roots of one adapter become, and says it."""
    counts: Counter[tuple[str, str]] = Counter()
    for name in names:
        root, tail = split(name)
        new = targets.get(root, root)
        if new != root:
            changes[name] = joined(new, tail)
            counts[root, new] += 1
    return ", ".join(f"{old} is taken for {new} ({n} modules)" for (old, new), n in counts.items())


def _told(labels: Sequence[str], said: Sequence[str]) -> list[str]:
    """A notice for every change, with the adapters that have it."""
    notices = []
    for text in dict.fromkeys(filter(None, said)):
        own = [repr(label) for label, its in zip(labels, said, strict=True) if its == text]
        more = f" and {len(own) - LISTED} more" if len(own) > LISTED else ""
        who = f"adapters {', '.join(own[:LISTED])}{more} were" if len(own) > 1 else f"adapter {own[0]} was"
        notices.append(f"{who} saved from a differently wrapped model: {text}")
    return notices
