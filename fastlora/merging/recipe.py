"""Recipes: a merge written down in YAML, in the part of mergekit's schema that has a meaning for adapters.

    merge_method: task_arithmetic
    models:
      - model: adapters/style
        parameters: {weight: [{filter: self_attn, value: [0.2, 1.0]}, {value: 0.5}]}
      - model: base-model+adapters/subject
    parameters: {lambda: 0.8, normalize: false}
    dtype: bfloat16

A parameter is a number; a gradient, a list that is interpolated from the first layer to the last; or a list of
``{filter, value}``, of which the first counts whose text is in the name of the weight (none, or ``*``: all).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.card import is_hub_id
from fastlora.core.updates import Update
from fastlora.errors import InputError
from fastlora.files.json_files import shown
from fastlora.merging.merge import merge
from fastlora.merging.registry import find_method, method_names

SUFFIXES = (".yaml", ".yml")
LARGEST = 1 << 20
"""Bytes of a recipe."""
FIELDS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype")
UNUSED = ("tokenizer", "tokenizer_source", "chat_template")
"""Fields that say nothing about adapters; they are told."""
NORMALISED = {"linear": True, "task_arithmetic": False}
"""Methods of mergekit that are weighted sums, and whether they divide by the sum of the weights by default."""
OF_SHARES = ("karcher", "multislerp", "mean")
"""Methods that divide weights by their sum over the pool: weights that differ by module have no meaning there."""

Setting = Any
"""A parameter as it was parsed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter of a recipe: where it lies, and its parameters."""

    path: str
    settings: Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge that was written down: ``fl.Recipe.load("merge.yaml").merge().save("out")``.

    ``method``: of mergekit (``linear``, ``task_arithmetic``) or of ours. ``entries``: the adapters. ``settings``: what
    all share. ``dtype``: to save in. ``notes``: what was left out of it, in sentences.
    """

    method: str
    entries: tuple[Entry, ...]
    settings: Mapping[str, Setting]
    dtype: str | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """The recipe in the YAML file ``path``; docs/methods.md says what it may hold.

        Raises :class:`InputError` for what has no meaning for adapters, by name. No adapter is opened.
        """
        return _read(Path(path))

    def pool(self, **options: Any) -> Pool:
        """The adapters, loaded under the names of their folders; ``options`` are those of :meth:`Pool.load`.

        Raises :class:`InputError` for what cannot be loaded, or has no module in common.
        """
        return Pool.load(self.named, **options)

    @property
    def named(self) -> dict[str, str]:
        """``{name: path}`` of the adapters, in order; of equal names the later ones get a number."""
        found: dict[str, str] = {}
        taken: set[str] = set()
        for entry in self.entries:
            stem = Path(entry.path).name or "adapter"
            name, number = stem, 1
            while name.casefold() in taken:
                number += 1
                name = f"{stem}-{number}"
            taken.add(name.casefold())
            found[name] = entry.path
        return found

    def merge(self, pool: Pool | None = None, **options: Any) -> Adapter:
        """The adapter that the recipe stands for, named by its method; its provenance holds the recipe.

        Args:
            pool: the adapters, if they are loaded, in the order of the recipe.
            options: those of :func:`fastlora.merge`, such as ``rank=16`` and ``memory="1GiB"``.

        Raises :class:`InputError` where a method does not take a parameter, or a pool is of another size. Costs what
        the method costs.
        """
        pool = self.pool() if pool is None else pool
        if len(pool) != len(self.entries):
            raise InputError(f"the recipe has {len(self.entries)} adapters, and the pool {len(pool)}")
        weighted, weights, method, parameters = self._plan(pool)
        doubled = sorted(parameters.keys() & {k for k, v in options.items() if v is not None})
        if doubled:
            raise InputError(f"{doubled[0]} is given in the recipe and beside it; leave out one of the two")
        given = {k: v for k, v in options.items() if v is not None}
        merged = merge(weighted, weights, method=method, **{**parameters, **given})
        provenance = {**merged.provenance, "recipe": self._as_told()}
        return replace(merged, provenance=provenance, notes=(*merged.notes, *self.notes))

    def as_data(self) -> dict[str, object]:
        """The recipe as YAML has it."""
        models = [{"model": e.path, **({"parameters": dict(e.settings)} if e.settings else {})} for e in self.entries]
        data: dict[str, object] = {"merge_method": self.method, "models": models}
        if self.settings:
            data["parameters"] = dict(self.settings)
        return data if self.dtype is None else {**data, "dtype": self.dtype}

    def _as_told(self) -> dict[str, object]:
        """The recipe for others, to whom places on this machine mean nothing: of those the names stay."""
        told = [
            replace(e, path=e.path if is_hub_id(e.path) else n) for n, e in zip(self.named, self.entries, strict=True)
        ]
        return replace(self, entries=tuple(told)).as_data()

    def _plan(self, pool: Pool) -> tuple[Pool, dict[str, float], str, dict[str, object]]:
        """What :func:`fastlora.merge` is given for the loaded adapters: pool, weights, method and parameters. Weights
        that differ by module are multiplied into the updates first."""
        merged, parameters = self._common_settings()
        weights = [e.settings.get("weight", self.settings.get("weight", 1.0)) for e in self.entries]
        normalise = merged in NORMALISED and _flag(parameters.pop("normalize", NORMALISED[merged]), "normalize")
        factor: Setting = parameters.pop("lambda", 1.0) if merged in NORMALISED else 1.0
        method = merged if merged not in NORMALISED else "mean" if normalise else "sum"
        if method not in method_names():
            raise InputError(
                f"recipe: merge_method {shown(self.method)} does not exist; use linear, task_arithmetic or one of "
                f"{', '.join(method_names())}"
            )
        if all(_is_number(w) for w in [*weights, factor]):
            if method == "sum" and factor != 1.0 and "strength" in find_method("sum").parameters:
                parameters["strength"] = float(factor)
            elif factor != 1.0:
                weights = [float(factor) * w / sum(weights) for w in weights]
                method = "sum"
            return pool, dict(zip(pool.names, map(float, weights), strict=True)), method, parameters
        if merged in OF_SHARES:
            raise InputError(
                f"recipe: weights that differ by module have no meaning for {self.method!r}, which divides them by "
                "their sum; use linear"
            )
        table = _weights_by_module(pool, weights, factor, normalise)
        adapters = [_weighted(a, table[a.name]) for a in pool.adapters]
        weighted = Pool(adapters, align=False)
        weighted.notices = list(pool.notices)
        return weighted, dict.fromkeys(pool.names, 1.0), "sum" if merged in NORMALISED else method, parameters

    def _common_settings(self) -> tuple[str, dict[str, object]]:
        """The method, and its parameters, which every adapter that has them must have alike."""
        parameters: dict[str, object] = {k: v for k, v in self.settings.items() if k not in ("weight", "int8_mask")}
        for name in dict.fromkeys(k for e in self.entries for k in e.settings if k not in ("weight", "int8_mask")):
            values = [e.settings.get(name, self.settings.get(name)) for e in self.entries]
            if any(v != values[0] for v in values):
                raise InputError(
                    f"recipe: {name} differs between the adapters ({', '.join(map(shown, values))}), and only weights "
                    "may; give one for all under `parameters:`"
                )
            parameters[name] = values[0]
        for name, value in parameters.items():
            if isinstance(value, list | dict) and name != "lambda":
                raise InputError(f"recipe: {name} must be one value; only weight and lambda may differ by module")
        return self.method, parameters


