"""Merge methods by name: what ``method=`` and ``--method`` accept. One file of ``merging/methods/`` a method.

A method is one function with one decorator. Its name is the function's, which is that of its file. Its parameters are
the function's keyword-only ones: names, types and defaults come from the signature, meanings from the docstring.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.parameters import Parameter, parameters_of
from fastlora.errors import InputError
from fastlora.merging.input_rows import Statistics
from fastlora.merging.listing import METHODS, method_files

Form = Literal["weights", "cores", "tiles", "factors"]
"""What a method is a function of; ``merging/forms/`` has a driver for each."""

Program = TypeVar("Program", bound=Callable[..., Any])

FACTS: Mapping[Form, Mapping[str, str]] = {
    "weights": {"cost": "Gram", "rank": "Σrᵢ, or cut"},
    "cores": {"cost": "Gram", "rank": "cut, largest rᵢ by default"},
    "tiles": {"cost": "tiles", "rank": "cut"},
    "factors": {"cost": "none", "rank": "Σrᵢ"},
}
"""What the methods of a form have in common, unless they say something else. ``cost``: the classes of docs/methods.md;
``rank``: of the result, in a module; ``needs``: the adapters, for all."""

TAKEN = ("pool", "weights", "method", "data", "memory", "device")
"""Parameters of :func:`fastlora.merge` itself."""

Idle = Callable[[Mapping[str, object]], Mapping[str, str]]
"""From the values of all parameters to those that have no effect beside the others: ``{name: what makes it idle}``."""

_registry: dict[str, Method] = {}


def none_idle(values: Mapping[str, object]) -> Mapping[str, str]:
    """Every parameter has its effect."""
    return {}


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method.

    ``name``; ``form``: what it is a function of; ``summary``: one line with its formula; ``parameters``:
    ``{name: parameter}``, each with ``kind``, ``default``, ``required``, ``choices`` and ``help``; ``source``: the
    paper or the section of MATH; ``needs``: what must be given beside weights; ``cost``: its class; ``rank``: that of
    the result in a module; ``takes_data``: whether it uses statistics of inputs; ``idle``: which parameters have no
    effect beside the others.
    """

    name: str
    form: Form
    summary: str
    parameters: Mapping[str, Parameter]
    source: str
    run: Callable[..., Adapter]
    needs: str
    cost: str
    rank: str
    takes_data: bool = False
    idle: Idle = none_idle

    def checked(self, parameters: Mapping[str, object]) -> dict[str, object]:
        """The values of all parameters, of the right type. Raises :class:`InputError` for those that it does not take,
        that it needs, and that have no effect beside the others. ``None`` counts as not given."""
        given = {name: value for name, value in parameters.items() if value is not None}
        unknown = [name for name in given if name not in self.parameters]
        if unknown:
            takes = ", ".join(self.parameters) or "no parameters"
            raise InputError(f"method {self.name!r} does not take {', '.join(unknown)}: it takes {takes}")
        for parameter in self.parameters.values():
            if parameter.required and parameter.name not in given:
                raise InputError(f"method {self.name!r} needs {parameter.name}: {parameter.help}")
        owner = f"method {self.name!r}"
        values = {n: p.default for n, p in self.parameters.items() if not p.required}
        values |= {n: self.parameters[n].convert(v, owner) for n, v in given.items()}
        idle = self.idle(values)
        useless = next((name for name in given if name in idle), None)
        if useless is not None:
            raise InputError(f"{owner}: {useless} has no effect with {idle[useless]}; leave it out")
        return values

    def __call__(
        self, pool: Pool, weights: Mapping[str, float], data: Statistics | None = None, **parameters: object
    ) -> Adapter:
        values = self.checked(parameters)
        given = {name: value for name, value in parameters.items() if value is not None}
        idle = self.idle(values)
        if not self.takes_data and data is not None:
            raise InputError(f"method {self.name!r} uses no statistics of inputs; leave out data (`--data`)")
        inputs = [_of_all(data, pool, self.name)] if self.takes_data else []
        merged = self.run(pool, weights, *inputs, **values)
        return _as_merge(merged, self.name, pool, weights, {n: values[n] for n in given}, idle)


