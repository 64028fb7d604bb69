"""What the command line prints: tables for people, plain data for ``--json``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from fastlora.views.tables import ROWS, console_of, table_of, without_common

if TYPE_CHECKING:
    from fastlora.analysis.overlap import Overlap
    from fastlora.decomposition.report import Report
    from fastlora.decomposition.result import Decomposition


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


def show_overlap(found: Overlap) -> None:
    console = console_of()
    for title, values in (("cosine of ΔW", found.cosine), ("subspace overlap", found.subspace)):
        table = table_of("", *found.names, title=title)
        for i, name in enumerate(found.names):
            table.add_row(name, *["–" if v != v else f"{v:.3f}" for v in values[i].tolist()])
        console.print(table)