def _read(file: Path) -> Recipe:
    import yaml

    if not file.is_file():
        raise InputError(f"there is no recipe {file}; correct the path")
    if file.stat().st_size > LARGEST:
        raise InputError(f"{file} has more than {LARGEST} bytes, too many for a recipe; pass a YAML file")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        where = str(error).splitlines()[0][:200]
        raise InputError(f"{file} is no readable YAML ({where}); correct it") from None
    return parse_recipe(data, str(file))


def parse_recipe(data: object, where: str) -> Recipe:
    """The recipe in parsed YAML; ``where`` is what messages begin with."""
    if not isinstance(data, dict) or "merge_method" not in data:
        raise InputError(f"{where} is no recipe of a merge: it has no merge_method; docs/methods.md has an example")
    unknown = [str(k) for k in data if k not in (*FIELDS, *UNUSED)]
    if unknown:
        raise InputError(
            f"{where}: {', '.join(map(shown, unknown))} cannot be followed for adapters; known are {', '.join(FIELDS)}"
        )
    models = data.get("models")
    if not isinstance(models, list) or not models:
        raise InputError(f"{where}: models must be a list of adapters, `- model: PATH`")
    bases: dict[str, None] = {}
    entries = []
    for i, model in enumerate(models):
        name = model.get("model") if isinstance(model, dict) else None
        if not isinstance(name, str) or not name or set(model) - {"model", "parameters"}:
            raise InputError(f"{where}: entry {i + 1} of models must be `model: PATH`, with `parameters:` beside it")
        base, plus, adapter = name.rpartition("+")
        if plus:
            bases[base] = None
        entries.append(Entry(adapter, _settings(model.get("parameters"), f"{where}: model {i + 1}")))
    if len(bases) > 1:
        raise InputError(f"{where}: the adapters are of different models, {', '.join(map(shown, bases))}")
    dtype = data.get("out_dtype", data.get("dtype"))
    if dtype is not None and not isinstance(dtype, str):
        raise InputError(f"{where}: dtype {shown(dtype)} must be a name, such as bfloat16")
    notes = tuple(f"{name} of the recipe says nothing about adapters" for name in UNUSED if name in data)
    method = data["merge_method"]
    if not isinstance(method, str):
        raise InputError(f"{where}: merge_method {shown(method)} must be a name")
    return Recipe(method, tuple(entries), _settings(data.get("parameters"), where), dtype, notes)


