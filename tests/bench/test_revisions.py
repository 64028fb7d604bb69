"""``fastlora bench --base REV``: on a stand-in for a repository, whose ``bench`` prints times that its file names."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastlora.bench import revisions, worktrees
from fastlora.bench.worktrees import Revision
from fastlora.errors import InputError

MAIN = """
import json, os, sys
if "--list" in sys.argv:
    print(json.dumps({"cases": dict.fromkeys(["eigh", *TIMES]), "workloads": []}))
    sys.exit()
assert sys.argv[1:3] == ["bench", "--json"], sys.argv
print("note: peft was left out", file=sys.stderr)
rows = [{"what": w, "opponent": o, "ours": t} for w, t in TIMES.items() for o in ("torch", "numpy")]
print(json.dumps({"rows": rows}))
"""
ISA = """
def unavailable(): return None
def isa(): return {!r}
"""


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e@x")
    ended = subprocess.run(["git", "-C", str(root), *identity, *arguments], capture_output=True, text=True, check=True)
    return ended.stdout.strip()


def write(
    root: Path,
    times: dict[str, dict[str, float]],
    *,
    test: str = "def test(): pass",
    setup: str = "",
    isa: str = "avx2",
    main: str = "",
) -> None:
    files = {
        "fastlora/__init__.py": "",
        "fastlora/backends/__init__.py": "",
        "fastlora/backends/cpu.py": ISA.format(isa),
        "fastlora/__main__.py": f"TIMES = {json.dumps(times)}{MAIN}{main}",
        "setup.py": f"open('fastlora/built', 'w').write('x')\n{setup}",
        "tests/ops/test_it.py": test,
        ".gitignore": "built\n__pycache__\nbuild\n*.so\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose first commit takes 3 s and 2 s, and whose files now take 1 s and 2 s."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    root = tmp_path / "repository"
    write(root, {"gram": {"1": 3.0, "2": 2.0}, "gone": {"1": 1.0}})
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "before")
    write(root, {"gram": {"1": 1.0, "2": 2.0}, "new": {"1": 1.0}})
    return root


def compare(
    root: Path, base: str = "HEAD", *, names: tuple[str, ...] = (), rounds: int = 1
) -> tuple[revisions.Compared, list[str]]:
    told: list[str] = []
    return revisions.compare(root, base, names, rounds, revisions.TESTS, told.append), told


def nothing_is_left(root: Path) -> bool:
    return len(git(root, "worktree", "list").splitlines()) == 1 and not any((root.parent / "temporary").iterdir())


def test_both_are_timed_in_turn(root: Path) -> None:
    found, told = compare(root, rounds=3)
    assert [(c.what, c.threads, c.base, c.here, c.ratio) for c in found.lines] == [
        ("gram", 1, 3.0, 1.0, 3.0),
        ("gram", 2, 2.0, 2.0, 1.0),
    ]
    assert found.notes == ["peft was left out", "new is timed by this checkout alone", "gone is timed by base alone"]
    assert found.kernels == "avx2" and found.here.endswith(" with changes")
    sides = [line.rpartition("timing ")[2].split(" (")[0].split(" with")[0] for line in told if "timing" in line]
    head = git(root, "rev-parse", "--short", "HEAD")
    assert sides == ["HEAD", head, head, "HEAD", "HEAD", head]
    assert nothing_is_left(root)
    assert not (root / "fastlora" / "built").exists()  # it was built elsewhere
    assert told[0].startswith(f"building HEAD ({git(root, 'rev-parse', 'HEAD')[:7]}) with the options of CMAKE_ARGS")


def test_a_commit_is_named_once(root: Path) -> None:
    head = git(root, "rev-parse", "HEAD")
    for revision, name in ((head[:9], head[:9]), (head, head), ("HEAD~0", f"HEAD~0 ({head[:7]})")):
        with worktrees.worktree(root, revision) as base:
            assert base.name == name


def test_the_ratio_is_the_median_of_neighbouring_runs() -> None:
    def rows(*seconds: float) -> list[revisions.Times]:
        return [{"gram": {1: s}} for s in seconds]

    (line,), notes = revisions.compared(rows(2.0, 6.0, 3.0), rows(1.0, 2.0, 3.0))
    assert (line.base, line.here, line.ratio, line.least, line.largest) == (3.0, 2.0, 2.0, 1.0, 3.0) and not notes


def test_numbers_of_threads_that_one_lacks_are_told() -> None:
    (line,), notes = revisions.compared([{"gram": {1: 2.0, 2: 1.0}}], [{"gram": {1: 1.0}}])
    assert line.threads == 1 and notes == ["gram is not timed on 2 threads by both"]


@pytest.mark.parametrize("side", ["base", "here"])
def test_red_tests_are_no_times(root: Path, side: str) -> None:
    write(root, {"gram": {"1": 1.0}}, test="def test_wrong(): assert 1 == 2")
    which = r"\w+ with changes"
    if side == "base":
        git(root, "commit", "-qam", "red")
        write(root, {"gram": {"1": 1.0}})
        which = r"HEAD \(\w+\)"
    with pytest.raises(InputError, match=rf"^tests fail on {which}, and nothing was timed: .*test_wrong"):
        compare(root)
    assert nothing_is_left(root)


def test_what_does_not_build_is_told(root: Path) -> None:
    write(root, {"gram": {"1": 1.0}}, setup="raise SystemExit('no compiler')")
    git(root, "commit", "-qam", "broken")
    with pytest.raises(InputError, match=r"HEAD \(.*\) could not be built, and nothing was timed: no compiler"):
        compare(root)
    assert nothing_is_left(root)


def test_what_cannot_work_is_told_before_anything_is_built(root: Path, tmp_path: Path) -> None:
    write(root, {"later": {"1": 1.0}}, setup="raise SystemExit('built')")
    git(root, "commit", "-qam", "would tell if it was built")
    (root / "fastlora" / "__main__.py").write_text("TIMES = {'later': 1, 'newest': 1}" + MAIN)
    (root / "tests" / "ops" / "test_new.py").write_text("def test(): pass")
    for wrong in ("nothing", "--all", ""):
        with pytest.raises(InputError, match=rf"'{wrong}' is no revision of"):
            compare(root, wrong)
    with pytest.raises(InputError, match=r"bench of HEAD \(\w+\) has no case or workload newest$"):
        compare(root, names=("later", "newest"))
    with pytest.raises(
        InputError, match=r"^HEAD \(\w+\) has no tests/ops/test_new.py::test; name tests that both have"
    ):
        revisions.compare(root, "HEAD", (), 1, ["tests/ops", "tests/ops/test_new.py::test"], str)
    with pytest.raises(InputError, match=r"compares revisions of a checkout"):
        worktrees.checkout(tmp_path / "site-packages" / "fastlora" / "__init__.py")
    assert worktrees.checkout(root / "fastlora" / "__init__.py") == root
    assert nothing_is_left(root)


def test_tests_are_seen_from_the_root(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of one tree would be tested twice, on whichever side."""
    monkeypatch.chdir(root / "tests")
    named = ["tests/ops", "ops/test_it.py::test", str(root / "tests" / "ops" / "test_it.py"), "ops/no.py"]
    assert revisions.tests_of(root, named) == [
        "tests/ops",
        *(f"tests/ops/test_it.py{c}" for c in ("::test", "")),
        "ops/no.py",
    ]
    (tmp_path / "test_elsewhere.py").write_text("")
    for outside in ("../../test_elsewhere.py", str(tmp_path / "test_elsewhere.py")):
        with pytest.raises(InputError, match=r"test_elsewhere.py' lies outside of"):
            revisions.tests_of(root, [outside])


