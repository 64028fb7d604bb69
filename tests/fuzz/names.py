"""Runs made-up names and conventions against fastlora. See :mod:`names_cases`.

    python tests/fuzz/names.py --count 10000 --seed 1 --json tests/fuzz/names.json

What a module gets is held against dense sums of the adapters as they were before anybody renamed them. A case is

* *right*: every update is where it belongs, under the names of one adapter;
* *unrelated*: no module is in two adapters under two names; each has its own adapter's name and the right update,
  though no adapter has all names;
* *refused*: with a message that names the adapters and the way out;
* *told apart*, *told kept*: a note names the modules that end alike and stayed two, or that keep their names;
* wrong, which never happens: also where modules that are two were taken for one, and a note says so.
"""

from __future__ import annotations

import shutil
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import names_cases
import torch
from command_line import Outcome, main
from names_cases import Case, Written
from torch import Tensor

import fastlora as fl
from fastlora.errors import FastloraError

TOLERANCE = 1e-5
"""Relative: factors are float32, and at most three are added."""


class Wrong(Exception):
    """Numbers or names that nobody was told of."""


Found = dict[str, Tensor]


def attempt(case: Case, root: Path) -> str:
    """The outcome of one case. Raises :class:`Wrong`."""
    for adapter in case.adapters:
        adapter.write(root / adapter.label)
    try:
        found, notes = VERBS[case.verb.partition(" ")[0]](case, [root / a.label for a in case.adapters])
    except FastloraError as error:
        if "--map" not in str(error) or not any(repr(a.label) in str(error) for a in case.adapters):
            raise Wrong(f"refused without a way out: {error}") from None
        return "refused"
    finally:
        for adapter in case.adapters:
            shutil.rmtree(root / adapter.label, ignore_errors=True)
    if case.verb == "overlap":
        return judge_cosines(case, found, notes)
    return judge(case, found, notes)


def _loaded(paths: list[Path]) -> dict[str, Any]:
    return {path.name: fl.load(path) for path in paths}


def _dense(result: Any) -> Found:
    if isinstance(result, fl.IA3):
        return {m: result.vector(m)[:, None] - 1.0 for m in result}
    found = {m: b.double() @ a.double() for m, (b, a) in result.tensors("float32").items()}
    return found | {f"{p} shift": e.tensor.double() for p, e in result.extras.items()}


def merge(case: Case, paths: list[Path]) -> tuple[Found, list[str]]:
    pool = fl.Pool.load(paths)
    result = fl.merge(pool, dict(zip(pool.names, case.weights, strict=True)), method="cat")
    return _dense(result), [*pool.notices, *result.notes]


def add_up(case: Case, paths: list[Path]) -> tuple[Found, list[str]]:
    first, *others = (w * a for w, a in zip(case.weights, _loaded(paths).values(), strict=True))
    total = first
    for other in others:
        total = total + other
    return _dense(total), list(total.notes)


def add(case: Case, paths: list[Path]) -> tuple[Found, list[str]]:
    total = fl.add(list(_loaded(paths).values()), case.weights)
    return _dense(total), list(total.notes)


def compose(case: Case, paths: list[Path]) -> tuple[Found, list[str]]:
    terms = (f"{w}*{p.name}" for w, p in zip(case.weights, paths, strict=True))
    text = " + ".join(terms).replace("+ -", "- ")
    result = fl.compose(text, {p.name: p for p in paths})
    return _dense(result), list(result.notes)


def modulate(case: Case, paths: list[Path]) -> tuple[Found, list[str]]:
    """Half way between an adapter and another one, which is the same where both are: nothing changes there."""
    one, two = _loaded(paths).values()
    result = fl.modulate(one, fl.dipm.shift(one, two, 0.5))
    return _dense(result), list(result.notes)


def overlap(case: Case, paths: list[Path]) -> tuple[Found, list[str]]:
    pool = fl.Pool.load(paths)
    return {m: cosine[0, 1] for m, (cosine, _) in fl.overlap(pool, modules=True).modules.items()}, pool.notices


VERBS = {"merge": merge, "sum": add_up, "add": add, "compose": compose, "modulate": modulate, "overlap": overlap}


def contributions(case: Case) -> dict[str, dict[str, Tensor]]:
    """``{place: {label: what the adapter adds there}}``."""
    found: dict[str, dict[str, Tensor]] = {}
    for weight, adapter in zip(case.weights, case.adapters, strict=True):
        for place, delta in adapter.deltas().items():
            found.setdefault(place, {})[adapter.label] = weight * delta
        for place, shift in adapter.shifts.items():
            found.setdefault(f"{place} shift", {})[adapter.label] = weight * adapter.scaling(place) * shift.double()
    return found


def _name(adapter: Written, place: str) -> str | None:
    path, _, shift = place.partition(" ")
    name = adapter.name(path)
    return None if name is None else f"{name}.bias shift" if shift else name


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return float((found - expected).norm()) <= TOLERANCE * max(float(expected.norm()), 1e-3)


