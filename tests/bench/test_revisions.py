"""``fastlora bench --base REV``: on a stand-in for a repository, whose ``bench`` prints times that its file names."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from fastlora.bench import revisions
from fastlora.errors import InputError

MAIN = """
import json, sys
assert sys.argv[1:4] == ["bench", "--json", "-q"], sys.argv
rows = [{"what": w, "opponent": o, "ours": t} for w, t in TIMES.items() for o in ("torch", "numpy")]
print(json.dumps({"rows": rows}))
"""


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e@x")
    ended = subprocess.run(["git", "-C", str(root), *identity, *arguments], capture_output=True, text=True, check=True)
    return ended.stdout.strip()


def write(root: Path, times: dict[str, dict[str, float]], *, test: str = "def test(): pass", setup: str = "") -> None:
    files = {
        "fastlora/__init__.py": "",
        "fastlora/__main__.py": f"TIMES = {json.dumps(times)}{MAIN}",
        "setup.py": f"open('fastlora/built', 'w').write('x')\n{setup}",
        "tests/ops/test_it.py": test,
        ".gitignore": "built\n__pycache__\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository whose first commit takes 3 s and 2 s, and whose files now take 1 s and 2 s."""
    root = tmp_path / "repository"
    write(root, {"gram": {"1": 3.0, "2": 2.0}, "gone": {"1": 1.0}})
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "before")
    write(root, {"gram": {"1": 1.0, "2": 2.0}, "new": {"1": 1.0}})
    return root


def run(root: Path, base: str = "HEAD", rounds: int = 3) -> tuple[list[revisions.Comparison], list[str], list[str]]:
    told: list[str] = []
    now = revisions.here(root)
    with revisions.built(root, base, told.append) as other:
        revisions.require_green([other, now], revisions.TESTS, told.append)
        return *revisions.alternated(other, now, (), rounds, told.append), told


def test_both_are_timed_in_turn(root: Path) -> None:
    lines, notes, told = run(root)
    assert [(c.what, c.threads, c.base, c.here, c.ratio) for c in lines] == [
        ("gram", 1, 3.0, 1.0, 3.0),
        ("gram", 2, 2.0, 2.0, 1.0),
    ]
    assert notes == ["new is timed by this checkout alone", "gone is timed by base alone"]
    sides = [line.rpartition("timing ")[2].split(" (")[0].split(" with")[0] for line in told if "timing" in line]
    head = git(root, "rev-parse", "--short", "HEAD")
    assert sides == ["HEAD", head, head, "HEAD", "HEAD", head]
    assert len(git(root, "worktree", "list").splitlines()) == 1
    assert not (root / "fastlora" / "built").exists()  # it was built elsewhere
    assert told[0] == f"building HEAD ({git(root, 'rev-parse', 'HEAD')[:7]})"


def test_the_ratio_is_the_median_of_neighbouring_runs() -> None:
    def rows(*seconds: float) -> list[revisions.Rows]:
        return [{("gram", ""): {1: s}} for s in seconds]

    (line,), notes = revisions.compared(rows(2.0, 6.0, 3.0), rows(1.0, 2.0, 3.0))
    assert (line.base, line.here, line.ratio, line.least, line.largest) == (3.0, 2.0, 2.0, 1.0, 3.0) and not notes


def test_red_tests_are_no_times(root: Path) -> None:
    write(root, {"gram": {"1": 1.0}}, test="def test_wrong(): assert 1 == 2")
    with pytest.raises(InputError, match=r"tests fail on .* with changes, and nothing was timed: .*test_wrong"):
        run(root)
    assert len(git(root, "worktree", "list").splitlines()) == 1


def test_what_does_not_build_is_told(root: Path) -> None:
    write(root, {"gram": {"1": 1.0}}, setup="raise SystemExit('no compiler')")
    git(root, "commit", "-qam", "broken")
    with pytest.raises(InputError, match=r"HEAD \(.*\) could not be built, and nothing was timed: no compiler"):
        run(root)
    assert len(git(root, "worktree", "list").splitlines()) == 1


def test_no_revision_and_no_checkout(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'nothing' is no revision of"):
        run(root, "nothing")
    with pytest.raises(InputError, match=r"'--all' is no revision of"):
        run(root, "--all")
    with pytest.raises(InputError, match=r"compares revisions of a checkout"):
        revisions.checkout(tmp_path / "site-packages" / "fastlora" / "__init__.py")
    assert revisions.checkout(root / "fastlora" / "__init__.py") == root


def test_kernels_older_than_their_source_are_not_timed(root: Path) -> None:
    (root / "fastlora" / "_core.so").write_bytes(b"")
    (root / "csrc").mkdir()
    (root / "csrc" / "gram.cpp").write_bytes(b"")
    os.utime(root / "fastlora" / "_core.so", (1, 1))
    with pytest.raises(InputError, match=r"build them first"):
        revisions.here(root)
