"""Parameters of a recipe: numbers, gradients over the layers, and filters by module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastlora.errors import InputError
from fastlora.files.json_files import shown

Setting = Any
"""A parameter as it was parsed."""


def number(setting: Setting) -> float | None:
    """The number that a setting is; YAML reads some, such as ``1e-3``, as text."""
    if isinstance(setting, bool) or not isinstance(setting, int | float | str):
        return None
    try:
        found = float(setting)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def depths(modules: Iterable[str]) -> dict[str, float]:
    """How deep the layer of every module lies, from 0, the first, to 1, the last that is there.

    The layer is the first number in the name. Parts of a model, whose names differ before it, have layers of their own;
    what lies in no layer is at 0.
    """
    places: dict[str, tuple[str, int]] = {}
    for module in modules:
        parts = module.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is not None:
            places[module] = ".".join(parts[:at]), int(parts[at])
    last: dict[str, int] = {}
    for prefix, layer in places.values():
        last[prefix] = max(last.get(prefix, 0), layer)
    found = {m: layer / last[prefix] if last[prefix] else 1.0 for m, (prefix, layer) in places.items()}
    return {module: found.get(module, 0.0) for module in modules}


def first_at(settings: Sequence[Setting], module: str, depth: float) -> float | None:
    """:func:`value_at` of the first setting that says anything about a module; ``None`` where none does."""
    return next((v for s in settings if s is not None and (v := value_at(s, module, depth)) is not None), None)


def value_at(setting: Setting, module: str, depth: float) -> float | None:
    """A parameter at a module whose layer lies at ``depth``; ``None`` where no filter fits.

    Of a list of ``{filter, value}`` the first counts whose text is in the name of the module's weight. A list of
    numbers is interpolated over the depth.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if isinstance(setting, list) and setting and all(isinstance(s, Mapping) for s in setting):
        for condition in setting:
            if set(condition) - {"filter", "value"} or "value" not in condition:
                raise InputError(f"recipe: {shown(condition)} must be {{filter: TEXT, value: NUMBER}}")
            text = condition.get("filter")
            if text in (None, "*") or str(text) in f"{module}.weight":
                return value_at(condition["value"], module, depth)
        return None
    numbers = [number(n) for n in (setting if isinstance(setting, list) else [setting])]
    known = [n for n in numbers if n is not None]
    if not known or len(known) < len(numbers):
        raise InputError(f"recipe: {shown(setting)} is no number, list of numbers or list of {{filter, value}}")
    place = depth * (len(known) - 1)
    low = min(int(place), len(known) - 1)
    high = min(low + 1, len(known) - 1)
    return known[low] + (place - low) * (known[high] - known[low])
