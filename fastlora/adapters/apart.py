"""What adapters do not share: modules that end alike and stay two, and adapters that have nothing in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import combinations

from fastlora.adapters.renaming import LISTED
from fastlora.adapters.towers import difference, split, towers_of
from fastlora.core.data import AdapterData
from fastlora.errors import InputError

Names = Mapping[str, Hashable]

WAY_OUT = "say which names are one with `rename={old: new}` (`--map OLD=NEW`)"


def _ends(names: Iterable[tuple[str, Hashable]]) -> Iterator[tuple[tuple[str, ...], Hashable, str]]:
    """The numbers and the last segment of names, which of a parameter is its module's."""
    for name, signature in names:
        parts = name.split(".")
        last = parts[-2:] if parts[-1] in ("weight", "bias") else parts[-1:]
        yield (*(p for p in parts if p.isdigit()), *last), signature, name


def modules_apart(labels: Sequence[str], adapters: Sequence[Names], settled: Set[str]) -> dict[tuple[str, str], str]:
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
                    first, second = sorted((two, one), key=lambda name: min(owners[name]))
                    pattern = _pattern(first), _pattern(second)
                    counts[pattern] += 1
                    examples.setdefault(pattern, (first, second))
    by_adapters: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for pattern, (first, second) in examples.items():
        by_adapters.setdefault((min(owners[first]), min(owners[second])), []).append(pattern)
    texts = {}
    for (i, j), patterns in by_adapters.items():
        first, second = examples[patterns[0]]
        total = sum(counts[p] for p in patterns)
        texts[labels[i], labels[j]] = (
            f"{total} modules of {labels[i]!r} and {labels[j]!r} end alike and are counted as different ones: "
            f"{first} in {labels[i]!r}, {second} in {labels[j]!r}"
        )
    return texts


def towers_apart(labels: Sequence[str], adapters: Sequence[Names], settled: Set[str]) -> list[str]:
    """What to say of towers of two adapters that have no module in common, and whose names may mean one tower."""
    towers = [t for t in towers_of(adapters).values() if "" not in t.tails and t.root not in settled]
    texts = []
    for one, two in combinations(towers, 2):
        how = None if one.owners & two.owners or one.tails.keys() & two.tails.keys() else difference(one.root, two.root)
        if how is not None and how.plain and how.same_roles:
            texts.append(
                f"{one.root} in {labels[min(one.owners)]!r} and {two.root} in {labels[min(two.owners)]!r} may be one "
                "part of the model, and have no module in common by which that could be seen: they end alike and are "
                "counted as different ones"
            )
    return texts


def _pattern(name: str) -> str:
    return ".".join("*" if p.isdigit() else p for p in name.split("."))


def disjoint(
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
