"""The command line that all fuzzers of this folder have: which cases, and where the result goes."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

import fastlora as fl

Outcome = tuple[int, str, str, str]
"""The number of a case, its kind, what came of it, and what must not happen or ``""``."""
Run = Callable[[Iterable[int], Path], Iterator[Outcome]]
"""Cases by their numbers, in a folder that may be filled."""
MEMORY = Path("/dev/shm")
SPACING = 10_000_000


def main(about: str | None, run: Run, *, noun: str = "mutations", kind_ends: str = " + ", kind: str = "kind") -> int:
    """Runs cases, prints what must not happen, and writes a record; 1 if anything did.

    ``about``: what the command says of itself. ``noun``: of cases, in the record. ``kind_ends``: where the first word
    of a kind ends, by which they are counted. ``kind``: what the record calls it.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help=f"how many {noun}")
    parser.add_argument("--seed", type=int, default=0, help=f"numbers from SEED * {SPACING:,} on")
    parser.add_argument("--replay", type=int, nargs="*", help="these numbers instead")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--root", type=Path, help="where cases are written (default: in memory)")
    options = parser.parse_args()
    first = options.seed * SPACING
    outcomes: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    violations = []
    versions, start = version(), time.monotonic()  # of the code that runs, whatever is committed meanwhile
    with tempfile.TemporaryDirectory(dir=options.root or (MEMORY if MEMORY.is_dir() else None)) as root:
        for seed, what, outcome, violation in run(
            options.replay or range(first, first + options.count), Path(root).resolve()
        ):
            outcomes[outcome] += 1
            kinds.setdefault(what.split(kind_ends)[0], Counter())[outcome] += 1
            if violation:
                violations.append({"seed": seed, kind: what, "what": violation})
                print(f"{seed} {what}: {violation}", flush=True)
            elif options.replay:
                print(f"{seed} {what}: {outcome}")
    seconds = time.monotonic() - start
    print(f"{sum(outcomes.values())} {noun} in {seconds:.0f} s: {dict(outcomes.most_common())}")
    if options.json:
        result = {
            noun: sum(outcomes.values()),
            "seeds": [first, first + options.count - 1],
            "outcomes": dict(outcomes.most_common()),
            "kinds": {k: dict(v.most_common()) for k, v in sorted(kinds.items())},
            "violations": violations,
            "seconds": round(seconds),
            **versions,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if violations else 0


def version() -> dict[str, str]:
    """What is being tested."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "fastlora": fl.__version__,
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
