"""What a decomposition by inputs found, from the plain data of its report."""

from __future__ import annotations

from fastlora.views.tables import ROWS, Data, Table
from fastlora.views.text import print_paragraph, share_text

HEADINGS = ("number:norm² kept", "number:own outputs kept", "number:others' outputs left")


def show_input_report(report: Data, every: bool) -> None:
    """Prints a row an adapter, and the same for other μ; with ``every``, also by module."""
    settings = report["settings"]
    start = f"{report['title']}"
    print_paragraph(f": by inputs, μ = {settings['mu']:g}, ridge = {settings['ridge']:g}", start=start)
    table = Table("name:adapter", "number:rows", *HEADINGS, "number:left at μ/10", "number:left at 10 μ")
    for row in report["total"]:
        left = [share_text(row["at"][step][2]) for step in ("0.1", "10")]
        table.add(row["adapter"], settings["rows"][row["adapter"]], *_shares(row), *left)
    table.print()
    table = Table("name:module", "name:adapter", *HEADINGS, keys=2)
    modules = list(report["rows"].items())
    for module, rows in modules if every else modules[: max(1, ROWS // len(report["total"]))]:
        for row in rows:
            table.add(module, row["adapter"], *_shares(row))
    table.print()
    if not every and len(modules) > ROWS // len(report["total"]):
        print_paragraph(f"{len(modules)} modules in all; --all prints them")


def input_rows(report: Data) -> list[list[object]]:
    """The modules as one table with a heading."""
    keys = ("norm_kept", "own_kept", "others_left")
    rows: list[list[object]] = [["report", "module", "adapter", *keys]]
    for module, of_module in report["rows"].items():
        rows += [[report["title"], module, row["adapter"], *(row[key] for key in keys)] for row in of_module]
    return rows


def _shares(row: Data) -> list[str]:
    return [share_text(max(row[key], 0.0)) for key in ("norm_kept", "own_kept", "others_left")]
