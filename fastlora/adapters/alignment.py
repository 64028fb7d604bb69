"""One name for every module of a pool, where its adapters name them differently.

:mod:`fastlora.adapters.towers` says which names are one. Here one adapter's names are chosen for all: those under which
the fewest modules get a name that no adapter has. What stays apart although it ends alike is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeVar

from fastlora.adapters.renaming import LISTED, renamed, signatures
from fastlora.adapters.towers import Tower, difference, joined, same_towers, split, towers_of
from fastlora.core.data import AdapterData, DeltaData, ModulesData
from fastlora.errors import InputError

X = TypeVar("X", bound=AdapterData)
Names = Mapping[str, Hashable]

PART = "module"
"""A part of a path that may be a wrapper's: it is where other adapters have the same paths without it."""

WAY_OUT = "say which names are one with `rename={old: new}` (`--map OLD=NEW`)"


@dataclass(slots=True)
class Alignment:
    """``names``: ``{name: new name}`` of what changes, for each adapter. ``notices``: what was done."""

    names: list[dict[str, str]]
    notices: list[str] = field(default_factory=list)


def aligned(records: Sequence[X], *, strict: bool = False) -> tuple[list[X], list[str]]:
    """The adapters under one naming of their modules, and notices.

    ``strict``: adapters that have nothing in common, by the names of modules or of towers, are refused.
    """
    if len(records) < 2:
        return list(records), []
    parts = [_parts(record) for record in records]
    if all(parts[0].keys() == other.keys() for other in parts[1:]):
        return list(records), []
    settled = frozenset().union(*(r.base.settled for r in records if isinstance(r, ModulesData)))
    labels = [record.name for record in records]
    found = align(labels, [signatures(record) for record in records], settled)
    result = [renamed(record, names) for record, names in zip(records, found.names, strict=True)]
    final = [_parts(record) for record in result]
    apart = _apart(labels, [signatures(record) for record in result], settled)
    if strict:
        found.notices += _disjoint(result, final, apart, settled)
    return result, [*found.notices, *(f"{text}; {WAY_OUT}" for text in apart.values())]


def _parts(record: AdapterData) -> Mapping[str, object]:
    """What an adapter changes, by name, without what lies beside it."""
    parts = record.deltas if isinstance(record, DeltaData) else getattr(record, "updates", None)
    return parts if parts is not None else record.vectors  # type: ignore[attr-defined]


def align(labels: Sequence[str], adapters: Sequence[Names], settled: Set[str] = frozenset()) -> Alignment:
    """One naming for adapters called ``labels`` with the given names and signatures."""
    result = Alignment([{} for _ in adapters])
    given = _without_inner(labels, adapters, settled, result)
    towers = towers_of(given)
    same = same_towers(towers, {split(name)[0] for name in settled})
    if same:
        targets = _targets(given, towers, same)
        for i, names in enumerate(given):
            _rename(labels[i], names, targets[i], result.names[i], result.notices)
    return result


def _without_inner(
    labels: Sequence[str], adapters: Sequence[Names], settled: Set[str], result: Alignment
) -> list[Names]:
    """The adapters without ``module`` inside paths, where another adapter has the same paths without it."""
    inner = [any(f".{PART}." in name for name in names) for names in adapters]
    if not any(inner) or all(inner):
        return list(adapters)
    others = {(_tail(n), s) for names, has in zip(adapters, inner, strict=True) if not has for n, s in names.items()}
    given: list[Names] = []
    for i, names in enumerate(adapters):
        short = {n: n if n in settled else n.replace(f".{PART}.", ".") for n in names} if inner[i] else {}
        changed = {old: new for old, new in short.items() if old != new}
        agree = any((_tail(new), names[old]) in others for old, new in changed.items())
        if not agree or len(set(short.values())) < len(names):
            given.append(names)
            continue
        result.names[i] |= changed
        first = next(iter(changed))
        result.notices.append(
            f"adapter {labels[i]!r}: {PART!r} inside its names was left there by a wrapper, as the other adapters have "
            f"the same names without it ({first} is taken for {changed[first]})"
        )
        given.append({short[n]: s for n, s in names.items()})
    return given


def _tail(name: str) -> str:
    root, tail = split(name)
    return joined(root.rpartition(".")[2], tail)


