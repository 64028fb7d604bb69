"""What a new user runs into in the first hour: one clear message, exit code 2, nothing left behind."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from builders import MODULES, make_adapter, make_factors, peft_tensors, write_peft
from command import ADAPTERS, COMMAND, DATA, environment, mounted, refused, run, tree

SPAM, MOVIE = ADAPTERS / "spam", ADAPTERS / "movie_a"
SHIFTED = {module: (n + 2, m) for module, (n, m) in MODULES.items()}
ELSEWHERE = {f"transformer.h.{i}.attn.c_proj": (16, 16) for i in range(2)}
UNREACHABLE = "http://127.0.0.1:9"


def with_nan(root: Path) -> Path:
    factors = make_factors()
    factors["model.layers.1.mlp.up_proj"][0][3, 1] = torch.nan
    return write_peft(root / "bad", peft_tensors(factors))


def truncated(root: Path) -> Path:
    file = make_adapter(root / "bad") / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    return file.parent


def with_config(text: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        directory = make_adapter(root / "bad")
        (directory / "adapter_config.json").write_text(text)
        return directory

    return make


def without(name: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        directory = make_adapter(root / "bad")
        (directory / name).unlink()
        return directory

    return make


BAD_ADAPTERS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "wrong path": (lambda root: root / "nowhere/at/all", ["no file or directory", "nowhere", "does not exist"]),
    "a file of it": (lambda _: SPAM / "adapter_model.safetensors", ["one file of an adapter", str(SPAM)]),
    "a folder of others": (lambda _: ADAPTERS, ["no module in common", "'movie_a'", "'good'"]),
    "no config": (without("adapter_config.json"), ["has no adapter_config.json", "adapter_model.safetensors"]),
    "no weights": (without("adapter_model.safetensors"), ["neither adapter_model.safetensors nor"]),
    "dora": (lambda _: DATA / "movie_dora", ["'movie_dora' is a DoRA adapter", "merge_and_unload"]),
    "ia3": (lambda _: DATA / "movie_ia3_a", ["'movie_ia3_a' is an (IA)³ adapter", "fastlora compose"]),
    "nan": (with_nan, ["'bad'", "lora_B of model.layers.1.mlp.up_proj", "NaN"]),
    "truncated": (truncated, ["adapter_model.safetensors", "no readable safetensors", "again"]),
    "invalid json": (with_config('{"r": 4,'), ["adapter_config.json", "JSON"]),
    "json of another shape": (with_config("[1, 2]"), ["adapter_config.json"]),
    "other shapes": (lambda root: make_adapter(root / "bad", SHIFTED), ["[26, 16]", "[24, 16]", "base models"]),
    "other names": (lambda root: make_adapter(root / "bad", ELSEWHERE), ["no module in common", "'bad'", "'good'"]),
}


@pytest.mark.parametrize("command", ["decompose", "merge"])
@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_a_bad_adapter_is_refused(case: str, command: str, tmp_path: Path) -> None:
    make, words = BAD_ADAPTERS[case]
    good, bad = make_adapter(tmp_path / "good"), make(tmp_path)
    message = refused(command, good, bad, "--out", "out", cwd=tmp_path)
    for word in words:
        assert word in message


BAD_COMMANDS: dict[str, tuple[list[object], list[str]]] = {
    "unknown command": (["decompse", SPAM], ["decompse", "fastlora --help"]),
    "no adapters": (["decompose", "--out", "out"], ["Missing argument", "fastlora decompose --help"]),
    "no output": (["merge", SPAM, MOVIE], ["--out", "fastlora merge --help"]),
    "unknown option": (["decompose", SPAM, MOVIE, "--treshold", "0.5"], ["--treshold", "--threshold"]),
    "threshold no number": (["decompose", SPAM, MOVIE, "-o", "out", "--threshold", "high"], ["--threshold", "number"]),
    "threshold too large": (
        ["decompose", SPAM, MOVIE, "-o", "out", "--threshold", "1.5"],
        ["threshold=1.5", "below 1"],
    ),
    "threshold nan": (["decompose", SPAM, MOVIE, "-o", "out", "--threshold", "nan"], ["threshold=nan"]),
    "a pool of one": (["decompose", SPAM, "-o", "out"], ["pool of one", "two adapters"]),
    "overlap of one": (["overlap", SPAM], ["pool of one", "two adapters"]),
    "weights without meaning": (["decompose", f"{SPAM}:0.5", MOVIE, "-o", "out"], ["spam", "no meaning", "`:0.5`"]),
    "a weight to inspect": (["inspect", f"{SPAM}:0.5"], ["spam", "no meaning"]),
    "a weight of nan": (["merge", f"{SPAM}:nan", MOVIE, "-o", "out"], ["'nan'", "finite"]),
    "no such weight": (["merge", f"{SPAM}:heavy", MOVIE, "-o", "out"], ["'heavy'", "finite number"]),
    "unknown chain": (
        ["decompose", SPAM, MOVIE, "-o", "out", "--chain", "sum"],
        ["'sum'", "product, palindrome, mean"],
    ),
    "unknown mode": (["decompose", SPAM, MOVIE, "-o", "out", "--mode", "all"], ["'all'", "pool, pairs, iterative"]),
    "unknown side": (["decompose", SPAM, MOVIE, "-o", "out", "--side", "top"], ["'top'", "left", "right"]),
    "no target": (["decompose", SPAM, MOVIE, "-o", "out", "--mode", "iterative"], ["--target NAME"]),
    "unknown target": (
        ["decompose", SPAM, MOVIE, "-o", "out", "--mode", "iterative", "--target", "toxic"],
        ["'toxic'", "spam, movie_a"],
    ),
    "a target without iterative": (
        ["decompose", SPAM, MOVIE, "-o", "out", "--target", "spam"],
        ["iterative", "'pool'"],
    ),
    "rank and energy": (["decompose", SPAM, MOVIE, "-o", "out", "--rank", "2", "--energy", "0.5"], ["not both"]),
    "unknown method": (["merge", SPAM, MOVIE, "-o", "out", "--method", "soup"], ["'soup'", "svd", "cat"]),
    "a rank for cat": (["merge", SPAM, MOVIE, "-o", "out", "--method", "cat", "--rank", "4"], ["'cat'", "rank"]),
    "rank 0": (["merge", SPAM, MOVIE, "-o", "out", "--rank", "0"], ["rank=0", "at least 1"]),
    "energy 2": (["compress", SPAM, "-o", "out", "--energy", "2"], ["energy=2", "at most 1"]),
    "nothing to cut to": (["compress", SPAM, "-o", "out"], ["rank=N or energy=X"]),
    "unknown dtype": (["merge", SPAM, MOVIE, "-o", "out", "--dtype", "int8"], ["'int8'", "bfloat16"]),
    "unknown backend": (["decompose", SPAM, MOVIE, "-o", "out", "--backend", "gpu"], ["'gpu'", "cpu, reference"]),
    "a backend that is not there": (["inspect", SPAM, "--backend", "cuda"], ["'cuda' cannot be used"]),
    "a device that is not there": (
        ["inspect", SPAM, "--device", "cuda"],
        ["device 'cuda' cannot be used", "--device cpu"],
    ),
    "no device": (["inspect", SPAM, "--device", "gpu"], ["device 'gpu' does not exist", "cuda:N"]),
    "a picture of no kind": (["overlap", SPAM, MOVIE, "--plot", "x.picture"], ["x.picture", ".png"]),
    "a picture nowhere": (["overlap", SPAM, MOVIE, "--plot", "no/x.png"], ["no/x.png", "no directory"]),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_wrong_use_is_refused(case: str, tmp_path: Path) -> None:
    arguments, words = BAD_COMMANDS[case]
    message = refused(*arguments, cwd=tmp_path)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("variable", "value", "word"),
    [
        ("FASTLORA_ISA", "sse9", "no such instruction set"),
        ("FASTLORA_BACKEND", "gpu", "does not exist"),
        ("FASTLORA_BACKEND", "triton", "cannot be used"),
    ],
)
def test_a_wrong_environment_variable_is_refused(variable: str, value: str, word: str, tmp_path: Path) -> None:
    message = refused("decompose", SPAM, MOVIE, "--out", "out", cwd=tmp_path, env={variable: value})
    assert value in message and word in message


def test_info_explains_a_wrong_instruction_set(tmp_path: Path) -> None:
    found = run("info", cwd=tmp_path, env={"FASTLORA_ISA": "sse9"})
    assert found.code == 0 and "FASTLORA_ISA=sse9: no such instruction set" in found.out


def test_no_arguments_show_the_help_as_a_message(tmp_path: Path) -> None:
    found = run(cwd=tmp_path)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("Usage: fastlora") and "decompose" in found.err


def test_two_folders_of_one_name_and_the_form_that_the_message_shows(tmp_path: Path) -> None:
    first = make_adapter(tmp_path / "legal" / "checkpoint-500", seed=1)
    second = make_adapter(tmp_path / "medical" / "checkpoint-500", seed=2)
    message = refused("decompose", first, second, "--out", "out", cwd=tmp_path)
    assert "two adapters are called 'checkpoint-500'" in message
    shown = message.rpartition("for example ")[2].split()
    assert all(re.match(r"checkpoint-500(-2)?=", argument) for argument in shown) and len(shown) == 2
    found = run("decompose", *shown, "--out", "out", "--quiet", cwd=tmp_path)
    assert (found.code, found.out, found.err) == (0, "", "")
    assert {p.name for p in (tmp_path / "out" / "unique").iterdir()} == {"checkpoint-500", "checkpoint-500-2"}


@pytest.mark.parametrize(
    "env",
    [{"HF_HUB_OFFLINE": "1"}, {"HTTPS_PROXY": UNREACHABLE, "https_proxy": UNREACHABLE}],
    ids=["offline", "cut off"],
)
def test_a_hub_id_that_is_not_there(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "cwd").mkdir()
    start = time.monotonic()
    cache = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    message = refused("inspect", "nobody/nothing", cwd=tmp_path / "cwd", env=cache | env)
    assert "nobody/nothing" in message and "Hub" in message
    assert time.monotonic() - start < 60


def test_an_existing_output_stays_as_it_is(tmp_path: Path) -> None:
    make_adapter(tmp_path / "out")
    message = refused("merge", SPAM, MOVIE, "--out", "out", cwd=tmp_path)
    assert "exists" in message and "--overwrite" in message


def test_overwriting_refuses_what_is_no_earlier_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in refused("merge", SPAM, MOVIE, "--out", "out", "--overwrite", cwd=tmp_path)


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert "is a file" in refused("merge", SPAM, MOVIE, "--out", "out", cwd=tmp_path)
    assert "is a file" in refused("merge", SPAM, MOVIE, "--out", "out/below", cwd=tmp_path)


def test_a_picture_that_exists_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"a photograph")
    message = refused("overlap", SPAM, MOVIE, "--plot", "x.png", cwd=tmp_path)
    assert "x.png exists" in message and "--overwrite" in message


@pytest.mark.parametrize("out", ["good", "good/out", "."])
def test_an_output_inside_an_input_or_around_it(out: str, tmp_path: Path) -> None:
    make_adapter(tmp_path / "good")
    message = refused("merge", "good", MOVIE, "--out", out, "--overwrite", cwd=tmp_path)
    assert "one inside the other" in message or "no earlier output" in message


def without_override() -> None:
    """Takes from root, in the child, the right to write where permission bits forbid it."""
    drop_from_bounding_set, dac_override = 24, 1
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(drop_from_bounding_set, dac_override, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


@contextlib.contextmanager
def unwritable(directory: Path) -> Iterator[None]:
    directory.mkdir(mode=0o500)
    try:
        subprocess.run(["true"], preexec_fn=without_override, check=True)
    except subprocess.SubprocessError:
        pytest.skip("root may write everywhere here, and this right cannot be dropped")
    yield


def test_no_permission_to_write(tmp_path: Path) -> None:
    with unwritable(tmp_path / "locked"):
        for out in ("locked/out", "locked/deep/er/out"):
            message = refused("merge", SPAM, MOVIE, "--out", out, cwd=tmp_path, before=without_override)
            assert "locked is not writable" in message and "write elsewhere" in message
        message = refused("overlap", SPAM, MOVIE, "--plot", "locked/x.png", cwd=tmp_path, before=without_override)
        assert "locked/x.png" in message and "permission denied" in message


def test_a_read_only_file_system(tmp_path: Path) -> None:
    with mounted(tmp_path / "locked", "ro,size=64k"):
        message = refused("merge", SPAM, MOVIE, "--out", "locked/out", cwd=tmp_path)
        assert "locked is not writable" in message and "write elsewhere" in message


WRITING = {
    "merge": ["merge", SPAM, MOVIE, "--method", "cat"],
    "decompose": ["decompose", SPAM, MOVIE],
    "compress": ["compress", SPAM, "--rank", "4"],
}


@pytest.mark.parametrize("command", WRITING)
def test_a_full_disk(command: str, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=64k"):
        for out in ("out", "deep/out"):
            message = refused(*WRITING[command], "--out", f"small/{out}", cwd=tmp_path)
            assert "disk is full" in message and f"small/{out}" in message and ".partial-" not in message


def test_a_picture_on_a_full_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=64k"):
        (tmp_path / "small" / "filler").write_bytes(bytes(60 * 1024))
        message = refused("overlap", SPAM, MOVIE, "--plot", "small/x.png", cwd=tmp_path)
        assert "disk is full" in message and "small/x.png" in message


def small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, 16 * 1024))


@pytest.mark.parametrize("command", WRITING)
def test_a_file_that_may_not_grow(command: str, tmp_path: Path) -> None:
    message = refused(*WRITING[command], "--out", "out", cwd=tmp_path, before=small_files_only)
    assert "out/" in message and ".partial-" not in message
    assert "could not be written: the file is larger than is allowed" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full to print to")
@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["--help"]])
def test_a_full_disk_behind_standard_output(arguments: list[str], tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "could not be printed" in done.stderr


def has_mapped(process: int, file: str) -> bool:
    with contextlib.suppress(OSError):
        return file in Path(f"/proc/{process}/maps").read_text()
    return False


def is_importing(process: int, _: Path) -> bool:
    return has_mapped(process, "libtorch")


def is_reading(process: int, _: Path) -> bool:
    return has_mapped(process, "adapter_model.safetensors")


def is_writing(_: int, root: Path) -> bool:
    return any(root.glob(".out.partial-*/**/adapter_model.safetensors"))


def default_signals() -> None:
    """A shell that started these tests in the background has SIGINT ignored, which children inherit."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