def test_other_kernels_are_not_compared(root: Path) -> None:
    write(root, {"gram": {"1": 1.0}}, isa="avx512")
    with pytest.raises(InputError, match=r"HEAD \(\w+\) computes with avx2 and this checkout with avx512, and nothing"):
        compare(root)
    assert nothing_is_left(root)


def test_a_wrong_instruction_set_is_told(root: Path) -> None:
    (root / "fastlora" / "backends" / "cpu.py").write_text(
        "def unavailable(): return None\ndef isa(): raise RuntimeError('FASTLORA_ISA=sse: no')"
    )
    with pytest.raises(InputError, match=r"^FASTLORA_ISA=sse: no$"):
        compare(root)


def test_kernels_of_an_installed_fastlora_are_not_taken_for_those_of_a_tree(root: Path) -> None:
    """Where a tree has none, an editable install of another one gives its own."""
    other = "import sys, types\nsys.modules['fastlora._core'] = m = types.ModuleType('m')\nm.__file__ = {!r}\n"
    cpu = root / "fastlora" / "backends" / "cpu.py"
    cpu.write_text(other.format(str(root / "fastlora" / "_core.so")) + ISA.format("avx2"))
    assert Revision("here", root).kernels() == "avx2"
    cpu.write_text(other.format("/elsewhere/fastlora/_core.so") + ISA.format("avx2"))
    with pytest.raises(InputError, match=r"has no kernels and would compute with those of another .*/elsewhere"):
        compare(root)


def test_a_checkout_that_changes_meanwhile_is_no_result(root: Path) -> None:
    edit = f"open({str(root / 'setup.py')!r}, 'a').write('# more')"
    write(root, {"gram": {"1": 1.0}}, main=edit)
    with pytest.raises(InputError, match=r"was changed while it was timed"):
        compare(root)
    assert nothing_is_left(root)


