"""The face of the package: every public name resolves, and its docstring says what a user must know before a call."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastlora as fl
from fastlora.errors import FastloraError, InputError

PUBLIC = {name: getattr(fl, name, None) for name in fl.__all__ if name != "__version__"}
MODULES: dict[str, Any] = {n: thing for n, thing in PUBLIC.items() if inspect.ismodule(thing) and not callable(thing)}
NAMES: dict[str, Any] = {name: thing for name, thing in PUBLIC.items() if callable(thing)}
NAMES |= {f"{room}.{name}": getattr(module, name) for room, module in MODULES.items() for name in module.__all__}
CLASSES = {name: thing for name, thing in NAMES.items() if inspect.isclass(thing)}
FUNCTIONS = {name: thing for name, thing in NAMES.items() if name not in CLASSES}

NEVER_FAILS = {"methods"}
"""Functions without a wrong argument. Every other one says what it raises."""

COMPUTES_NOTHING = {"methods", "use_backend"}
COMPUTES_NOTHING |= {f"dipm.{operator}" for operator in ("interpolate", "remove", "reverse", "scale", "shift")}
"""Functions that read no tensor. Every other one says what it costs."""

RESULTS = {"Decomposition", "Sweep", "ops.Chain"}
"""Classes whose objects come from functions: nobody calls them with arguments."""


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def errors(kind: type[BaseException] = FastloraError) -> Iterator[str]:
    """The names of the package's errors that are known by now."""
    yield kind.__name__
    for sub in kind.__subclasses__():
        yield from errors(sub)


def summary_lacks(doc: str) -> list[str]:
    """The first paragraph is a sentence (which may lead to a formula or a list)."""
    first = doc.partition("\n\n")[0]
    return [] if len(first.split()) > 2 and first.endswith((".", ":", '."')) else ["a summary that is a sentence"]


def parameters_lack(doc: str, call: Callable[..., Any]) -> list[str]:
    """Every parameter is named."""
    hidden = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [p.name for p in inspect.signature(call).parameters.values() if p.kind not in hidden and p.name != "self"]
    return [f"the parameter {name}" for name in names if name not in words(doc)]


def errors_lack(doc: str) -> list[str]:
    """What is said to be raised exists."""
    known = {*errors(), *dir(builtins)}
    return [f"an error called {name}" for name in re.findall(r"\w+Error\b", doc) if name not in known]


def raises(call: Callable[..., Any]) -> bool:
    """Whether the function itself raises something."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(call))))
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


def function_lacks(function: Callable[..., Any], *, fails: bool = True, computes: bool = True) -> list[str]:
    """What is missing in the docstring of a public function."""
    doc = inspect.getdoc(function) or ""
    missing = summary_lacks(doc) + parameters_lack(doc, function) + errors_lack(doc)
    missing += ["what it raises"] if fails and "Raises" not in words(doc) else []
    return missing + (["its cost"] if computes and not {"Cost", "Costs"} & words(doc) else [])


def member_lacks(member: Any) -> list[str]:
    """What is missing in the docstring of a public method or property; errors, where its own body raises them."""
    doc = inspect.getdoc(member) or ""
    missing = summary_lacks(doc) + errors_lack(doc)
    call: Any = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    if not isinstance(member, property):
        missing += [m for m in parameters_lack(doc, call) if m != "the parameter cls"]
    told = "rais" in doc.lower() or re.search(r"\w+Error\b", doc)
    return missing + (["what it raises"] if raises(call) and not told else [])


def own_members(kind: type) -> dict[str, Any]:
    """Public methods and properties that the class itself defines."""
    taken = (property, classmethod, staticmethod)
    found = {n: m for n, m in vars(kind).items() if inspect.isfunction(m) or isinstance(m, taken)}
    return {n: m for n, m in found.items() if not n.startswith("_")}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves_and_has_a_summary(name: str) -> None:
    assert name in dir(fl) and PUBLIC[name] is getattr(fl, name)
    assert not summary_lacks(inspect.getdoc(getattr(fl, name)) or ""), f"fastlora.{name} has no summary"


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'merger'"):
        fl.merger  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_of_functions_say_what_a_user_must_know(name: str) -> None:
    missing = function_lacks(FUNCTIONS[name], fails=name not in NEVER_FAILS, computes=name not in COMPUTES_NOTHING)
    assert not missing, f"the docstring of {name} lacks {', '.join(missing)}"


@pytest.mark.parametrize("name", CLASSES)
def test_docstrings_of_classes_and_their_members_say_what_a_user_must_know(name: str) -> None:
    kind = CLASSES[name]
    doc = inspect.getdoc(kind) or ""
    missing = summary_lacks(doc) + errors_lack(doc)
    if name not in RESULTS and not issubclass(kind, Exception):
        missing += parameters_lack(doc, kind)
    assert not missing, f"the docstring of {name} lacks {', '.join(missing)}"
    for member, thing in own_members(kind).items():
        missing = member_lacks(thing)
        assert not missing, f"the docstring of {name}.{member} lacks {', '.join(missing)}"


def test_exceptions_to_the_rules_are_public_names() -> None:
    assert NEVER_FAILS | COMPUTES_NOTHING <= set(FUNCTIONS)
    assert set(CLASSES) >= RESULTS


def poor(pool: object, weight: float) -> None:
    """does something with the pool"""
    raise InputError("no")


def wrong(pool: object) -> None:
    """Merges a pool.

    Raises:
        MergeError: never. Cost: none.
    """


def test_poor_docstrings_are_found() -> None:
    """The rules of this file can fail."""
    lacks = ["a summary that is a sentence", "the parameter weight", "what it raises"]
    assert member_lacks(poor) == lacks
    assert function_lacks(poor) == [*lacks, "its cost"]
    assert function_lacks(wrong) == ["an error called MergeError"]
    assert "its cost" in function_lacks(test_a_name_that_is_not_public_is_an_attribute_error)
