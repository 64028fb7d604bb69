"""(IA)³ adapters and task vectors, as data and as a table."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from fastlora.adapters.ia3 import IA3
from fastlora.adapters.task_vector import TaskVector
from fastlora.views.tables import ROWS, console_of, show_extras, table_of, without_common


def ia3_data(adapter: IA3) -> dict[str, Any]:
    """Every vector in numbers; ``change`` is ``‖l − 1‖/√d``, the root mean square distance from no change."""
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
    extras = {n: {"kind": e.kind, "shape": list(e.tensor.shape)} for n, e in adapter.extras.items()}
    return {
        "name": adapter.name,
        "kind": "IA3",
        "dtype": str(adapter.dtype)[6:],
        "base_model": adapter.base.model,
        "modules": modules,
        "extras": extras,
        "notes": adapter.notes,
        "provenance": adapter.provenance,
    }


def show_ia3(data: dict[str, Any], every: bool) -> None:
    console = console_of()
    heading = (
        f": (IA)³, {len(data['modules'])} modules, {data['dtype']}, base model {data['base_model'] or 'not named'}"
    )
    console.print(Text.assemble((data["name"], "bold"), heading))
    table = table_of("module", "size", "scales", "‖l − 1‖/√d", "l from", "to")
    items = list(data["modules"].items())
    short = without_common([m for m, _ in items])
    for module, row in items if every else items[:ROWS]:
        numbers = [f"{row[k]:.4g}" for k in ("change", "least", "largest")]
        table.add_row(short[module], str(max(row["shape"])), row["scales"], *numbers)
    console.print(table)
    if not every and len(items) > ROWS:
        console.print(f"{len(items) - ROWS} more modules: --all or --json")
    show_extras(console, data)


def task_vector_data(vector: TaskVector) -> dict[str, Any]:
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


def show_task_vector(data: dict[str, Any], every: bool) -> None:
    console = console_of()
    heading = f": task vector, {len(data['parameters'])} parameters, ‖τ‖ = {data['norm']:.4g}"
    console.print(Text.assemble((data["name"], "bold"), heading))
    table = table_of("parameter", "shape", "‖change‖")
    items = list(data["parameters"].items())
    for name, row in items if every else items[:ROWS]:
        table.add_row(name, "×".join(map(str, row["shape"])), f"{row['norm']:.4g}")
    console.print(table)
    if not every and len(items) > ROWS:
        console.print(f"{len(items) - ROWS} more parameters: --all or --json")
    show_extras(console, data)
