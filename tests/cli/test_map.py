"""``--map OLD=NEW``: names of modules by hand, on every command that reads adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import make_adapter
from command import done, refused

import fastlora as fl

NAMES = {"q_proj": (8, 6), "v_proj": (8, 6)}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Two adapters of one text model; the names of the second are those of another tower."""
    make_adapter(tmp_path / "a", {f"model.layers.0.{m}": s for m, s in NAMES.items()}, seed=1)
    make_adapter(tmp_path / "b", {f"model.visual.layers.0.{m}": s for m, s in NAMES.items()}, seed=1)
    return tmp_path


POOLS = {
    "merge": ["a:0.5", "b:0.5", "--rank", "4", "-o", "out"],
    "compose": ["0.5*a + 0.5*b", "a=a", "b=b", "-o", "out"],
    "modulate": ["a", "--op", "interpolate:b:0.5", "-o", "out"],
    "decompose": ["a", "b", "-o", "out"],
}
MAP = ["--map", "model.visual=model"]


@pytest.mark.parametrize("verb", POOLS)
def test_commands_take_the_names_that_are_given(verb: str, here: Path) -> None:
    done(verb, *POOLS[verb], *MAP, cwd=here)
    out = fl.load(here / "out" / "shared" if verb == "decompose" else here / "out")
    assert set(out.modules) == {f"model.layers.0.{m}" for m in NAMES}
    a = fl.load(here / "a")
    for module in a:
        assert float((out.delta(module) - a.delta(module)).norm()) <= 1e-4 * float(a.delta(module).norm())


def test_overlap(here: Path) -> None:
    found = done("overlap", "a", "b", *MAP, "--json", cwd=here).json()
    assert found["cosine"][0][1] == pytest.approx(1.0)


@pytest.mark.parametrize("verb", ["compress", "inspect"])
def test_single_adapters(verb: str, here: Path) -> None:
    options = ["--rank", "4", "-o", "out"] if verb == "compress" else ["--json"]
    run = done(verb, "b", *options, "--map", "model.visual.layers=model.layers", cwd=here)
    names = fl.load(here / "out").modules if verb == "compress" else list(run.json()["modules"])
    assert {n if isinstance(n, str) else n["module"] for n in names} == {f"model.layers.0.{m}" for m in NAMES}


def test_parts_that_may_be_two_need_a_word(here: Path) -> None:
    message = refused("merge", "a", "b", "--rank", "4", "-o", "out", cwd=here)
    apart = "model.visual.layers=model.visual.layers"
    assert "model.layers.0.q_proj" in message and "--map OLD=NEW" in message and f"--map {apart}" in message
    assert "end alike" not in done("merge", "a", "b", "--rank", "4", "-o", "out", "--map", apart, cwd=here).err
    assert len(fl.load(here / "out").modules) == 4


def test_what_stays_apart_is_told(here: Path) -> None:
    make_adapter(here / "c", {f"model.text.layers.0.{m}": s for m, s in NAMES.items()}, seed=1)
    run = done("merge", "b", "c", "--rank", "4", "-o", "out", cwd=here)
    assert "end alike" in run.err and "model.text.layers.0.q_proj in 'c'" in run.err and "--map OLD=NEW" in run.err


@pytest.mark.parametrize("text, words", [
    ("model", "write OLD=NEW"), ("=", "write OLD=NEW"), ("mod=x", "no name that could change begins with 'mod'"),
    ("model.layers.0.q_proj=model.layers.0.v_proj", "would both be called"),
])  # fmt: skip
@pytest.mark.parametrize("verb", ["merge", "overlap", "compose", "modulate", "decompose", "inspect", "compress"])
def test_wrong_ones_are_refused(verb: str, text: str, words: str, here: Path) -> None:
    given = {**POOLS, "overlap": ["a", "b"], "inspect": ["a"], "compress": ["a", "--rank", "2", "-o", "out"]}[verb]
    assert words in refused(verb, *given, "--map", text, cwd=here)
    assert not (here / "out").exists()


def test_twice(here: Path) -> None:
    assert "given twice" in refused("inspect", "a", "--map", "model=x", "--map", "model.=y", cwd=here)
