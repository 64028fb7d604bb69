"""This checkout beside another revision of it: built, tested and timed in turn.

The other revision lies in a worktree that is thrown away at the end. Each run is a process of its own, and runs of both
alternate, so that what else the machine does meets both alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlora.errors import InputError

TESTS = ("tests/ops",)
"""What must pass in both before anything is timed: the kernels."""

LAST_LINES = 5

Rows = Mapping[tuple[str, str], Mapping[int, float]]
"""``{(what, opponent): {threads: seconds of fastlora}}`` of one run."""


@dataclass(frozen=True, slots=True)
class Revision:
    """One side: what it is called, and the tree that it is run from."""

    name: str
    tree: Path

    def python(self, *arguments: str, more: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Runs this Python on the tree, whatever is installed."""
        environment = {**os.environ, "PYTHONPATH": str(self.tree), "OMP_WAIT_POLICY": "passive", **(more or {})}
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.tree, env=environment, capture_output=True, text=True, check=False
        )


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


def checkout(start: Path) -> Path:
    """The root of the checkout that a file of this package lies in. Raises :class:`InputError` for an installed one."""
    root = start.resolve().parents[1]
    if not (root / ".git").exists() or not (root / "setup.py").is_file():
        raise InputError(
            f"--base compares revisions of a checkout, and this fastlora is installed in {root}; run "
            "`python -m fastlora bench --base REV` in a clone of the repository"
        )
    return root


def commit_of(root: Path, revision: str) -> str:
    """The commit that a revision names."""
    found = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode != 0:
        raise InputError(f"--base {revision!r} is no revision of {root}; `git log --oneline` lists some")
    return found.stdout.strip()


def here(root: Path) -> Revision:
    """The checkout as it is. Raises :class:`InputError` where its kernels are older than their source."""
    sources = [p.stat().st_mtime for p in (root / "csrc").rglob("*") if p.is_file()]
    built = [p.stat().st_mtime for p in (root / "fastlora").glob("_core*.so")]
    if sources and built and max(sources) > max(built):
        raise InputError("csrc/ was changed after the kernels were built; build them first: pip install -e .")
    changed = " with changes" if _git(root, "status", "--porcelain").stdout.strip() else ""
    return Revision(f"{_git(root, 'rev-parse', '--short', 'HEAD').stdout.strip()}{changed}", root)


@contextlib.contextmanager
def built(root: Path, revision: str, tell: Callable[[str], object]) -> Iterator[Revision]:
    """The other revision in a worktree of its own, with its kernels; it is gone afterwards."""
    commit = commit_of(root, revision)
    with tempfile.TemporaryDirectory(prefix="fastlora-base-") as folder:
        tree = Path(folder) / "tree"
        added = _git(root, "worktree", "add", "--detach", "--quiet", str(tree), commit)
        try:
            if added.returncode != 0:
                raise InputError(f"git could not make a worktree of {revision}: {_last(added)}")
            other = Revision(f"{revision} ({commit[:7]})", tree)
            tell(f"building {other.name}")
            made = other.python("setup.py", "-q", "build_ext", "--inplace", more={"FASTLORA_CUDA": "OFF"})
            if made.returncode != 0:
                raise InputError(f"{other.name} could not be built, and nothing was timed: {_last(made)}")
            yield other
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))
            _git(root, "worktree", "prune")


def require_green(sides: Sequence[Revision], tests: Sequence[str], tell: Callable[[str], object]) -> None:
    """Raises :class:`InputError` where tests fail, on either side: times of wrong answers mean nothing."""
    for side in sides:
        missing = [t for t in tests if not (side.tree / t.partition("::")[0]).exists()]
        if missing:
            raise InputError(f"{side.name} has no {missing[0]}; name tests that both have (--tests)")
        tell(f"testing {side.name}")
        ended = side.python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests)
        if ended.returncode != 0:
            raise InputError(f"tests fail on {side.name}, and nothing was timed: {_last(ended)}")


def measured(side: Revision, names: Sequence[str]) -> Rows:
    """One run of ``fastlora bench`` on one side."""
    ended = side.python("-m", "fastlora", "bench", "--json", "-q", *names)
    if ended.returncode != 0:
        raise InputError(f"fastlora bench failed on {side.name}: {_last(ended)}")
    rows: list[dict[str, Any]] = json.loads(ended.stdout)["rows"]
    # One opponent or more a contest: ours is the same number in all of them.
    return {(row["what"], ""): {int(t): float(s) for t, s in row["ours"].items()} for row in rows}


def alternated(
    base: Revision, now: Revision, names: Sequence[str], rounds: int, tell: Callable[[str], object]
) -> tuple[list[Comparison], list[str]]:
    """The lines that both have, and notes on those that one lacks. Rounds begin with either side in turn."""
    runs: dict[Revision, list[Rows]] = {base: [], now: []}
    for i in range(rounds):
        for side in (base, now) if i % 2 == 0 else (now, base):
            tell(f"round {i + 1} of {rounds}: timing {side.name}")
            runs[side].append(measured(side, names))
    return compared(runs[base], runs[now])


def compared(base: Sequence[Rows], now: Sequence[Rows]) -> tuple[list[Comparison], list[str]]:
    """Runs of both, pair by pair."""
    lines, notes = [], []
    for key in dict.fromkeys(k for rows in (*now, *base) for k in rows):
        if not all(key in rows for rows in (*base, *now)):
            which = "base" if any(key in rows for rows in base) else "this checkout"
            notes.append(f"{key[0]} is timed by {which} alone")
            continue
        for threads in now[0][key]:
            if not all(threads in rows[key] for rows in (*base, *now)):
                continue
            theirs, ours = ([rows[key][threads] for rows in runs] for runs in (base, now))
            ratios = [b / h for b, h in zip(theirs, ours, strict=True)]
            lines.append(
                Comparison(
                    key[0],
                    threads,
                    statistics.median(theirs),
                    statistics.median(ours),
                    statistics.median(ratios),
                    min(ratios),
                    max(ratios),
                )
            )
    return lines, notes


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError("--base needs git, which is not installed") from None


def _last(ended: subprocess.CompletedProcess[str]) -> str:
    """The end of what a process said."""
    lines = [line.strip() for line in (ended.stdout + "\n" + ended.stderr).splitlines() if line.strip()]
    return " | ".join(lines[-LAST_LINES:])[-600:] or f"exit code {ended.returncode}"
