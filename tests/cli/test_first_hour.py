"""What a new user runs into in the first hour: one clear message, exit code 2, nothing left behind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import MODULES, make_adapter, make_factors, peft_tensors, write_peft
from command import ADAPTERS, COMMAND, DATA, HANGS, environment, refused, run
from compiled import needs_kernels

pytestmark = pytest.mark.portable

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
    "dora": (lambda _: DATA / "movie_dora", ["'movie_dora' is a DoRA adapter", "--base BASE"]),
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
    "threshold no number": (
        ["decompose", SPAM, MOVIE, "-o", "out", "--threshold", "high"],
        ["threshold='high'", "number"],
    ),
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
    "unknown backend": (["decompose", SPAM, MOVIE, "-o", "out", "--backend", "gpu"], ["'gpu'", "torch, reference"]),
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
        pytest.param("FASTLORA_ISA", "sse9", "no such instruction set", marks=needs_kernels),
        ("FASTLORA_BACKEND", "gpu", "does not exist"),
        ("FASTLORA_BACKEND", "triton", "cannot be used"),
    ],
)
def test_a_wrong_environment_variable_is_refused(variable: str, value: str, word: str, tmp_path: Path) -> None:
    message = refused("decompose", SPAM, MOVIE, "--out", "out", cwd=tmp_path, env={variable: value})
    assert value in message and word in message


@needs_kernels
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


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    for arguments in (["inspect", str(SPAM), "--all"], ["inspect", str(SPAM), "--json"], ["info"], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, env=environment(), timeout=HANGS
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
