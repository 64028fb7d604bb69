"""Methods of recipes: those of mergekit as ours, with its defaults; any other is one of the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastlora.errors import InputError
from fastlora.files.json_files import shown
from fastlora.merging.recipe_settings import Setting
from fastlora.merging.registry import method_names


@dataclass(frozen=True, slots=True)
class Theirs:
    """A method of mergekit: ours with ``parameters``; whether it divides by weights and restores sizes by default.
    ``combines``: dividing is a choice, ``combine=mean`` or ``sum``."""

    method: str
    normalize: bool
    rescale: bool = False
    combines: bool = False
    parameters: Mapping[str, object] = field(default_factory=dict)


SUMS = {"linear": True, "task_arithmetic": False}
"""Weighted sums, and whether they divide by the sum of the weights by default."""
THEIRS = {
    "ties": Theirs("ties", True, combines=True, parameters={"convention": "mergekit"}),
    "dare_linear": Theirs("dare", False, True, parameters={"convention": "mergekit"}),
    "dare_ties": Theirs("dare", False, True, parameters={"convention": "mergekit", "elect": "total"}),
    "breadcrumbs": Theirs("breadcrumbs", False),
    "breadcrumbs_ties": Theirs("breadcrumbs", False, parameters={"elect": "total"}),
    "della": Theirs("della", True, True, combines=True),
    "della_linear": Theirs("della", False, True, combines=True, parameters={"elect": "none"}),
}
SCALES_THE_BASE = (
    "linear without normalize: in mergekit weights that do not add up to 1 scale the base model, too, which no adapter "
    "does"
)
SWITCHES = ("normalize", "rescale")
"""Parameters that only mergekit's methods have."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A method of ours with its parameters; ``divides``: whether weights of a sum are divided by their sum; ``factor``:
    what the result is multiplied by; ``notes``: what a user should know."""

    method: str
    parameters: dict[str, object]
    factor: Setting = 1.0
    divides: bool = False
    notes: tuple[str, ...] = ()


def choose(name: str, settings: Mapping[str, object]) -> Chosen:
    """What a recipe's ``merge_method`` with its parameters is.

    Raises :class:`InputError` for a method that does not exist, and for switches of mergekit that ours cannot follow.
    """
    parameters = dict(settings)
    notes: tuple[str, ...] = ()
    factor = parameters.pop("lambda", 1.0)
    if name in SUMS:
        divides = _flag(parameters.pop("normalize", SUMS[name]), "normalize")
        notes = (SCALES_THE_BASE,) if name == "linear" and not divides else ()
        return Chosen("mean" if divides else "sum", parameters, factor, divides, notes)
    theirs = THEIRS.get(name)
    if theirs is not None and (name not in method_names() or any(s in parameters for s in SWITCHES)):
        return Chosen(theirs.method, _translated(name, theirs, parameters), factor)
    if name not in method_names():
        raise InputError(
            f"recipe: merge_method {shown(name)} does not exist; use linear, task_arithmetic, one of mergekit's "
            f"{', '.join(n for n in THEIRS if n not in method_names())}, or one of {', '.join(method_names())}"
        )
    if name == "ties" and "convention" not in parameters:
        notes = ("ties by the convention of PEFT; `convention: mergekit` among its parameters gives mergekit's",)
    return Chosen(name, parameters, factor, notes=notes)


def _translated(name: str, theirs: Theirs, parameters: dict[str, object]) -> dict[str, object]:
    divides = _flag(parameters.pop("normalize", theirs.normalize), "normalize")
    rescales = _flag(parameters.pop("rescale", theirs.rescale), "rescale")
    if rescales != theirs.rescale or (divides != theirs.normalize and not theirs.combines):
        switch = "rescale" if rescales != theirs.rescale else "normalize"
        raise InputError(
            f"recipe: {switch} of {name} cannot be other than {str(getattr(theirs, switch)).lower()} here; leave it out"
        )
    combine = {"combine": "mean" if divides else "sum"} if theirs.combines else {}
    return {**theirs.parameters, **combine, **parameters}


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"recipe: {name}={shown(value)} must be true or false")
    return value