def test_kernels_older_than_their_source_are_not_timed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLORA_CORE", raising=False)  # it is there where the package is tested without kernels
    (root / "csrc").mkdir()
    (root / "csrc" / "gram.cpp").write_bytes(b"")
    with pytest.raises(InputError, match=r"has no kernels, and a base would have some; build them first"):
        worktrees.here(root)
    (root / "fastlora" / "_core.so").write_bytes(b"")
    assert worktrees.here(root).tree == root
    os.utime(root / "fastlora" / "_core.so", (1, 1))
    with pytest.raises(InputError, match=r"build them first"):
        worktrees.here(root)


CACHE = """
//Flags
CMAKE_CXX_FLAGS:STRING=-mfma -DX="a b"
CMAKE_CXX_FLAGS-ADVANCED:INTERNAL=1
CMAKE_CXX_COMPILER:FILEPATH=/usr/bin/c++
FASTLORA_CPU:STRING=BASELINE
FASTLORA_CUDA:STRING=ON
FASTLORA_CUDA_ARCHS:STRING=90-real
FASTLORA_WERROR:BOOL=OFF
FASTLORA_STUBS:PATH=
FASTLORA_COMPILES_AMX:INTERNAL=1
"""


def test_a_base_is_built_as_this_checkout_was(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two builds it is the one that the kernels are of."""
    monkeypatch.setenv("CMAKE_ARGS", "-DFASTLORA_CPU=ALL")
    folders = [root / "build" / name / "fastlora._core" for name in ("editable", "temp.linux-x86_64-cpython-311")]
    for folder, cpu in zip(folders, ("BASELINE", "ALL"), strict=True):
        folder.mkdir(parents=True)
        (folder / "CMakeCache.txt").write_text(CACHE.replace("BASELINE", cpu))
    kernels = root / "fastlora" / "_core.so"
    kernels.write_bytes(b"")
    for i, path in enumerate((folders[0] / "CMakeCache.txt", kernels, folders[1] / "CMakeCache.txt")):
        os.utime(path, (1000 + i, 1000 + i))
    options = worktrees.build_options(root)
    assert options == {
        "CMAKE_CXX_FLAGS": '-mfma -DX="a b"',
        "CMAKE_CXX_COMPILER": "/usr/bin/c++",
        "FASTLORA_CPU": "BASELINE",
        "FASTLORA_WERROR": "OFF",
    }
    assert worktrees.described(options).endswith(
        'FLAGS=-mfma -DX="a b", CMAKE_CXX_COMPILER=/usr/bin/c++, FASTLORA_CPU=BASELINE'
    )
    write(root, {"gram": {"1": 1.0}}, setup="import os; raise SystemExit(os.environ['CMAKE_ARGS'])")
    git(root, "commit", "-qam", "tells its options")
    with worktrees.worktree(root, "HEAD") as base:
        with pytest.raises(InputError, match=r"nothing was timed: -C ../options.cmake$"):
            worktrees.build(root, base)
        lines = (base.tree.parent / "options.cmake").read_text().splitlines()
        assert 'set(CMAKE_CXX_FLAGS [==[-mfma -DX="a b"]==] CACHE STRING "")' in lines and len(lines) == 4
    os.utime(kernels, (1, 1))
    assert worktrees.build_options(root) == {}  # both are of other kernels


STOPPED = """
import sys
from pathlib import Path
from fastlora.bench import revisions
from fastlora.cli import exits
exits.listen()
root = Path(sys.argv[1])
sys.exit(exits.guarded(lambda: revisions.compare(root, "HEAD", (), 1, revisions.TESTS, print)))
"""
SLOW = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "100"])
pathlib.Path(os.environ["STARTED"]).write_text(f"{os.getpid()} {child.pid}")
time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_ends_the_build_and_leaves_nothing(root: Path, tmp_path: Path, number: signal.Signals) -> None:
    write(root, {"gram": {"1": 1.0}}, setup=SLOW)
    git(root, "commit", "-qam", "slow to build")
    started, folder = tmp_path / "started", tmp_path / "temporary"
    environment = {**os.environ, "TMPDIR": str(folder), "STARTED": str(started)}
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(root)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (started.exists() and len(started.read_text().split()) == 2) and process.poll() is None:
        time.sleep(0.02)
    assert any(folder.iterdir())
    process.send_signal(number)
    told = process.communicate(timeout=60)
    assert process.returncode == 128 + number, told
    assert told[1].startswith("interrupted: no output is left half-written")
    assert nothing_is_left(root)
    for child in map(int, started.read_text().split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 0)
            # It may wait for whoever adopted it to take notice.
            assert Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z", "the build goes on"


def test_paths_of_dependencies_stay(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "dependencies"))
    ended = Revision("here", root).python(
        "-c", "import os, fastlora; print(os.environ['PYTHONPATH'], fastlora.__file__)"
    )
    assert ended.stdout.split() == [f"{root}:{tmp_path / 'dependencies'}", str(root / "fastlora" / "__init__.py")]
