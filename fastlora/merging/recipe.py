"""Recipes: a merge written down in YAML, in the part of mergekit's schema that has a meaning for adapters.

    merge_method: task_arithmetic
    models:
      - model: adapters/style
        parameters: {weight: [{filter: self_attn, value: [0.2, 1.0]}, {value: 0.5}]}
      - model: base-model+adapters/subject
    parameters: {lambda: 0.8, normalize: false}
    dtype: bfloat16

A parameter is a number; a gradient, a list that is interpolated from the first layer to the last; or a list of
``{filter, value}``, of which the first counts whose text is in the name of the weight (none, or ``*``: all). That of an
adapter counts before that of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.card import is_hub_id
from fastlora.errors import InputError
from fastlora.files.json_files import shown
from fastlora.merging.by_module import merge_by_module
from fastlora.merging.merge import merge
from fastlora.merging.recipe_methods import Chosen, choose
from fastlora.merging.recipe_settings import Setting, depths, first_at, number
from fastlora.merging.scaled import scaled

SUFFIXES = (".yaml", ".yml")
LARGEST = 1 << 20
"""Bytes of a recipe."""
FIELDS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype")
UNUSED = ("tokenizer", "tokenizer_source", "chat_template")
"""Fields that say nothing about adapters; they are told."""
NO_PARAMETERS = ("weight", "int8_mask")
"""What stands among the parameters and is none of the method: ``int8_mask`` says how to compute."""


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
        chosen = choose(self.method, self._common_settings())
        doubled = sorted(chosen.parameters.keys() & {k for k, v in options.items() if v is not None})
        if doubled:
            raise InputError(f"{doubled[0]} is given in the recipe and beside it; leave out one of the two")
        given = {**chosen.parameters, **{k: v for k, v in options.items() if v is not None}}
        merged = self._merged(pool, chosen, given)
        terms = [{"weight": self._weights(i)[0], "of": adapter.provenance} for i, adapter in enumerate(pool.adapters)]
        provenance = {**merged.provenance, "of": terms, "recipe": self._as_told()}
        return replace(merged, provenance=provenance, notes=(*merged.notes, *chosen.notes, *self.notes))

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

    def _merged(self, pool: Pool, chosen: Chosen, options: Mapping[str, Any]) -> Adapter:
        """The merge with plain numbers, or with weights by module."""
        numbers = [number(self._weights(i)[0]) for i in range(len(self.entries))]
        factor = number(chosen.factor)
        is_sum = chosen.method in ("sum", "mean") and self.method != chosen.method
        if all(n is not None for n in numbers) and factor is not None:
            weights = {name: n for name, n in zip(pool.names, numbers, strict=True) if n is not None}
            if chosen.method == "sum" and factor != 1.0 and "strength" not in options:
                return merge(pool, weights, method="sum", **{**options, "strength": factor})
            return scaled(merge(pool, weights, method=chosen.method, **options), factor)
        if is_sum:
            table = self._table(pool, chosen.factor, chosen.divides)
            return merge_by_module(pool, table, "sum", **options)
        if factor is None:
            raise InputError(
                f"recipe: lambda must be one number for {self.method!r}; only weights may differ by module"
            )
        return scaled(merge_by_module(pool, self._table(pool, 1.0, False), chosen.method, **options), factor)

    def _weights(self, entry: int) -> list[Setting]:
        """What is said of the weight of an adapter, in the order in which it counts."""
        given = [s["weight"] for s in (self.entries[entry].settings, self.settings) if "weight" in s]
        return [*given, 1.0]

    def _table(self, pool: Pool, factor: Setting, divides: bool) -> dict[str, dict[str, float]]:
        """``{adapter: {module: weight}}``; with ``divides``, divided by the sum over all adapters."""
        table: dict[str, dict[str, float]] = {name: {} for name in pool.names}
        for module, depth in depths(pool.modules).items():
            values = [first_at(self._weights(i), module, depth) or 0.0 for i in range(len(pool))]
            scale = first_at([factor, 1.0], module, depth) or 0.0
            total = sum(values)
            if divides:
                if abs(total) <= 1e-9 * sum(map(abs, values)):
                    raise InputError(
                        f"recipe: the weights of {module} add up to {total:g}, and are divided by their sum"
                    )
                scale /= total
            for name, value in zip(pool.names, values, strict=True):
                table[name][module] = scale * value
        return table

    def _common_settings(self) -> dict[str, object]:
        """The parameters of the method, which every adapter that has them must have alike."""
        parameters: dict[str, object] = {k: v for k, v in self.settings.items() if k not in NO_PARAMETERS}
        for name in dict.fromkeys(k for e in self.entries for k in e.settings if k not in NO_PARAMETERS):
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
        return parameters


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
        if name == data.get("base_model"):
            raise InputError(
                f"{where}: entry {i + 1} of models is the base model {shown(name)}, which is no adapter; leave it out"
            )
        base, plus, adapter = name.rpartition("+")
        if plus:
            bases[base] = None
        entries.append(Entry(adapter, _settings(model.get("parameters"), f"{where}: model {i + 1}")))
    if bases and isinstance(data.get("base_model"), str):
        bases[data["base_model"]] = None
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
