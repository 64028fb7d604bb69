"""Segments that wrappers of the trained model have left in the names of adapters that are combined.

Files are read without the segments that are certainly a wrapper's; adapters made in memory may have them. ``module``
inside a path may be a part of the model: it is taken off where another adapter has the same paths without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from fastlora.adapters.renaming import named_alike, renamed, settled_names, signatures
from fastlora.adapters.towers import joined, split
from fastlora.core.data import AdapterData
from fastlora.core.names import PLAIN_WRAPPER, WRAPPERS

X = TypeVar("X", bound=AdapterData)

INSIDE = f".{PLAIN_WRAPPER}."


def unwrapped(records: Sequence[X]) -> tuple[list[X], list[str]]:
    """The adapters without segments of wrappers, and notices."""
    if named_alike(records):
        return list(records), []
    settled = settled_names(records)
    given, notices = [], []
    for record in records:
        changed = _without_wrappers(record, settled)
        if changed:
            old, new = next(iter(changed.items()))
            notices.append(f"adapter {record.name!r}: segments of wrappers are taken off ({old} is taken for {new})")
        given.append(renamed(record, changed))
    inner = {i for i, record in enumerate(given) if any(INSIDE in name for name in signatures(record))}
    found = 0 < len(inner) < len(given)
    while found:  # an adapter without it may show another one, as wrapped as the first, that it is none of the model's
        plain = {(_tail(n), s) for i, r in enumerate(given) if i not in inner for n, s in signatures(r).items()}
        found = False
        for i in sorted(inner):
            own = signatures(given[i])
            changed = {n: n.replace(INSIDE, ".") for n in own if INSIDE in n and n not in settled}
            agree = any((_tail(new), own[old]) in plain for old, new in changed.items())
            if agree and _stay_apart(own, changed):
                found = True
                inner.remove(i)
                given[i] = renamed(given[i], changed)
                old, new = next(iter(changed.items()))
                notices.append(
                    f"adapter {given[i].name!r}: {PLAIN_WRAPPER!r} inside its names was left there by a wrapper, as "
                    f"other adapters have the same names without it ({old} is taken for {new})"
                )
    return given, notices


def _without_wrappers(record: AdapterData, settled: frozenset[str]) -> dict[str, str]:
    """``{name: name without segments of wrappers}`` of an adapter."""
    names = signatures(record)
    marked = [n for n in names if any(w in n for w in WRAPPERS) and n not in settled]
    changed = {n: ".".join(p for p in n.split(".") if p not in WRAPPERS) for n in marked}
    changed = {old: new for old, new in changed.items() if new and new != old}
    return changed if _stay_apart(names, changed) else {}


def _stay_apart(names: Mapping[str, object], changed: Mapping[str, str]) -> bool:
    """Whether no two names become one."""
    return len({changed.get(n, n) for n in names}) == len(names)


def _tail(name: str) -> str:
    root, tail = split(name)
    return joined(root.rpartition(".")[2], tail)