def judge(case: Case, found: Found, notes: Iterable[str]) -> str:
    """Whether a sum is what it should be. Raises :class:`Wrong`."""
    parts = contributions(case)
    if case.verb == "modulate":
        base = case.adapters[0]
        parts = {p: {"both": d} for p, d in base.deltas().items()}
        found = {m: d for m, d in found.items() if float(d.norm()) > 1e-4}
    whole = {place: sum(own.values(), torch.zeros(())) for place, own in parts.items()}
    names = _without_inner(case, found)
    for adapter in case.adapters:
        expected = {_name(adapter, place): total for place, total in whole.items()}
        if expected.keys() == names.keys() and all(_close(names[str(n)], t) for n, t in expected.items()):
            return "right"
    return _judge_pieces(case, names, parts, list(notes))


def _without_inner(case: Case, found: Found) -> Found:
    """Results under names without ``module`` inside, where adapters have it."""
    if not any(a.inner for a in case.adapters):
        return found
    return {name.replace(".module.", "."): delta for name, delta in found.items()}


def _judge_pieces(case: Case, found: Found, parts: Mapping[str, Mapping[str, Tensor]], notes: list[str]) -> str:
    """The outcome of a result that has a place twice, or names of several adapters."""
    said = " ".join(notes)
    used: Counter[tuple[str, str]] = Counter()
    apart: dict[str, list[tuple[str, ...]]] = {}
    for name, delta in found.items():
        piece = next(_pieces(case, name, delta, parts), None)
        if piece is None:
            raise Wrong(f"{name} is nobody's update; notes: {said or 'none'}")
        place, labels = piece
        if len(labels) < len(parts[place]):
            apart.setdefault(place, []).append(labels)
        used.update((place, label) for label in labels)
    if set(used.values()) != {1} or len(used) != sum(map(len, parts.values())):
        raise Wrong(f"updates are missing or there twice; notes: {said or 'none'}")
    for place, groups in apart.items():
        for one, two in combinations(groups, 2):
            if not _told_apart(case, notes, one, two):
                raise Wrong(f"{place} is there under two names, and no note says so; notes: {said or 'none'}")
    if apart:
        return "told apart"
    if "keep their names" in said or "end alike" in said:
        return "told kept"
    if _unrelated(case, found, parts):
        return "unrelated"
    raise Wrong(f"names of several adapters, and no note says so: {list(found)}; notes: {said or 'none'}")


def _told_apart(case: Case, notes: Iterable[str], one: Iterable[str], two: Iterable[str]) -> bool:
    """Whether a note says of two groups of adapters that their modules stayed two."""
    said = [n for n in notes if "end alike and are counted as different" in n or "may be a part of the model" in n]
    if case.verb.startswith("sum"):  # the names of sums of sums are in place of those of the adapters
        return bool(said)
    return any(any(repr(a) in n for a in one) or any(repr(b) in n for b in two) for n in said)


def _pieces(
    case: Case, name: str, delta: Tensor, parts: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Places and adapters that a result can come from, by its name and its numbers."""
    for place, own in parts.items():
        if not any(_name(a, place) == name for a in case.adapters):
            continue
        for count in range(len(own), 0, -1):
            for labels in combinations(own, count):
                if _close(delta, sum((own[x] for x in labels), torch.zeros(()))):
                    yield place, labels


def _unrelated(case: Case, found: Found, parts: Iterable[str]) -> bool:
    """Whether the names are those of adapters that call nothing differently that two of them have."""
    for count in range(2, len(case.adapters) + 1):
        for some in combinations(case.adapters, count):
            own = {a.label: {place.partition("/")[0] for place in a.factors} for a in some}
            names = {_name(a, place) for a in some for place in parts if place.partition("/")[0] in own[a.label]}
            alike = all(
                one.name(place) == two.name(place)
                for one, two in combinations(some, 2)
                for place in one.factors.keys() & two.factors.keys()
            )
            if alike and names >= found.keys():
                return True
    return False


def judge_cosines(case: Case, found: Found, notes: Iterable[str]) -> str:
    """The same adapter under two namings: cosine 1 in every module that both have."""
    one, two = case.adapters
    common = one.factors.keys() & two.factors.keys()
    said = " ".join(notes)
    names = _without_inner(case, found)
    if all(abs(float(c) - 1.0) <= TOLERANCE for c in names.values()):
        for adapter in case.adapters:
            if {_name(adapter, p) for p in common} == names.keys():
                return "right"
        if "end alike and are counted as different" in said or "may be a part of the model" in said:
            return "told apart"
    raise Wrong(f"cosines { ({n: float(c) for n, c in names.items()}) } of {sorted(common)}; notes: {said or 'none'}")


def one(seed: int, root: Path) -> tuple[str, str, str]:
    """``(what the case is about, outcome, what is wrong or "")``."""
    case = names_cases.make(seed)
    try:
        return case.about(), attempt(case, root), ""
    except Wrong as error:
        return case.about(), "wrong", str(error)
    except Exception as error:
        where = " < ".join(
            f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[:-4:-1]
        )
        return case.about(), "wrong", f"{type(error).__name__}: {str(error)[:300]} ({where})"


def run(seeds: Iterable[int], root: Path) -> Iterator[Outcome]:
    """Every case, in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for seed in seeds:
        yield seed, *one(seed, root)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, noun="cases", kind_ends=" (", kind="case"))
