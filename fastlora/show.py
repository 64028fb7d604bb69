"""What the command line prints: tables for people, plain data for ``--json``."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fastlora.adapter import Adapter
    from fastlora.bench.contest import Row
    from fastlora.bench.timing import Machine
    from fastlora.decomposition import Decomposition
    from fastlora.finetune import TaskVector
    from fastlora.ia3 import IA3
    from fastlora.methods.overlap import Overlap
    from fastlora.methods.spectrum import SingularForm
    from fastlora.report import Report

ROWS = 20  # modules printed unless all are asked for
WIDTH = 140  # columns where the output is no terminal


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # the command line knows what to do; rich would exit with 1


def console_of() -> Console:
    # Names come from files and may look like markup.
    width = None if sys.stdout.isatty() else WIDTH
    return _Console(soft_wrap=True, width=width, markup=False, emoji=False, highlight=False)


def table_of(*columns: str, title: str | None = None) -> Table:
    """A table whose first column is never broken."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i == 0, overflow="fold")
    return table


def without_common(modules: Sequence[str]) -> dict[str, str]:
    """Module paths without the leading parts that all have in common, for narrow columns."""
    parts = [m.split(".") for m in modules]
    common = 0
    while len(parts) > 1 and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return {m: ".".join(p[common:]) for m, p in zip(modules, parts, strict=True)}


def show_decomposition(parts: Decomposition, out: Path, every: bool) -> None:
    console = console_of()
    reports = parts.reports
    if len(reports) == 1:
        _show_report(console, reports[0], every)
    else:
        _show_reports(console, reports)
    console.print(f"written: {out} ({len(parts.adapters())} adapters, report.json)")


def _show_report(console: Console, report: Report, every: bool) -> None:
    s = report.settings
    console.print(
        Text.assemble((report.title, "bold"), f": {s['chain']} chain, {s['side']} side, τ = {s['threshold']:g}")
    )
    names = s["adapters"]
    table = table_of(
        "module", "rank", "shared", "by chance", "largest eigenvalues", "chance edge", *[f"{n} %" for n in names]
    )
    rows = (
        report.rows if every else sorted(report.rows, key=lambda r: (-r.shared, -max(r.eigenvalues, default=0)))[:ROWS]
    )
    short = without_common([r.module for r in report.rows])
    for row in rows:
        energy = [f"{100 * row.energy_shared[n]:.1f}" if n in row.energy_shared else "–" for n in names]
        ranks = "/".join(map(str, row.directions))
        values = " ".join(f"{v:.3f}" for v in row.eigenvalues[:4])
        table.add_row(
            short[row.module],
            ranks,
            str(row.shared),
            f"{row.expected_by_chance:.2g}",
            values,
            f"{row.chance_edge:.3f}",
            *energy,
        )
    console.print(table)
    if len(rows) < len(report.rows):
        console.print(f"{len(report.rows) - len(rows)} more modules: --all, or report.json")
    console.print(
        f"{report.shared_directions} directions shared in {sum(1 for r in report.rows if r.shared)} of "
        f"{len(report.rows)} "
        f"modules; {report.expected_by_chance:.2g} expected by chance. Columns in %: share of ‖ΔW‖² in the shared "
        "directions.",
    )
    _show_lines(console, report)


def _show_reports(console: Console, reports: list[Report]) -> None:
    table = table_of("chain", "shared directions", "modules", "by chance", "largest eigenvalue", "warnings")
    for report in reports:
        largest = max((v for r in report.rows for v in r.eigenvalues), default=0.0)
        modules = f"{sum(1 for r in report.rows if r.shared)} of {len(report.rows)}"
        warnings = str(len(report.warnings))
        table.add_row(
            report.title,
            str(report.shared_directions),
            modules,
            f"{report.expected_by_chance:.2g}",
            f"{largest:.3f}",
            warnings,
        )
    console.print(table)
    for warning in dict.fromkeys(w for r in reports for w in r.warnings):
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))


def _show_lines(console: Console, report: Report) -> None:
    for warning in report.warnings:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))


def describe(element: Adapter | IA3 | TaskVector) -> tuple[dict[str, Any], Callable[[dict[str, Any], bool], None]]:
    """What ``inspect`` reports about an adapter of any kind, as plain data, and the function that prints it."""
    from fastlora.finetune import TaskVector
    from fastlora.ia3 import IA3
    from fastlora.methods.spectrum import singular_forms
    from fastlora.show_vectors import ia3_data, show_ia3, show_task_vector, task_vector_data

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


def show_extras(console: Console, data: dict[str, Any]) -> None:
    """What an adapter holds beside its updates, and its notes."""
    for name, extra in data["extras"].items():
        what = "added to the base model's" if extra["kind"] == "delta" else "replaces the base model's"
        console.print(f"also holds {name} {extra['shape']} ({what})")
    for note in data["notes"]:
        console.print(f"note: {note}")


def show_overlap(found: Overlap) -> None:
    console = console_of()
    for title, values in (("cosine of ΔW", found.cosine), ("subspace overlap", found.subspace)):
        table = table_of("", *found.names, title=title)
        for i, name in enumerate(found.names):
            table.add_row(name, *["–" if v != v else f"{v:.3f}" for v in values[i].tolist()])
        console.print(table)


def show_bench(machine: Machine, rows: list[Row]) -> None:
    from fastlora.bench.table import HEADER, cells, machine_line, notes

    table = table_of(*HEADER)
    for row in rows:
        table.add_row(*cells(row))
    console = console_of()
    console.print(machine_line(machine))
    console.print(table)
    for note in notes(rows):
        console.print(note, markup=False)


def show_bench_names() -> None:
    from fastlora.bench.cases import CASES
    from fastlora.bench.workloads import NAMES

    table = table_of("case", "what is timed", "on", "", title="cases")
    for name, case in CASES.items():
        table.add_row(name, case.summary, ", ".join(case.workloads), "only when named" if case.slow else "")
    console = console_of()
    console.print(table)
    console.print(f"workloads: {', '.join(NAMES)}")


def environment() -> dict[str, Any]:
    """Versions, and each backend with ``"usable"`` or the reason why it is not."""
    import torch

    import fastlora
    from fastlora import device
    from fastlora.backends import ORDER, cpu, current_backend

    backends = {name: _state(name) for name in ORDER}
    data: dict[str, Any] = {
        "fastlora": fastlora.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backend": current_backend(),
        "backends": backends,
        "devices": device.describe(),
        "threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
    }
    for package in ("numpy", "safetensors", "lark", "peft", "triton", "matplotlib", "huggingface_hub"):
        try:
            data[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            data[package] = "not installed"
    if cpu.unavailable() is None:
        try:
            data["instruction set"] = cpu.isa()
        except RuntimeError as error:  # FASTLORA_ISA names what does not exist or does not run here
            data["instruction set"] = backends["cpu"] = str(error)
        data["CUDA build"] = cpu.cuda_build()
    return data


def _state(backend: str) -> str:
    """``"usable"`` and for which ops, or the reason why a backend is not."""
    from fastlora.backends import RULES, kernels

    found = kernels(backend)
    if isinstance(found, str):
        return found
    own = [op for op in RULES if op in found and not op.endswith("_pass")]
    return "usable" if set(own) >= {op for op in RULES if not op.endswith("_pass")} else f"usable: {', '.join(own)}"


def show_environment(data: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    for key, value in data.items():
        if key == "backends":
            for name, state in value.items():
                table.add_row(f"backend {name}", state)
        elif key == "devices":
            for state in value:
                table.add_row("device", state)
        else:
            table.add_row(key, str(value))
    console_of().print(table)
