"""What an adapter of any kind holds, as plain data and as a table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Dispatch on kinds needs the kinds; who describes an adapter has loaded them.
from fastlora.adapters.dora import DoRA
from fastlora.adapters.ia3 import IA3
from fastlora.adapters.lora import Adapter
from fastlora.adapters.task_vector import TaskVector
from fastlora.core.data import Extra
from fastlora.engine.checks import require_finite_extras
from fastlora.engine.spectrum import singular_forms
from fastlora.views.single_files import show_file
from fastlora.views.tables import ROWS, Data, Table, print_extras, without_common
from fastlora.views.text import print_paragraph


@functools.singledispatch
def describe(element: object) -> Data:
    """What ``inspect`` reports about an adapter, as plain data."""
    raise TypeError(f"{type(element).__name__} is no kind of adapter")


@describe.register
def adapter_data(adapter: Adapter) -> Data:
    """Every module with its singular values; costs one read of the factors."""
    require_finite_extras([adapter])
    forms = singular_forms(adapter.name, adapter.updates)
    modules = {
        module: {
            "shape": list(update.shape),
            "kind": update.layout.kind,
            "rank": update.rank,
            "numerical_rank": forms[module].kept,
            "scaling": update.scaling,
            "norm": forms[module].norm,
            "sigma": forms[module].sigma.tolist(),
        }
        for module, update in adapter.updates.items()
    }
    return {
        "name": adapter.name,
        "kind": "LoRA",
        "dtype": str(adapter.dtype)[6:],
        "base_model": adapter.base.model,
        "norm": sum(f.norm**2 for f in forms.values()) ** 0.5,
        "modules": modules,
        "extras": _extras(adapter.extras),
        "notes": adapter.notes,
        "provenance": adapter.provenance,
    }


@describe.register
def dora_data(adapter: DoRA) -> Data:
    """Every module with the singular values of its ``s·B·A``, and its magnitude: what it changes needs the base."""
    require_finite_extras([adapter])
    forms = singular_forms(adapter.name, adapter.updates)
    modules: dict[str, Any] = {}
    for module, update in adapter.updates.items():
        magnitude = adapter.magnitudes.get(module)
        vector = None if magnitude is None else adapter.magnitude(module)
        modules[module] = {
            "shape": list(update.shape),
            "kind": update.layout.kind,
            "rank": update.rank,
            "scaling": update.scaling,
            "norm": forms[module].norm,
            "magnitude_of": None if magnitude is None else {"out": "outputs", "in": "inputs"}[magnitude.axis],
            "least": None if vector is None else float(vector.min()),
            "largest": None if vector is None else float(vector.max()),
        }
    return {
        "name": adapter.name,
        "kind": "DoRA",
        "dtype": str(adapter.dtype)[6:],
        "base_model": adapter.base.model,
        "modules": modules,
        "extras": _extras(adapter.extras),
        "notes": adapter.notes,
        "provenance": adapter.provenance,
    }


@describe.register
def ia3_data(adapter: IA3) -> Data:
    """Every vector in numbers; ``change`` is ``‖l − 1‖/√d``, the root mean square distance from no change."""
    require_finite_extras([adapter])
    modules = {}
    for module, scaling in adapter.vectors.items():
        vector = adapter.vector(module)
        modules[module] = {
            "shape": list(scaling.shape),
            "scales": scaling.scales,
            "change": float((vector - 1.0).square().mean().sqrt()),
            "least": float(vector.min()),
            "largest": float(vector.max()),
        }
    return {
        "name": adapter.name,
        "kind": "IA3",
        "dtype": str(adapter.dtype)[6:],
        "base_model": adapter.base.model,
        "modules": modules,
        "extras": _extras(adapter.extras),
        "notes": adapter.notes,
        "provenance": adapter.provenance,
    }


@describe.register
def task_vector_data(vector: TaskVector) -> Data:
    """Shape and norm of every change."""
    parameters = {p: {"shape": list(d.shape), "norm": float(d.double().norm())} for p, d in vector.deltas.items()}
    return {
        "name": vector.name,
        "kind": "task vector",
        "norm": vector.norm,
        "parameters": parameters,
        "extras": {},
        "notes": vector.notes,
        "provenance": vector.provenance,
    }


def folder_data(folder: str, elements: Sequence[Adapter | DoRA | IA3 | TaskVector], notes: Sequence[str]) -> Data:
    """What every adapter of a folder holds, and what was left out."""
    return {"folder": folder, "adapters": {e.name: describe(e) for e in elements}, "notes": list(notes)}


def _extras(extras: Mapping[str, Extra]) -> Data:
    return {n: {"kind": e.kind, "shape": list(e.tensor.shape)} for n, e in extras.items()}


def show(data: Data, every: bool) -> None:
    """Prints what :func:`describe` or :func:`folder_data` found; ``every``: all modules, not the first ones."""
    if "folder" in data:
        show_folder(data)
    else:
        SHOWN[data["kind"]](data, every)


def show_adapter(data: Data, every: bool) -> None:
    """Prints a LoRA adapter: one row a module with rank, norm and singular values."""
    heading = f"{len(data['modules'])} modules, {data['dtype']}, {_base(data)}, ‖ΔW‖ = {data['norm']:.4g}"
    print_paragraph(f": {heading}", start=data["name"])
    if "file" in data:
        show_file(data["file"])
    rows = data["modules"]
    other_kinds = any(row["kind"] != "linear" for row in rows.values())
    table = Table(
        "name:module",
        "number:out×in",
        *["text:kind"] * other_kinds,
        "number:rank",
        "number:scaling",
        "number:‖ΔW‖",
        "text:σ largest … smallest",
    )
    short = without_common(list(rows))
    for module in _first(rows, every):
        row = rows[module]
        numbers = (_rank(row), f"{row['scaling']:g}", f"{row['norm']:.4g}", _sigma(row))
        table.add(short[module], _size(row), *[row["kind"]] * other_kinds, *numbers)
    table.print()
    _tell_more(rows, "modules", every)
    print_extras(data)


def show_dora(data: Data, every: bool) -> None:
    """Prints a DoRA: one row a module with rank, the norm of ``s·B·A`` and the range of its magnitude."""
    heading = f"DoRA, {len(data['modules'])} modules, {data['dtype']}, {_base(data)}; what it changes needs the base"
    print_paragraph(f": {heading}", start=data["name"])
    if "file" in data:
        show_file(data["file"])
    table = Table(
        "name:module", "number:out×in", "number:rank", "number:scaling", "number:‖s·B·A‖", "text:magnitude of",
        "number:from", "number:to",
    )  # fmt: skip
    rows = data["modules"]
    short = without_common(list(rows))
    for module in _first(rows, every):
        row = rows[module]
        numbers = (str(row["rank"]), f"{row['scaling']:g}", f"{row['norm']:.4g}", row["magnitude_of"] or "none")
        ends = ["" if row[k] is None else f"{row[k]:.4g}" for k in ("least", "largest")]
        table.add(short[module], _size(row), *numbers, *ends)
    table.print()
    _tell_more(rows, "modules", every)
    print_extras(data)


def show_ia3(data: Data, every: bool) -> None:
    """Prints an (IA)³ adapter: one row a module with the size and the range of its vector."""
    heading = f"(IA)³, {len(data['modules'])} modules, {data['dtype']}, {_base(data)}"
    print_paragraph(f": {heading}", start=data["name"])
    table = Table("name:module", "number:size", "text:scales", "number:‖l − 1‖/√d", "number:l from", "number:to")
    rows = data["modules"]
    short = without_common(list(rows))
    for module in _first(rows, every):
        row = rows[module]
        numbers = [f"{row[k]:.4g}" for k in ("change", "least", "largest")]
        table.add(short[module], max(row["shape"]), row["scales"], *numbers)
    table.print()
    _tell_more(rows, "modules", every)
    print_extras(data)


def show_task_vector(data: Data, every: bool) -> None:
    """Prints a task vector: one row a parameter with the size and the norm of its change."""
    heading = f"task vector, {len(data['parameters'])} parameters, ‖τ‖ = {data['norm']:.4g}"
    print_paragraph(f": {heading}", start=data["name"])
    table = Table("name:parameter", "number:shape", "number:‖change‖")
    rows = data["parameters"]
    for name in _first(rows, every):
        table.add(name, _size(rows[name]), f"{rows[name]['norm']:.4g}")
    table.print()
    _tell_more(rows, "parameters", every)
    print_extras(data)


def show_folder(data: Data) -> None:
    """Prints one row for each of the adapters of a folder."""
    print_paragraph(f": {len(data['adapters'])} adapters", start=data["folder"])
    table = Table(
        "name:adapter", "text:kind", "number:modules", "number:rank", "text:dtype", "number:‖ΔW‖", "name:base"
    )
    for name, adapter in data["adapters"].items():
        rows = adapter.get("modules") or adapter.get("parameters") or {}
        ranks = sorted({row["rank"] for row in rows.values() if "rank" in row})
        rank = "–" if not ranks else f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
        norm = f"{adapter['norm']:.4g}" if "norm" in adapter else "–"
        base = adapter.get("base_model") or "not named"
        table.add(name, adapter["kind"], len(rows), rank, adapter.get("dtype", "–"), norm, base)
    table.print()


SHOWN: dict[str, Callable[[Data, bool], None]] = {
    "LoRA": show_adapter,
    "DoRA": show_dora,
    "IA3": show_ia3,
    "task vector": show_task_vector,
}
"""What prints the data of a kind."""


def csv_rows(data: Data) -> list[list[object]]:
    """The table of all modules, and of all adapters of a folder, with a heading."""
    adapters = data["adapters"].values() if "folder" in data else [data]
    rows: list[dict[str, object]] = []
    for adapter in adapters:
        for module, row in (adapter.get("modules") or adapter.get("parameters") or {}).items():
            lists = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
            rows.append({"adapter": adapter["name"], "module": module, **lists})
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [list(columns), *([row.get(column, "") for column in columns] for row in rows)]


def _base(data: Data) -> str:
    return f"base model {data['base_model'] or 'not named'}"


def _first(rows: Mapping[str, Any], every: bool) -> list[str]:
    return list(rows) if every else list(rows)[:ROWS]


def _tell_more(rows: Mapping[str, Any], what: str, every: bool) -> None:
    if not every and len(rows) > ROWS:
        print_paragraph(f"{len(rows) - ROWS} more {what}: --all, --csv FILE or --json")


def _size(row: Data) -> str:
    return "×".join(map(str, row["shape"]))


def _sigma(row: Data) -> str:
    """The two largest singular values and the smallest that counts."""
    kept = row["sigma"][: row["numerical_rank"]]
    return " ".join(f"{v:.3g}" for v in kept[:2]) + (f" … {kept[-1]:.3g}" if len(kept) > 2 else "")


def _rank(row: Data) -> str:
    return str(row["rank"]) if row["rank"] == row["numerical_rank"] else f"{row['rank']} ({row['numerical_rank']})"
