"""CONTRIBUTING's recipes: each is put into a copy of the package, with its test, and must pass and keep the rules."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = re.compile(r"^```python\n# (?P<path>\S+\.py)(?:, after (?P<after>[^\n]*))?\n(?P<code>.*?)^```$", re.M | re.S)


class Step(NamedTuple):
    """Some lines of a recipe: a new file, or what goes behind the line of a file that starts with ``after``."""

    path: str
    after: str | None
    code: str


def steps() -> list[Step]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return [Step(m["path"], m["after"], m["code"]) for m in RECIPE.finditer(text)]


def follow(step: Step, tree: Path) -> None:
    """Does what a step says in a copy of the package."""
    file = tree / step.path
    if step.after is None:
        assert not file.exists(), f"{step.path} is there already"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(step.code, encoding="utf-8")
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    at = [i for i, line in enumerate(lines) if line.startswith(step.after)]
    assert len(at) == 1, f"{step.path} has {len(at)} lines that start with {step.after!r}"
    lines.insert(at[0] + 1, step.code)
    file.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package in which all recipes were followed."""
    copy = tmp_path_factory.mktemp("recipes")
    for package in ("fastlora", "tritonkernels"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for step in steps():
        follow(step, copy)
    return copy


def run(tree: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def tool(name: str) -> str:
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else name


def test_every_kind_of_recipe_is_there() -> None:
    """A recipe whose block is written in another way would not be tried."""
    rooms = {step.path.split("/")[1] for step in steps() if step.path.startswith("fastlora/")}
    assert rooms == {"merging", "formats", "dialects", "ops", "reference", "backends", "integrations"}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert text.count("```python\n") == len(steps())


@pytest.mark.parametrize("test", [step.path for step in steps() if step.path.startswith("tests/")])
def test_recipes_pass_their_own_tests(test: str, tree: Path) -> None:
    done = run(tree, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", test)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout


def test_recipes_keep_the_rules_of_the_house(tree: Path) -> None:
    done = run(tree, tool("lint-imports"), "--no-cache")
    assert done.returncode == 0, done.stdout
    done = run(tree, tool("ruff"), "check", "--no-cache", *(s.path for s in steps()))
    assert done.returncode == 0, done.stdout


def test_a_recipe_that_breaks_a_rule_is_seen(tree: Path) -> None:
    """The contracts are in force in the copy: an op that imports a format is refused."""
    file = tree / "fastlora" / "ops" / "trace.py"
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole + "\nfrom fastlora.formats import read\n", encoding="utf-8")
    done = run(tree, tool("lint-imports"), "--no-cache")
    file.write_text(whole, encoding="utf-8")
    assert done.returncode != 0 and "fastlora.ops.trace -> fastlora.formats" in done.stdout