Moment = Callable[[int, Path], bool]


def signalled_when(ready: Moment, number: signal.Signals, root: Path, *options: str) -> tuple[int, str, str] | None:
    """Stops a run when ``ready``, so that the signal surely meets it there; ``None`` when it was over before."""
    process = subprocess.Popen(
        [*COMMAND, "decompose", *(f"pool/adapter{i}" for i in range(4)), "--out", "out", *options],
        cwd=root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    try:
        while process.poll() is None and not ready(process.pid, root):
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return None if process.returncode == 0 else (process.returncode, out, err)


@pytest.fixture(scope="module")
def long_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool that takes a while to decompose and to write."""
    root = tmp_path_factory.mktemp("pool")
    modules = {f"model.layers.{i}.mlp.up_proj": (1024, 768) for i in range(24)}
    for i in range(4):
        make_adapter(root / f"adapter{i}", modules, rank=32, seed=i)
    return root


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see how far a run is")


def check_interrupted(ready: Moment, number: signal.Signals, root: Path, *options: str) -> None:
    """One line, the exit code of the signal, and all as it was; tried again where a run ends before the signal."""
    before = tree(root)
    for attempt in range(5):
        kept = shutil.copytree(root, root.parent / f"{root.name}-{attempt}", symlinks=True)
        found = signalled_when(ready, number, kept, *options)
        if found is not None:
            break
    assert found is not None, "every run was over before the signal"
    assert found == (128 + number, "", "interrupted: no output is left half-written; run the same command again\n")
    assert tree(kept) == before


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ready", [is_importing, is_reading, is_writing])
def test_an_interrupted_run_leaves_nothing(
    ready: Moment, number: signal.Signals, long_work: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "pool").symlink_to(long_work)
    check_interrupted(ready, number, root)


@needs_proc
def test_an_interrupted_overwrite_keeps_the_earlier_output(long_work: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    make_adapter(root / "out" / "shared")
    (root / "pool").symlink_to(long_work)
    check_interrupted(is_writing, signal.SIGINT, root, "--overwrite")


def test_what_a_killed_run_leaves_does_not_load_and_is_told(long_work: Path, tmp_path: Path) -> None:
    (tmp_path / "pool").symlink_to(long_work)
    assert signalled_when(is_writing, signal.SIGKILL, tmp_path) == (-signal.SIGKILL, "", "")
    (left,) = tmp_path.glob(".out.partial-*")
    for weights in left.rglob("adapter_model.safetensors"):
        assert "never finished" in refused("inspect", weights.parent, cwd=tmp_path)
    found = run("merge", SPAM, MOVIE, "--out", "out", cwd=tmp_path)
    assert found.code == 0 and f"{left} was left by a run that died and can be deleted" in found.err


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    for arguments in (["inspect", str(SPAM), "--all"], ["inspect", str(SPAM), "--json"], ["info"], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60
        )
        os.close(write)
        assert (done.returncode, done.stderr) == (0, "")


def test_names_that_look_like_markup_are_printed_as_they_are(tmp_path: Path) -> None:
    shutil.copytree(SPAM, tmp_path / "[red]a:smile:[b]")
    found = run("inspect", "[red]a:smile:[b]", cwd=tmp_path)
    assert found.code == 0 and found.out.startswith("[red]a:smile:[b]: 18 modules")


def test_a_terminal_without_greek_letters(tmp_path: Path) -> None:
    found = run("inspect", SPAM, cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert (found.code, found.err) == (0, "")
    assert found.out.isascii() and "18 modules" in found.out


def test_an_unfinished_output_does_not_load(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial-123"
    shutil.copytree(SPAM, left)
    assert json.loads((left / "adapter_config.json").read_text())
    assert "never finished" in refused("inspect", f"left={left}", cwd=tmp_path)