def recipe_text(
    paths: Sequence[str], weights: Sequence[float], method: str, parameters: Mapping[str, object], dtype: str | None
) -> str:
    """A recipe as :meth:`Recipe.load` reads it, with numbers that are read back to the bit."""
    import yaml

    for path in paths:
        if "+" in path:
            raise InputError(f"a recipe cannot name {path}: in it a plus ends the base model; rename the adapter")
    data: dict[str, object] = {
        "merge_method": method,
        "models": [
            {"model": path, "parameters": {"weight": float(weight)}}
            for path, weight in zip(paths, weights, strict=True)
        ],
    }
    given = {name: value for name, value in parameters.items() if value is not None}
    if given:
        data["parameters"] = given
    if dtype is not None:
        data["dtype"] = dtype
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"# Recipe of fastlora: fastlora merge THIS_FILE --out DIR\n{text}"


def _settings(value: object, where: str) -> Mapping[str, Setting]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise InputError(f"{where}: parameters must be `name: value`, not {shown(value)}")
    return value


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"recipe: {name}={shown(value)} must be true or false")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _weights_by_module(
    pool: Pool, weights: Sequence[Setting], factor: Setting, normalise: bool
) -> dict[str, dict[str, float]]:
    """``{adapter: {module: weight}}``; with ``normalise``, divided by the sum over all adapters."""
    layers = {m: layer for m in pool.modules if (layer := _layer(m)) is not None}
    last = max([1, *layers.values()])
    table: dict[str, dict[str, float]] = {name: {} for name in pool.names}
    for module in pool.modules:
        depth = layers.get(module, 0) / last
        values = [value_at(w, module, depth, 1.0) for w in weights]
        scale = value_at(factor, module, depth, 1.0)
        total = sum(values)
        if normalise:
            if abs(total) <= 1e-9 * sum(map(abs, values)):
                raise InputError(f"recipe: the weights of {module} add up to {total:g}, and are divided by their sum")
            scale /= total
        for name, value in zip(pool.names, values, strict=True):
            table[name][module] = scale * value
    return table


def value_at(setting: Setting, module: str, depth: float, default: float) -> float:
    """A parameter at a module whose layer lies at ``depth``, from 0, the first, to 1, the last."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if isinstance(setting, list) and setting and all(isinstance(s, Mapping) for s in setting):
        for condition in setting:
            if set(condition) - {"filter", "value"} or "value" not in condition:
                raise InputError(f"recipe: {shown(condition)} must be {{filter: TEXT, value: NUMBER}}")
            text = condition.get("filter")
            if text in (None, "*") or str(text) in f"{module}.weight":
                return value_at(condition["value"], module, depth, default)
        return default
    numbers = setting if isinstance(setting, list) else [setting]
    if not numbers or not all(_is_number(n) and math.isfinite(n) for n in numbers):
        raise InputError(f"recipe: {shown(setting)} is no number, list of numbers or list of {{filter, value}}")
    place = depth * (len(numbers) - 1)
    low = min(int(place), len(numbers) - 1)
    high = min(low + 1, len(numbers) - 1)
    return float(numbers[low] + (place - low) * (numbers[high] - numbers[low]))


def _layer(module: str) -> int | None:
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


def _weighted(adapter: Adapter, weights: Mapping[str, float]) -> Adapter:
    """The adapter with every module times its weight, also the change of its bias."""
    extras = {}
    for path, extra in adapter.extras.items():
        owner = path.rpartition(".")[0]
        if extra.kind != "delta" or owner not in weights:
            raise InputError(
                f"adapter {adapter.name!r} has {path} beside its updates, which weights by module cannot be given to; "
                "leave it out with --drop-extras (`adapter.without_extras()`)"
            )
        extras[path] = replace(extra, tensor=extra.tensor * weights[owner])
    updates = {m: _times(u, weights[m]) for m, u in adapter.updates.items()}
    return replace(adapter, updates=updates, extras=extras)


def _times(update: Update, weight: float) -> Update:
    return replace(update, scaling=update.scaling * weight, noise=update.noise.scaled(weight))
