"""What a small command costs before and beside its work: the import of torch and little more; help costs less still."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import ADAPTERS, COMMAND, ROOT, environment

from fastlora.cli import app, start

SPAM = str(ADAPTERS / "spam")
INSPECT = ["inspect", SPAM]

NOT_NEEDED = re.compile(
    r"(rich\.(console|table|progress|text)|lark|matplotlib|huggingface_hub|transformers|peft|triton|tqdm|requests|pandas"
    r"|fastlora\.(bench|coefficients|decomposition|dipm|expressions|merging)\.(?!(methods|listing)$).*)"
)
"""What neither torch nor looking at an adapter imports."""


def modules_of(*command: str) -> list[tuple[str, ...]]:
    """What Python imports for a command: for every module the chain of those that import it, itself last."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], env=environment(), capture_output=True, text=True, check=True
    )
    found: list[tuple[str, ...]] = []
    chain: list[str] = []
    for line in reversed(done.stderr.splitlines()):  # a module is listed after those that it imports
        match = re.fullmatch(r"import time: +\d+ \| +\d+ \|( +)(\S+)", line)
        if match:
            chain = [*chain[: (len(match[1]) - 1) // 2], match[2]]
            found.append(tuple(chain))
    return found


def test_a_small_command_imports_what_it_needs() -> None:
    found = modules_of("-m", "fastlora", *INSPECT)
    assert ("torch",) in [chain[-1:] for chain in found], "the list of imports is read correctly"
    beyond = [chain[-1] for chain in found if "torch" not in chain]
    assert not [m for m in beyond if NOT_NEEDED.fullmatch(m)]
    assert not [chain for chain in found if chain[-1].startswith(("torch._meta_registrations", "torch._refs"))]
    own = [m for m in beyond if m.startswith("fastlora")]
    assert "fastlora.adapters.loading" in own


@pytest.mark.parametrize("arguments", [["nowhere/at/all"], [SPAM + ":0.5"], [SPAM, "--csv", "no/where/x.csv"]])
def test_wrong_arguments_are_told_before_torch_is_imported(arguments: list[str]) -> None:
    code = (
        "import sys, fastlora.cli.app\n"
        "try: fastlora.cli.app.main()\n"
        "finally: print([m for m in ('torch', 'numpy', 'fastlora.ops') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", *arguments], env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "[]\n") and done.stderr.startswith("error: ")


def processor_seconds(*command: str) -> float:
    kept = {"PYTHONDONTWRITEBYTECODE": ""}  # else every try compiles the package anew
    process = subprocess.Popen(command, env=environment(kept), stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime


def test_a_small_command_takes_little_longer_than_torch() -> None:
    """Its imports and its work are 15 to 20 % of the import of torch, 0.2 s where that takes 1.2 s; 30 % is allowed.

    Processor time, the least of some tries of both in turn: other programs slow both alike.
    """
    torch_alone, command = [], []
    for _ in range(6):
        torch_alone.append(processor_seconds(sys.executable, "-c", "import torch"))
        command.append(processor_seconds(sys.executable, "-m", "fastlora", *INSPECT))
        if min(command) <= 1.3 * min(torch_alone):
            break
    assert min(command) <= 1.3 * min(torch_alone)


def test_the_package_alone_imports_nothing() -> None:
    found = [chain[-1] for chain in modules_of("-c", "import fastlora")]
    assert [m for m in found if m.startswith("fastlora")] == ["fastlora", "fastlora._version"]
    assert Path(sys.executable).exists() and "torch" not in found


HEAVY = ("torch", "numpy", "safetensors", "rich.progress", "matplotlib", "huggingface_hub", "lark")


@pytest.mark.parametrize("arguments", [["--help"], ["decompose", "--help"], ["compose", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, fastlora.cli.app\n"
        "try: fastlora.cli.app.main()\n"
        f"finally: print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)\n"
    )
    found = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "[]\n")


def test_help_is_instant() -> None:
    """Hardly more than typer itself, by the processor's time, which other programs take little of: 1.4 times as much.
    NumPy alone would make it 2.5 times, and torch 20 times."""
    times = [
        [processor_seconds(*c) for c in ([*COMMAND, "--help"], [sys.executable, "-c", "import typer"])] for _ in "12345"
    ]
    of_help, of_typer = (min(column) for column in zip(*times, strict=True))
    assert of_help < 2 * of_typer


@pytest.mark.parametrize("triton", [False, True], ids=["", "triton"])
def test_the_end_looks_for_no_garbage(triton: bool) -> None:
    """Python does so among all objects when it ends, which takes a third of a second with torch. Triton needs it."""
    code = (
        "import atexit, gc, sys, fastlora.cli.app\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 10_000))\n"  # called last
        f"if {triton}: sys.modules['triton'] = sys\n"
        "fastlora.cli.app.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "--version"], env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == str(not triton)


def test_what_the_import_of_torch_leaves_out_is_there_for_who_asks() -> None:
    """By name, while torch is imported as a backend of another package may, and afterwards."""
    code = (
        "import sys\n"
        "from fastlora.runtime.lean import RULES, lean_torch\n"
        "with lean_torch():\n"
        "    if sys.argv[1] == 'meanwhile':\n"
        "        import torch; from torch._meta_registrations import register_meta\n"
        "        assert 'torch._refs' in sys.modules\n"
        "    else:\n"
        "        import torch\n"
        "        assert 'torch._refs' not in sys.modules\n"
        "assert (RULES in sys.modules) == hasattr(torch, '_meta_registrations') == (sys.argv[1] == 'meanwhile')\n"
        "import torch._meta_registrations as rules\n"
        "assert rules.__file__ and rules.register_meta and torch._meta_registrations is rules is sys.modules[RULES]\n"
        "with torch._subclasses.fake_tensor.FakeTensorMode():\n"
        "    assert torch.linalg.eigh(torch.ones(3, 2, 2)).eigenvalues.shape == (3, 2)\n"
    )
    for when in ("meanwhile", "afterwards"):
        done = subprocess.run([sys.executable, "-c", code, when], env=environment(), capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


RULES = "torch._meta_registrations"


def test_overlap_leaves_out_what_it_never_asks_for(tmp_path: Path) -> None:
    """With all that it can be asked to do."""
    pool = [str(ADAPTERS / n) for n in ("spam", "movie_a", "movie_b")]
    extras = ["--clusters", "--like", "spam", "--csv", str(tmp_path / "a.csv"), "--npz", str(tmp_path / "a.npz")]
    pages = ["--html", str(tmp_path / "a.html"), "--plot", str(tmp_path / "a.png")]
    found = [chain[-1] for chain in modules_of("-m", "fastlora", "overlap", *pool, *extras, *pages)]
    assert "torch" in found and RULES not in found
    assert {p.suffix for p in tmp_path.iterdir()} == {".csv", ".npz", ".html", ".png"}


def test_decompose_leaves_out_what_it_never_asks_for(tmp_path: Path) -> None:
    """Nor does it import what builds on torch's compilers, which would fail: in any mode, with pages and pictures."""
    pool, out = [str(ADAPTERS / n) for n in ("spam", "movie_a", "movie_b")], tmp_path / "out"
    extras = ["--plots", "--csv", str(tmp_path / "a.csv"), "--html", str(tmp_path / "a.html"), "--dtype", "float16"]
    modes = [["--mode", "pairs", *extras], ["--chain", "mean", "--threshold", "soft", "--uniform-rank"]]
    for arguments in modes:
        found = {chain[-1] for chain in modules_of("-m", "fastlora", "decompose", *pool, "--out", str(out), *arguments)}
        assert "torch" in found and RULES not in found and (out / "report.json").exists()
        assert not found & {"peft", "transformers", "accelerate", "diffusers", "torch._dynamo", "torch._decomp"}
        out = tmp_path / "other"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries are loaded ahead on Linux alone")
def test_kernels_of_torch_are_loaded_before_its_import() -> None:
    code = (
        "import sys; from fastlora.runtime.ahead import load_ahead\n"
        "load_ahead().join()\n"
        "assert 'torch' not in sys.modules and 'libtorch_cpu' in open('/proc/self/maps').read()\n"
        "import torch\n"
        "assert load_ahead() is None and torch.linalg.eigvalsh(torch.eye(3)).sum() == 3\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "ahead"),
    [("overlap a", True), ("inspect a", True), ("overlap a -h", False), ("merge a", False), ("", False)],
)
def test_which_commands_load_ahead(arguments: str, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(sys, "argv", ["fastlora", *arguments.split()])
    monkeypatch.setattr(start, "load_ahead", lambda: called.append("ahead"))
    monkeypatch.setattr(app, "entry", lambda: called.append("command"))
    start.entry()
    assert called == ["ahead", "command"][not ahead :]


def test_commands_that_load_ahead_are_lean() -> None:
    commands = (ROOT / "fastlora" / "cli" / "commands").glob("*.py")
    assert set(start.LEAN) == {path.stem for path in commands if "lean=True" in path.read_text()}


@pytest.mark.parametrize("asked", ["", "lean=True, device='cuda'", "lean=True, backend='triton'"])
def test_other_commands_import_all_of_torch(asked: str) -> None:
    """Packages that build on torch's compilers cannot be imported after a part of it."""
    given = f"dict({asked})"
    code = (
        "import sys, contextlib; from fastlora.cli.run import Run\n"
        f"given = {given}; lean = given.pop('lean', False)\n"
        "with contextlib.suppress(Exception): Run(**given).start(lean)\n"  # there may be no such device
        f"assert {RULES!r} in sys.modules\n"
        "import torch._decomp\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


AT_WORK = "threading.Thread(target=threading.main_thread().join).start()"
"""A thread that is at work until the end."""


@pytest.mark.parametrize("last", ["", AT_WORK, "sys.setprofile(print)"])
def test_the_end_does_what_was_registered(last: str) -> None:
    """All is printed, and objects are not taken apart, unless a thread is at work or somebody watches."""
    code = f"""if True:
        import atexit, os, sys, threading, fastlora.cli.app as app

        class Left:
            def __del__(self):
                os.write(2, b"taken apart")

        def main():
            {last}
            sys.stdout.write("last words ")
            sys.exit(3)

        left = Left()
        atexit.register(lambda: print("registered"))
        app.main = main
        app.entry()
    """
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 3 and "last words " in done.stdout and "registered" in done.stdout
    assert ("taken apart" in done.stderr) == bool(last)


def test_what_is_imported_is_not_frozen() -> None:
    """Who keeps frozen objects is left alone by :func:`paused_collector`: then every adapter that is read or written
    ends with a search through all of them."""
    code = (
        "import gc, fastlora.cli.run as run\n"
        "from fastlora.runtime.cpython import FROZEN_AT_START\n"
        "run.Run().start()\n"
        "assert gc.isenabled() and gc.get_freeze_count() <= FROZEN_AT_START\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
