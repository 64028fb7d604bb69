"""This checkout beside another revision of it: built, tested and timed in turn.

Each run is a process of its own, and runs of both alternate, so that what else the machine does meets both alike.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlora.bench import worktrees
from fastlora.bench.children import last_words
from fastlora.bench.worktrees import Revision
from fastlora.errors import InputError
from fastlora.runtime.progress import share_bar

TESTS = ("tests/ops",)
"""What must pass in both before anything is timed: the kernels."""

Times = Mapping[str, Mapping[int, float]]
"""``{what: {threads: seconds of fastlora}}`` of one run."""

Tell = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One line: medians of both, in seconds, and the median, least and largest of the ratios of neighbouring runs,
    base over here: above 1, this checkout is faster."""

    what: str
    threads: int
    base: float
    here: float
    ratio: float
    least: float
    largest: float


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison found. ``options``: how both were built; ``kernels``: the instruction set of both, if known."""

    base: str
    here: str
    options: str
    kernels: str | None
    lines: list[Comparison]
    notes: list[str]


def compare(root: Path, revision: str, names: Sequence[str], rounds: int, tests: Sequence[str], tell: Tell) -> Compared:
    """A checkout beside another revision of it. Raises :class:`InputError` where that would not be fair: tests that
    fail on either side, other kernels, a checkout that was changed meanwhile."""
    if importlib.util.find_spec("pytest") is None:
        raise InputError("--base runs the tests of both sides by pytest, which is not installed: pip install pytest")
    worktrees.commit_of(root, revision)  # a wrong one is told at once
    now = worktrees.here(root)
    computing, began = now.kernels(), worktrees.state(root)
    with worktrees.worktree(root, revision) as base:
        sides = (base, now)
        for side in sides:
            require_tests(side, tests)
        require_names(base, names)
        options = worktrees.described(worktrees.build_options(root))
        tell(f"building {base.name} {options}")
        with share_bar("building") as steps:
            worktrees.build(root, base, steps)
        require_same(base, base.kernels(), computing)
        for side in sides:
            require_green(side, tests, tell)
        lines, notes = alternated(base, now, names, rounds, tell)
    if worktrees.state(root) != began:
        raise InputError(f"{root} was changed while it was timed, so that the times are of no one state; run it again")
    return Compared(base.name, now.name, options, computing, lines, notes)


def require_tests(side: Revision, tests: Sequence[str]) -> None:
    """Raises :class:`InputError` where a side lacks some tests."""
    missing = [t for t in tests if not (side.tree / t.partition("::")[0]).exists()]
    if missing:
        raise InputError(f"{side.name} has no {missing[0]}; name tests that both have (--tests), as seen from the root")


def require_names(base: Revision, names: Sequence[str]) -> None:
    """Raises :class:`InputError` where the other revision has no such case or workload; nothing where it does not say
    which it has."""
    ended = base.python("-m", "fastlora", "bench", "--list", "--json")
    if ended.returncode == 0:
        data: dict[str, Any] = json.loads(ended.stdout)
        if lacking := [n for n in names if n not in data["cases"] and n not in data["workloads"]]:
            raise InputError(f"bench of {base.name} has no case or workload {', '.join(lacking)}")


def require_same(base: Revision, theirs: str | None, ours: str | None) -> None:
    """Raises :class:`InputError` where the two are known to compute by different kernels."""
    if None not in (theirs, ours) and theirs != ours:
        raise InputError(
            f"{base.name} computes with {theirs} and this checkout with {ours}, and nothing was timed: FASTLORA_ISA "
            "names one that both have, and CMAKE_ARGS how kernels are built"
        )


def require_green(side: Revision, tests: Sequence[str], tell: Tell) -> None:
    """Raises :class:`InputError` where tests fail: times of wrong answers mean nothing."""
    tell(f"testing {side.name}")
    with share_bar("testing") as steps:
        ended = side.python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, steps=steps)
    if ended.returncode != 0:
        raise InputError(f"tests fail on {side.name}, and nothing was timed: {last_words(ended)}")


def measured(side: Revision, names: Sequence[str]) -> tuple[Times, list[str]]:
    """One run of ``fastlora bench`` on one side, and the notes that it told."""
    ended = side.python("-m", "fastlora", "bench", "--json", *names)
    if ended.returncode != 0:
        raise InputError(f"fastlora bench failed on {side.name}: {last_words(ended)}")
    rows: list[dict[str, Any]] = json.loads(ended.stdout)["rows"]
    notes = [line.removeprefix("note: ") for line in ended.stderr.splitlines() if line.startswith("note: ")]
    # One opponent or more a contest: ours is the same number in all of them.
    return {row["what"]: {int(t): float(s) for t, s in row["ours"].items()} for row in rows}, notes


def alternated(
    base: Revision, now: Revision, names: Sequence[str], rounds: int, tell: Tell
) -> tuple[list[Comparison], list[str]]:
    """The lines that both have, and notes. Rounds begin with either side in turn."""
    runs: dict[Revision, list[Times]] = {base: [], now: []}
    told: dict[str, None] = {}
    for i in range(rounds):
        for side in (base, now) if i % 2 == 0 else (now, base):
            tell(f"round {i + 1} of {rounds}: timing {side.name}")
            times, notes = measured(side, names)
            runs[side].append(times)
            told.update(dict.fromkeys(notes))
    lines, notes = compared(runs[base], runs[now])
    return lines, [*told, *notes]


def compared(base: Sequence[Times], now: Sequence[Times]) -> tuple[list[Comparison], list[str]]:
    """Runs of both, pair by pair, and what they do not have in common."""
    lines, notes = [], []
    for what in dict.fromkeys(w for times in (*now, *base) for w in times):
        if not all(what in times for times in (*base, *now)):
            which = "base" if any(what in times for times in base) else "this checkout"
            notes.append(f"{what} is timed by {which} alone")
            continue
        counts = sorted({c for times in (*base, *now) for c in times[what]})
        both = [c for c in counts if all(c in times[what] for times in (*base, *now))]
        if lacking := [str(c) for c in counts if c not in both]:
            notes.append(f"{what} is not timed on {', '.join(lacking)} threads by both")
        for threads in both:
            theirs, ours = ([times[what][threads] for times in runs] for runs in (base, now))
            ratios = [b / h for b, h in zip(theirs, ours, strict=True)]
            lines.append(
                Comparison(
                    what,
                    threads,
                    statistics.median(theirs),
                    statistics.median(ours),
                    statistics.median(ratios),
                    min(ratios),
                    max(ratios),
                )
            )
    return lines, notes


def tests_of(root: Path, tests: Sequence[str]) -> list[str]:
    """Tests as seen from the root of both trees, of paths as seen from the root or from where the command runs. Raises
    :class:`InputError` for what lies elsewhere: it would be the same file on both sides."""
    found = []
    for test in tests:
        path, colons, rest = test.partition("::")
        lies = root / path if (root / path).exists() or not Path(path).exists() else Path(path)
        if not lies.resolve().is_relative_to(root):
            raise InputError(f"--tests {test!r} lies outside of {root}; name tests that both revisions have")
        found.append(f"{lies.resolve().relative_to(root)}{colons}{rest}")
    return found
