"""Options that commands share: they come from one place, and mean the same everywhere."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import typer
from builders import shared_pool
from command import done, refused, tree

import fastlora as fl
from fastlora.cli.app import COMMANDS
from fastlora.cli.options import SHARED, Rank, command
from fastlora.cli.run import Run

WRITING = {
    "decompose": ["a", "b"],
    "merge": ["a", "b"],
    "compress": ["a", "--rank", "2"],
    "modulate": ["a", "--op", "shift:a:b:0.5"],
    "compose": ["a - unique(b | a)", "a=a", "b=b"],
}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for path in shared_pool(tmp_path / "pool", 2):
        path.rename(tmp_path / "ab"[len(list(tmp_path.glob("[ab]")))])
    return tmp_path


@pytest.mark.parametrize("verb", WRITING)
def test_memory_and_device_change_no_bit(verb: str, here: Path) -> None:
    found = []
    for options in ([], ["--memory", "1MiB"], ["--device", "cpu", "--memory", "1GiB"]):
        done(verb, *WRITING[verb], "-o", "out", "--overwrite", *options, cwd=here)
        found.append(tree(here / "out"))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("verb", WRITING)
def test_a_bound_that_is_no_size(verb: str, here: Path) -> None:
    assert "memory='much'" in refused(verb, *WRITING[verb], "-o", "out", "--memory", "much", cwd=here)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("verb", WRITING)
def test_a_device_that_is_not_there(verb: str, here: Path) -> None:
    message = refused(verb, *WRITING[verb], "-o", "out", "--device", "cuda", cwd=here)
    assert "device 'cuda' cannot be used: torch" in message
    assert not (here / "out").exists()


def test_a_command_finds_shared_options_in_its_run() -> None:
    seen: list[tuple[Run, int | None]] = []

    @command("as_json", "memory")
    def verb(run: Run, rank: Rank = None) -> None:
        """What it does."""
        seen.append((run, rank))

    assert list(inspect.signature(verb).parameters) == ["rank", "memory", "as_json"]
    assert (verb.__name__, verb.__doc__) == ("verb", "What it does.")
    app = typer.Typer()
    app.command()(verb)
    app(["--rank", "3", "--memory", "1MiB", "--json"], standalone_mode=False)
    ((run, rank),) = seen
    assert (rank, run.memory, run.as_json, run.quiet, run.device) == (3, "1MiB", True, False, "auto")


def test_an_option_is_declared_once() -> None:
    for function in COMMANDS:
        for name, parameter in inspect.signature(function).parameters.items():
            if name in SHARED:
                assert parameter.annotation is SHARED[name]


def test_every_merge_method_is_in_the_help(tmp_path: Path) -> None:
    told = done("merge", "--help", cwd=tmp_path).out.partition("--method")[2].partition("--weights-by")[0]
    listed = " ".join(told.split()).partition(":")[0].partition(" ")[2]  # behind the type
    assert listed.split(", ") == list(fl.methods())
