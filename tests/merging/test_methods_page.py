"""docs/methods.md: its table is what the registry says, and its examples are methods."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mixed
import pools
import pytest
import torch
from pools import MODULE
from torch import Tensor

import fastlora as fl
from fastlora.merging import methods as package
from fastlora.merging import registry
from fastlora.merging.registry import Method

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
EXAMPLES = {
    match[1]: text
    for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    if (match := re.search(r"^def (\w+)\(", text, re.MULTILINE))
}


def row(method: Method) -> str:
    """The line of the table that describes a method."""
    parameters = ", ".join(f"`{p}`" for p in method.parameters.values())
    cells = f"`{method.name}`", method.form, method.summary, parameters, method.needs, method.cost, method.rank
    return f"| {' | '.join(cells)} | {method.source} |"


def test_classes_of_cost_are_explained() -> None:
    for method in fl.methods().values():
        for cost in method.cost.split(", "):
            assert re.search(rf"^\* \*\*Cost\.\*\*.*?`{cost}`", PAGE, re.DOTALL | re.MULTILINE), cost


def described() -> dict[str, str]:
    """The lines of the table by method."""
    lines = PAGE.partition("| method | form | what it is |")[2].partition("\n\n")[0].splitlines()[2:]
    return {line.split("`")[1]: line for line in lines}


def test_the_table_is_that_of_the_registry() -> None:
    known = fl.methods()
    assert list(described()) == sorted(described()) and set(described()) <= set(known)
    for name, line in described().items():
        assert line == row(known[name])


def test_a_method_that_is_not_in_the_table_is_in_the_changelog() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("## Unreleased")[2].partition("\n## ")[0]
    assert changes
    lacking = [name for name in fl.methods() if name not in described() and f"`{name}`" not in changes]
    assert not lacking, f"add to docs/methods.md: {[row(fl.methods()[n]) for n in lacking]}"


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The examples of the page as files of the package."""
    for name, text in EXAMPLES.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    yield list(EXAMPLES)
    for name in EXAMPLES:
        registry.unregister(name)
        sys.modules.pop(f"{package.__name__}.{name}", None)


def soft(matrices: Tensor) -> Tensor:
    U, sigma, Vt = torch.linalg.svd(matrices.sum(0), full_matrices=False)
    return U @ torch.diag((sigma - 0.25 * sigma[0]).clamp(min=0)) @ Vt


def pruned(matrices: Tensor) -> Tensor:
    least = matrices.abs().flatten(1).sort(descending=True).values[:, int(0.3 * matrices[0].numel()) - 1]
    return torch.where(matrices.abs() >= least[:, None, None], matrices, 0.0).sum(0)


DEFINITIONS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "one_norm": ({"norm": 2.0}, lambda x: (2 * x / x.flatten(1).norm(dim=1)[:, None, None]).sum(0)),
    "soft": ({"by": 0.25, "energy": 1.0}, soft),
    "pruned": ({"density": 0.3, "rank": 40}, pruned),
    "largest": ({"rank": 40}, lambda x: x.gather(0, x.abs().argmax(0, keepdim=True))[0]),
    "mean_of_present": ({}, lambda x: x.mean(0)),
}


def test_the_examples_are_methods(examples: list[str]) -> None:
    pool = pools.make_pool(pools.planted(3))
    weights = {"a0": 0.5, "a1": -1.0, "a2": 2.0}
    matrices = mixed.dense(pool, MODULE, weights)
    assert sorted(examples) == sorted(DEFINITIONS) and set(examples) <= set(fl.methods())
    for name, (parameters, definition) in DEFINITIONS.items():
        merged = fl.merge(pool, weights, method=name, **parameters)
        # Float64 throughout; the frames of these pools are orthonormal to 1e-13.
        assert mixed.distance(merged, MODULE, definition(matrices)) <= 1e-10, name