def _as_merge(
    merged: Adapter,
    name: str,
    pool: Pool,
    weights: Mapping[str, float],
    given: Mapping[str, object],
    idle: Collection[str],
) -> Adapter:
    """A result whose provenance is the recipe that makes it again: with all parameters that were ``given``, and without
    those that had no effect."""
    told = merged.provenance
    used = told.get("parameters")
    parameters = {**(used if isinstance(used, dict) else {}), **given}
    measured = {k: v for k, v in told.items() if k not in ("merge", "parameters", "of", "compress", "sum")}
    provenance = {
        "merge": name,
        "parameters": {n: v for n, v in parameters.items() if n not in idle},
        "of": told.get("of", [{"weight": weights[a.name], "of": a.provenance} for a in pool.adapters]),
        **measured,
    }
    return replace(merged, provenance=provenance)


def _of_all(data: Statistics | None, pool: Pool, method: str) -> Statistics:
    """The statistics, which have those of every adapter of a pool."""
    if data is None:
        raise InputError(
            f"method {method!r} needs the inputs of every adapter's modules: data=`fastlora.statistics(model, "
            "{name: batches, …}, pool.modules)`, saved: `--data FILE`"
        )
    missing = [n for n in pool.names if n not in data.of]
    if missing:
        raise InputError(
            f"method {method!r}: the statistics have {', '.join(data.of) or 'no adapter'} and lack "
            f"{', '.join(missing)}; collect them too, or join two with `|` (`--data` twice)"
        )
    return data


def method(
    form: Form, *, summary: str, source: str, idle: Idle = none_idle, **facts: str
) -> Callable[[Program], Program]:
    """Registers ``run(pool, weights, *, …) -> Adapter``, a method that needs the whole pool at once.

    ``idle``: which of its parameters have no effect beside the others. ``facts``: its ``needs``, ``cost`` and ``rank``
    where they are not those of the form, :data:`FACTS`.
    """

    def register(run: Program) -> Program:
        _add(run, _described(run.__name__, form, summary, parameters_of(run), source, run, facts, idle))
        return run

    return register


def driven(
    form: Form,
    drive: Callable[..., Adapter],
    summary: str,
    source: str,
    *fixed: object,
    idle: Idle = none_idle,
    **facts: str,
) -> Callable[[Program], Program]:
    """Registers a program that ``drive(program, *fixed, pool, weights, *, …)`` runs.

    The method takes the driver's parameters and the program's. ``idle`` and ``facts`` as in :func:`method`.
    """

    def register(program: Program) -> Program:
        parameters = parameters_of(drive) | parameters_of(program)
        run = functools.partial(drive, program, *fixed)
        _add(program, _described(program.__name__, form, summary, parameters, source, run, facts, idle))
        return program

    return register


def _described(
    name: str,
    form: Form,
    summary: str,
    parameters: Mapping[str, Parameter],
    source: str,
    run: Callable[..., Adapter],
    facts: Mapping[str, str],
    idle: Idle,
) -> Method:
    told = {"needs": "adapters", **FACTS[form], **facts}
    takes_data = "data" in inspect.signature(run).parameters
    return Method(name, form, summary, parameters, source, run, **told, takes_data=takes_data, idle=idle)


def _add(function: Callable[..., Any], method: Method) -> None:
    room, _, file = function.__module__.rpartition(".")
    if room == METHODS and file != method.name:
        raise TypeError(f"the method {method.name!r} stands in {file}.py: a method has the name of its file")
    taken = [name for name in method.parameters if name in TAKEN]
    if taken:
        raise TypeError(f"method {method.name!r}: the parameter {taken[0]!r} is one of fastlora.merge itself")
    _registry[method.name] = method


def unregister(name: str) -> None:
    """Forgets a method that was registered."""
    _registry.pop(name, None)


def method_names() -> list[str]:
    """The names of all methods, those of files that nobody imported too."""
    return sorted({*_registry, *method_files()})


def all_methods() -> dict[str, Method]:
    """Every merge method, in the order of names."""
    return {name: find_method(name) for name in method_names()}


def find_method(name: str) -> Method:
    """The method of that name; its file is imported when it is first asked for."""
    if name not in _registry and name in method_files():
        importlib.import_module(f"{METHODS}.{name}")
    if name not in _registry:
        raise InputError(
            f"method {name!r} does not exist: use one of {', '.join(method_names())} (`fastlora.methods()`)"
        )
    return _registry[name]
