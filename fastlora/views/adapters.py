"""What an adapter holds, as data and as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.text import Text

from fastlora.views.tables import ROWS, console_of, show_extras, table_of, without_common

if TYPE_CHECKING:
    from fastlora.adapters.ia3 import IA3
    from fastlora.adapters.lora import Adapter
    from fastlora.adapters.task_vector import TaskVector
    from fastlora.engine.spectrum import SingularForm


def describe(element: Adapter | IA3 | TaskVector) -> tuple[dict[str, Any], Callable[[dict[str, Any], bool], None]]:
    """What ``inspect`` reports about an adapter of any kind, as plain data, and the function that prints it."""
    from fastlora.adapters.ia3 import IA3
    from fastlora.adapters.task_vector import TaskVector
    from fastlora.engine.spectrum import singular_forms
    from fastlora.views.vectors import ia3_data, show_ia3, show_task_vector, task_vector_data

    if isinstance(element, IA3):
        return ia3_data(element), show_ia3
    if isinstance(element, TaskVector):
        return task_vector_data(element), show_task_vector
    return adapter_data(element, singular_forms(element.name, element.updates)), show_adapter


def adapter_data(adapter: Adapter, forms: Mapping[str, SingularForm]) -> dict[str, Any]:
    """What ``inspect`` reports, as plain data."""
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
    total = sum(f.norm**2 for f in forms.values()) ** 0.5
    extras = {n: {"kind": e.kind, "shape": list(e.tensor.shape)} for n, e in adapter.extras.items()}
    return {
        "name": adapter.name,
        "dtype": str(adapter.dtype)[6:],
        "base_model": adapter.base.model,
        "norm": total,
        "modules": modules,
        "extras": extras,
        "notes": adapter.notes,
        "provenance": adapter.provenance,
    }


def show_adapter(data: dict[str, Any], every: bool) -> None:
    console = console_of()
    heading = (
        f": {len(data['modules'])} modules, {data['dtype']}, base model {data['base_model'] or 'not named'}, "
        f"‖ΔW‖ = {data['norm']:.4g}"
    )
    console.print(Text.assemble((data["name"], "bold"), heading))
    table = table_of("module", "out×in", "kind", "rank", "scaling", "‖ΔW‖", "σ largest … smallest kept")
    items = list(data["modules"].items())
    short = without_common([m for m, _ in items])
    for module, row in items if every else items[:ROWS]:
        n, m = row["shape"]
        rank = str(row["rank"]) if row["rank"] == row["numerical_rank"] else f"{row['rank']} ({row['numerical_rank']})"
        kept = row["sigma"][: row["numerical_rank"]]
        sigma = " ".join(f"{v:.3g}" for v in kept[:3]) + (f" … {kept[-1]:.3g}" if len(kept) > 3 else "")
        table.add_row(short[module], f"{n}×{m}", row["kind"], rank, f"{row['scaling']:g}", f"{row['norm']:.4g}", sigma)
    console.print(table)
    if not every and len(items) > ROWS:
        console.print(f"{len(items) - ROWS} more modules: --all or --json")
    show_extras(console, data)
