"""Merges with weights that differ by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.updates import Update
from fastlora.engine.inner_products import inner_products
from fastlora.errors import InputError
from fastlora.merging.forms.result import largest_rank, require_energy, retained
from fastlora.merging.merge import merge
from fastlora.merging.registry import find_method

OF_ALL_MODULES = ("matched_norm", "metagpt", "pico")
"""Methods that look at all modules together, and at nothing but the ``w_i ΔW_i``: weights are multiplied into these."""

Table = Mapping[str, Mapping[str, float]]
"""``{adapter: {module: weight}}``."""


def merge_by_module(pool: Pool, table: Table, method: str, **options: Any) -> Adapter:
    """:func:`fastlora.merge` with the weight ``table[adapter][module]`` of every adapter in every module.

    Modules of the same weights are merged together, each group as a pool of its own; what stands beside the updates
    takes the weights of the module that it belongs to. ``options``: those of the merge.

    Raises :class:`InputError` for what stands beside the updates and belongs to no module, and for methods that look at
    all modules and have a use for weights beside scaling the updates. Costs what the merge costs.
    """
    _require_owners(pool)
    whole = options.get("scope") or ("model" if options.get("convention") == "paper" else "module")
    if method == "equal_energy" or (method == "ties" and whole == "model"):
        raise InputError(
            f"weights that differ by module have no meaning for {method!r} of the whole model, which looks at all "
            "modules together; give one number an adapter"
        )
    if method in OF_ALL_MODULES:
        weighted = Pool((_weighted(a, table[a.name]) for a in pool.adapters), align=False)
        return merge(weighted, dict.fromkeys(pool.names, 1.0), method=method, **options)
    groups: dict[tuple[float, ...], list[str]] = {}
    for module in pool.modules:
        groups.setdefault(tuple(table[name][module] for name in pool.names), []).append(module)
    record = find_method(method)
    asked = options
    given = {"rank": options.get("rank"), "energy": options.get("energy")}
    if "largest" in record.rank and given == {"rank": None, "energy": None}:
        options = {**options, "rank": largest_rank(pool)}  # of the pool, and not of a group
    cuts = record.parameters.get("min_energy")
    if cuts is not None:
        options = {**options, "min_energy": 0.0}  # of all modules together, below
    parts = [
        merge(_restricted(pool, modules), dict(zip(pool.names, weights, strict=True)), method=method, **options)
        for weights, modules in groups.items()
    ]
    whole = _joined(pool, parts)
    if cuts is None:
        return whole
    least = cuts.convert(asked["min_energy"] if "min_energy" in asked else cuts.default, f"method {method!r}")
    require_energy(method, _squares(whole), float(str(least)), options.get("rank"))
    told = whole.provenance["parameters"]
    assert isinstance(told, dict)
    parameters = {**told, **({"min_energy": least} if "min_energy" in asked else {})}
    if "min_energy" not in asked:
        del parameters["min_energy"]
    return replace(whole, provenance={**whole.provenance, "parameters": parameters})


def _joined(pool: Pool, parts: Sequence[Adapter]) -> Adapter:
    """One adapter of those of all groups."""
    updates = {m: u for part in parts for m, u in part.updates.items()}
    whole = replace(
        parts[0],
        updates={m: updates[m] for m in pool.modules},
        extras={name: extra for part in parts for name, extra in part.extras.items()},
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )
    if "retained_energy" not in whole.provenance:
        return whole
    shares = {m: share for part in parts for m, share in _shares(part).items()}
    whole = replace(whole, details={**whole.details, "retained_energy": {m: shares[m] for m in pool.modules}})
    total, _ = retained(_squares(whole))
    return replace(whole, provenance={**whole.provenance, "retained_energy": total})


def _squares(merged: Adapter) -> dict[str, tuple[float, float]]:
    """``Σσ²`` that a cut has kept, and of all, by module: from the result and the shares that it tells."""
    shares = _shares(merged)
    kept = {m: float(inner[0, 0]) for m, inner in inner_products(Pool([merged])).items()}
    return {m: (x, x / shares[m] if shares[m] > 0 else 0.0) for m, x in kept.items()}


def _shares(merged: Adapter) -> Mapping[str, float]:
    told = merged.details["retained_energy"]
    assert isinstance(told, Mapping)
    return told


def _require_owners(pool: Pool) -> None:
    for adapter in pool.adapters:
        for path, extra in adapter.extras.items():
            if extra.kind != "delta" or path.rpartition(".")[0] not in pool.modules:
                raise InputError(
                    f"adapter {adapter.name!r} has {path} beside its updates, which weights by module cannot be given "
                    "to; leave it out with --drop-extras (`adapter.without_extras()`)"
                )


def _restricted(pool: Pool, modules: Sequence[str]) -> Pool:
    """The pool with some of its modules, and what belongs to them."""
    some = set(modules)
    return Pool(
        (
            replace(
                a,
                updates={m: u for m, u in a.updates.items() if m in some},
                extras={path: extra for path, extra in a.extras.items() if path.rpartition(".")[0] in some},
            )
            for a in pool.adapters
        ),
        align=False,
    )


def _weighted(adapter: Adapter, weights: Mapping[str, float]) -> Adapter:
    """The adapter with every module times its weight, also the change of its bias."""
    extras = {
        path: replace(extra, tensor=extra.tensor * weights[path.rpartition(".")[0]])
        for path, extra in adapter.extras.items()
    }
    return replace(adapter, updates={m: times(u, weights[m]) for m, u in adapter.updates.items()}, extras=extras)


def times(update: Update, factor: float) -> Update:
    """``factor · ΔW``."""
    return replace(update, scaling=update.scaling * factor, noise=update.noise.scaled(factor))