def _targets(adapters: Sequence[Names], towers: Mapping[str, Tower], same: list[list[str]]) -> list[dict[str, str]]:
    """``{root: new root}`` for each adapter."""
    of_root = {root: c for c, roots in enumerate(same) for root in roots}
    own = [[next((r for r in roots if i in towers[r].owners), None) for roots in same] for i in range(len(adapters))]
    best: tuple[int, list[dict[str, str]]] | None = None
    for reference in dict.fromkeys(map(tuple, own)):
        if not any(reference):
            continue
        chosen = _chosen(reference, own, same)
        fixed = {
            split(n)[0] for names, mine in zip(adapters, own, strict=True) if _agrees(mine, reference) for n in names
        }
        targets = [_of_adapter(names, mine, chosen, of_root, fixed) for names, mine in zip(adapters, own, strict=True)]
        price = _price(adapters, targets, own, reference)
        if best is None or price < best[0]:
            best = price, targets
    assert best is not None
    return best[1]


Roots = Sequence[str | None]


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
    names: Names, mine: Roots, chosen: list[str], of_root: Mapping[str, int], fixed: Set[str]
) -> dict[str, str]:
    """What one adapter's roots become: those of groups what was chosen; others, unless they are ``fixed``, what the one
    change of a prefix says that explains the groups."""
    roots = dict.fromkeys(split(name)[0] for name in names)
    targets = {root: chosen[of_root[root]] for root in roots if root in of_root}
    prefixes = {_prefixes(old, new) for old, new in zip(mine, chosen, strict=True) if old not in (None, new)}
    if len(prefixes) == 1:
        [(strip, put)] = prefixes
        for root in roots:
            if root not in targets and root not in fixed and root.startswith(strip):
                targets[root] = put + root[len(strip) :]
    return targets


def _prefixes(old: str | None, new: str) -> tuple[str, str]:
    """The beginnings in which two roots differ: ``("", "model.")``."""
    one, two = (old or "").split("."), new.split(".")
    while one and two and one[-1] == two[-1]:
        one.pop()
        two.pop()
    return "".join(f"{p}." for p in one), "".join(f"{p}." for p in two)


def _price(
    adapters: Sequence[Names], targets: Sequence[Mapping[str, str]], own: Sequence[Roots], reference: Roots
) -> int:
    """How many modules get a name that no adapter has, or keep one that is not of the reference's naming."""
    known = {name for names in adapters for name in names}
    referred = {name for names, mine in zip(adapters, own, strict=True) if _agrees(mine, reference) for name in names}
    price = 0
    for names, roots, mine in zip(adapters, targets, own, strict=True):
        differs = not _agrees(mine, reference)
        for name in names:
            root, tail = split(name)
            new = joined(roots.get(root, root), tail)
            price += new not in known or (differs and root not in roots and new not in referred)
    return price


def _agrees(mine: Roots, reference: Roots) -> bool:
    return all(a is None or b is None or a == b for a, b in zip(mine, reference, strict=True))


def _rename(label: str, names: Names, targets: Mapping[str, str], changes: dict[str, str], notices: list[str]) -> None:
    """Adds to ``changes`` what the roots of one adapter become, and to ``notices`` what that is."""
    before = {new: old for old, new in changes.items()}
    counts: Counter[tuple[str, str]] = Counter()
    kept: list[str] = []
    for name in names:
        root, tail = split(name)
        new = targets.get(root, root)
        if new != root:
            changes[before.get(name, name)] = joined(new, tail)
            counts[root, new] += 1
        elif root not in targets:
            kept.append(name)
    if counts:
        said = ", ".join(f"{old} is taken for {new} ({n} modules)" for (old, new), n in counts.items())
        rest = f"; {len(kept)} others keep their names ({', '.join(kept[:LISTED])})" if kept else ""
        notices.append(f"adapter {label!r} was saved from a differently wrapped model: {said}{rest}")


def _ends(names: Iterable[tuple[str, Hashable]]) -> Iterator[tuple[tuple[str, ...], Hashable, str]]:
    for name, signature in names:
        parts = name.split(".")
        yield (*(p for p in parts if p.isdigit()), parts[-1]), signature, name


