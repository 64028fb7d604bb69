"""Merge methods by name: found as files, their parameters read from signatures, checked and converted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import mixed
import pools
import pytest
import torch
from builders import make_adapter
from pools import MODULE
from typer.testing import CliRunner

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.cli.app import app
from fastlora.core.parameters import REQUIRED, parameters_of
from fastlora.core.updates import Update
from fastlora.errors import FastloraError
from fastlora.merging import methods as package
from fastlora.merging import registry
from fastlora.merging.listing import method_files

FILE = '''
"""One adapter, scaled: a method that nobody needs."""

from __future__ import annotations

from typing import Literal

from fastlora.core.sums import sum_updates
from fastlora.merging.forms import factors


@factors.method(summary="one of the updates, scaled", source="nowhere")
def throw_away(terms, *, which: int, factor: float = 1.0, sign: Literal["plus", "minus"] = "plus"):
    """Takes one of the terms.

    Args:
        which: the position of the adapter that counts,
            from 0 on
        factor: what it is multiplied by
        sign: whether it is negated
    """
    weight, update = terms[which]
    return sum_updates([(factor * (1 if sign == "plus" else -1), update)])
'''


def example(
    pool: Pool, weights: Mapping[str, float], *, t: float, n: int = 3, on: bool | None = None, word: str = "a b"
) -> Adapter:
    """A whole merge.

    Args:
        t: a number
        n: a count
        on: a switch
        word: any word

    Returns:
        nothing of use.
    """
    notes = (repr((t, n, on, word)),)
    return Adapter("example", pool.adapters[0].updates, notes=notes)


@pytest.fixture
def new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a method whose file lies in a folder that the package is extended by."""
    (tmp_path / "throw_away.py").write_text(FILE)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    yield "throw_away"
    registry.unregister("throw_away")
    sys.modules.pop(f"{package.__name__}.throw_away", None)


@pytest.fixture
def pool() -> Pool:
    return pools.make_pool(pools.planted(2))


def test_a_file_is_all_that_a_method_needs(new_file: str, pool: Pool) -> None:
    found = fl.methods()[new_file]
    assert list(fl.methods()) == sorted(fl.methods()) and new_file in fl.methods()
    assert (found.name, found.form, found.source) == (new_file, "factors", "nowhere")
    which, factor, sign = found.parameters.values()
    assert which.required and which.kind is int and which.default is REQUIRED
    assert which.help == "the position of the adapter that counts, from 0 on"
    assert (factor.kind, factor.default, factor.required) == (float, 1.0, False)
    assert (sign.kind, sign.choices, str(sign)) == (str, ("plus", "minus"), "sign=plus")
    merged = fl.merge(pool, method=new_file, which=1, factor=3, sign="minus")
    assert merged.name == new_file and merged.modules == [MODULE]
    expected = -3 * pools.exact(pool["a1"].updates[MODULE])
    assert mixed.distance(merged, MODULE, expected) <= 1e-15  # a product by −3 rounds once
    given = merged.provenance["parameters"]
    assert given == {"which": 1, "factor": 3.0, "sign": "minus"} and isinstance(given["factor"], float)