def _apart(labels: Sequence[str], adapters: Sequence[Names], settled: Set[str]) -> dict[tuple[str, str], str]:
    """What to say of names of two adapters that end alike and are counted as two, by their patterns."""
    owners: dict[str, set[int]] = {}
    for i, names in enumerate(adapters):
        for name in names:
            owners.setdefault(name, set()).add(i)
    groups: dict[tuple[tuple[str, ...], Hashable], list[str]] = {}
    every = {name: s for names in adapters for name, s in names.items()}
    lone = ((n, s) for n, s in every.items() if len(owners[n]) < len(adapters) and n not in settled)
    for end, signature, name in _ends(lone):
        groups.setdefault((end, signature), []).append(name)
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], tuple[str, str]] = {}
    for group in groups.values():
        for at, one in enumerate(group[1:], 1):
            for two in group[:at]:
                if not owners[one] & owners[two]:
                    pattern = _pattern(two), _pattern(one)
                    counts[pattern] += 1
                    examples.setdefault(pattern, (two, one))
    by_adapters: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for pattern, (two, one) in examples.items():
        by_adapters.setdefault((min(owners[two]), min(owners[one])), []).append(pattern)
    texts = {}
    for (i, j), patterns in by_adapters.items():
        two, one = examples[patterns[0]]
        total = sum(counts[p] for p in patterns)
        texts[labels[i], labels[j]] = (
            f"{total} modules of {labels[i]!r} and {labels[j]!r} end alike and are counted as different ones: "
            f"{two} in {labels[i]!r}, {one} in {labels[j]!r}"
        )
    return texts


def _pattern(name: str) -> str:
    return ".".join("*" if p.isdigit() else p for p in name.split("."))


def _disjoint(
    records: Sequence[AdapterData],
    parts: Sequence[Mapping[str, object]],
    apart: dict[tuple[str, str], str],
    settled: Set[str],
) -> list[str]:
    """Notices on adapters that share no module with others. Raises :class:`InputError` for those of another model."""
    groups = _linked([set(p) for p in parts])
    if len(groups) < 2:
        return []
    by_tower = _linked([{split(name)[0] for name in p} for p in parts])
    notices = []
    for group in by_tower[1:]:
        first = by_tower[0]
        fixed = all(any(name in settled for name in parts[i]) for i in group)
        towers = [{split(name)[0] for i in g for name in parts[i]} for g in (first, group)]
        if not fixed and not (_one_base(records[first[0]], records[group[0]], apart) and _differ(*towers)):
            raise InputError(_other_model(records, parts, first, group))
    for group in groups[1:]:
        who = ", ".join(repr(records[i].name) for i in group[:LISTED])
        before = "the adapters before it" if len(group) == 1 and group[0] == len(parts) - 1 else "the others"
        adapter = "adapter" if len(group) == 1 else "adapters"
        notices.append(f"{adapter} {who} share{'s' * (len(group) == 1)} no module with {before}")
    return notices


def _one_base(first: AdapterData, other: AdapterData, apart: Mapping[tuple[str, str], str]) -> bool:
    """Whether two adapters name one base model, and parts of it that end alike, such as its towers."""
    bases = [getattr(getattr(record, "base", None), "model", None) for record in (first, other)]
    ends = (first.name, other.name) in apart or (other.name, first.name) in apart
    return bases[0] is not None and bases[0] == bases[1] and ends


def _differ(first: set[str], other: set[str]) -> bool:
    """Whether names of towers that end alike all say that they are different ones."""
    found = [how for one in first for two in other if (how := difference(one, two)) is not None]
    return all(not how.plain for how in found)


def _other_model(
    records: Sequence[AdapterData], parts: Sequence[Mapping[str, object]], first: list[int], group: list[int]
) -> str:
    earlier = ", ".join(repr(records[i].name) for i in first[:LISTED])
    known = dict.fromkeys(name for i in first for name in parts[i])
    own = list(parts[group[0]])
    start = split(own[0])[0]
    return (
        f"adapter {records[group[0]].name!r} has no module in common with {earlier}; it is an adapter of another base "
        f"model, or names its modules differently: it has {', '.join(own[:2])}, they have "
        f"{', '.join(list(known)[:2])}; in the latter case {WAY_OUT}; if these are different parts of one model, keep "
        f"them with `rename={{x: x}}` (`--map {start}={start}`)"
    )


def _linked(sets: Sequence[set[str]]) -> list[list[int]]:
    """Positions whose sets overlap, directly or through others; in order."""
    groups: list[tuple[set[str], list[int]]] = []
    for i, own in enumerate(sets):
        mine, members = set(own), [i]
        rest = []
        for names, others in groups:
            if names & mine or not names or not own:
                mine, members = mine | names, [*others, *members]
            else:
                rest.append((names, others))
        groups = [*rest, (mine, members)]
    return sorted((sorted(members) for _, members in groups), key=lambda m: m[0])