def test_the_command_line_takes_its_parameters(new_file: str, tmp_path: Path) -> None:
    """In this process, where the package has another folder."""
    a, b = (str(make_adapter(tmp_path / name, seed=i)) for i, name in enumerate("ab"))
    out = tmp_path / "out"
    arguments = ["merge", a, b, "--method", new_file, "--set", "which=1", "--set", "factor=-0.5", "-o", str(out)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    merged, source = fl.load(out), fl.load(b)
    assert merged.provenance["adapter"] == "out"
    for module in source.modules:
        expected = -0.5 * source.delta(module).double()
        # Saved as float32: B is rounded once, which moves no element by more than half an eps of its size.
        assert mixed.distance(merged, module, expected) <= torch.finfo(torch.float32).eps
    listed = CliRunner().invoke(app, ["methods", new_file]).output
    assert listed.startswith("throw_away (factors): one of the updates, scaled\n    from nowhere\n")
    assert "--set which=NUMBER (needed): the position of the adapter that counts, from 0 on\n" in listed
    assert "--set sign=plus|minus (plus by default): whether it is negated\n" in listed
    data = json.loads(CliRunner().invoke(app, ["methods", "--json"]).output)
    assert set(data) == set(fl.methods())
    assert data[new_file]["parameters"]["which"]["required"] is True


@pytest.mark.parametrize(("settings", "said"), [
    (["which"], "--set 'which': write NAME=VALUE, such as density=0.3"),
    (["=1"], "write NAME=VALUE"), (["which="], "write NAME=VALUE"),
    (["which=1", "which=2"], "--set 'which=2': which is given twice"),
    (["rank=2"], "--set 'rank=2': use the option --rank"),
    (["weights=2"], "adapters and weights are arguments, PATH:WEIGHT"),
    (["which=1.5"], "method 'throw_away': which='1.5' is not a whole number"),
    (["which=0", "mode=x"], "method 'throw_away' does not take mode: it takes which, factor, sign"),
    (["which=0", "sign=up"], "method 'throw_away': sign='up' does not exist: use one of plus, minus"),
    ([], "method 'throw_away' needs which: the position of the adapter that counts"),
])  # fmt: skip
def test_settings_that_are_refused(new_file: str, tmp_path: Path, settings: list[str], said: str) -> None:
    path = str(make_adapter(tmp_path / "a"))
    arguments = ["merge", path, "--method", new_file, "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, *(x for text in settings for x in ("--set", text))])
    assert isinstance(done.exception, FastloraError) and said in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_names_come_from_files_and_nothing_else_is_imported(new_file: str) -> None:
    assert new_file in method_files() and f"{package.__name__}.{new_file}" not in sys.modules
    with pytest.raises(fl.InputError, match=r"method 'nothing' does not exist: use one of .*cat, .*, throw_away"):
        registry.find_method("nothing")
    assert f"{package.__name__}.{new_file}" not in sys.modules


@pytest.mark.parametrize(("given", "seen"), [
    ({"t": 1}, "(1.0, 3, None, 'a b')"), ({"t": "1e-3", "n": "7", "on": "True"}, "(0.001, 7, True, 'a b')"),
    ({"t": -2.5, "n": 0, "on": False, "word": "x"}, "(-2.5, 0, False, 'x')"),
    ({"t": 1, "n": None, "word": None}, "(1.0, 3, None, 'a b')"),
])  # fmt: skip
def test_values_are_converted(pool: Pool, given: dict[str, Any], seen: str) -> None:
    with mixed.registered(registry.method("factors", summary="x", source="y"), example) as name:
        assert fl.merge(pool, method=name, **given).notes == (seen,)


@pytest.mark.parametrize(("given", "said"), [
    ({}, "method 'example' needs t: a number"), ({"t": None}, "method 'example' needs t: a number"),
    ({"t": "x"}, "method 'example': t='x' is not a finite number; t: a number"),
    ({"t": True}, "t=True is not a finite number"), ({"t": float("nan")}, "t=nan is not a finite number"),
    ({"t": "inf"}, "t='inf' is not a finite number"), ({"t": [1]}, r"t=\[1\] is not a finite number"),
    ({"t": 1, "n": 2.0}, "n=2.0 is not a whole number; n: a count"), ({"t": 1, "n": True}, "n=True is not a whole"),
    ({"t": 1, "on": 1}, "on=1 is not true or false"), ({"t": 1, "word": 3}, "word=3 is not a word"),
    ({"t": 1, "u": 2, "v": 3}, "method 'example' does not take u, v: it takes t, n, on, word"),
    ({"t": 1, "rank": 2}, "method 'example' does not take rank"),
])  # fmt: skip
def test_values_that_are_refused(pool: Pool, given: dict[str, Any], said: str) -> None:
    with mixed.registered(registry.method("factors", summary="x", source="y"), example) as name:
        with pytest.raises(fl.InputError, match=said):
            fl.merge(pool, method=name, **given)


def test_a_forgotten_method_is_unknown(pool: Pool) -> None:
    with mixed.registered(registry.method("factors", summary="x", source="y"), example):
        assert "example" in fl.methods()
    assert "example" not in fl.methods()
    with pytest.raises(fl.InputError, match="method 'example' does not exist"):
        fl.merge(pool, method="example")


def silent(terms: object, *, t: float) -> Update:
    """Says nothing of its parameter.

    Args:
        terms: what it gets.
    """
    raise NotImplementedError


def odd(terms: object, *, t: list[float]) -> Update:
    """Takes what no user can type.

    Args:
        t: numbers.
    """
    raise NotImplementedError


def greedy(terms: object, *, device: str = "cpu") -> Update:
    """Has a parameter of the merge itself.

    Args:
        device: where.
    """
    raise NotImplementedError


def untyped(terms: object, *, t) -> Update:  # type: ignore[no-untyped-def]
    """Has no annotation.

    Args:
        t: a number.
    """
    raise NotImplementedError


@pytest.mark.parametrize(("program", "said"), [
    (silent, "silent: the parameter 't' has no line in the section Args of the docstring"),
    (odd, "odd: the parameter 't' needs a type: one of bool, int, float, str"),
    (untyped, "untyped: the parameter 't' needs a type"),
    (greedy, "method 'greedy': the parameter 'device' is one of fastlora.merge itself"),
])  # fmt: skip
def test_functions_that_cannot_be_registered(program: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        registry.method("factors", summary="x", source="y")(program)
    assert program.__name__ not in fl.methods()


def test_a_method_has_the_name_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_name.py").write_text(FILE)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    with pytest.raises(TypeError, match=r"the method 'throw_away' stands in other_name\.py"):
        registry.find_method("other_name")


def described(*, first: Literal["a", "b"] = "a", second: float | None = None, third: int = 1) -> None:
    """Has a section like those of other functions.

    Args:
        first: one line.
        second: more
            than one,

            with a gap.
        third: the last: with a colon

    Returns:
        third: not this.
    """


def test_meanings_are_those_of_the_docstring() -> None:
    found = parameters_of(described)
    assert {n: p.help for n, p in found.items()} == {
        "first": "one line.", "second": "more than one, with a gap.", "third": "the last: with a colon",
    }  # fmt: skip
    assert [str(p) for p in found.values()] == ["first=a", "second: float", "third=1"]


def test_every_method_is_fully_described() -> None:
    for name, method in fl.methods().items():
        assert method.name == name and method.summary and method.source
        assert method.form in ("weights", "cores", "tiles", "factors")
        assert all(p.help and p.name == n for n, p in method.parameters.items())
