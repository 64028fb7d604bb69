"""Pictures of decompositions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from fastlora.files.pictures import load_pyplot, save_picture

if TYPE_CHECKING:
    from fastlora.decomposition.report import ModuleRow, Report


MODULES_SHOWN = 40


def _short(module: str) -> str:
    """A module path without what every path has in common with it: the last four parts."""
    return ".".join(module.split(".")[-4:])


def plot_spectrum(report: Report, path: Path) -> Path:
    """Eigenvalues of every module, with ``τ`` and each module's chance edge; modules with most shared first."""
    pyplot = load_pyplot()
    rows = _most_shared(report)
    figure, axes = pyplot.subplots(figsize=(9, 0.28 * len(rows) + 1.6))
    for y, row in enumerate(rows):
        axes.plot(row.eigenvalues, [y] * len(row.eigenvalues), "o", color="tab:blue", ms=4, alpha=0.7)
        axes.plot([row.chance_edge], [y], "|", color="tab:red", ms=12, mew=2)
    threshold = report.settings["threshold"]
    axes.plot([], [], "o", color="tab:blue", label="eigenvalue")
    axes.plot([], [], "|", color="tab:red", ms=12, mew=2, label="largest by chance")
    if not isinstance(threshold, str):
        axes.axvline(threshold, color="black", ls="--", lw=1)
        axes.plot([], [], "--", color="black", label=f"τ = {threshold:g}")
    axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5), xlabel="eigenvalue of the projection chain")
    axes.set_yticks(range(len(rows)), [_short(r.module) for r in rows], fontsize=7)
    axes.set_title(f"{report.title}: {report.settings['chain']} chain, {report.settings['side']} side", fontsize=10)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.06), ncols=3, fontsize=8, frameon=False)
    return save_picture(figure, path)


def _most_shared(report: Report) -> list[ModuleRow]:
    ordered = sorted(report.rows, key=lambda r: (-r.shared, -max(r.eigenvalues, default=0.0)))[:MODULES_SHOWN]
    names = {r.module for r in ordered}
    return [r for r in report.rows if r.module in names]


def plot_energy(report: Report, path: Path) -> Path:
    """Share of each adapter's energy ``‖ΔW_i‖²`` that lies in the shared directions, module by module."""
    pyplot = load_pyplot()
    names = list(dict.fromkeys(n for r in report.rows for n in r.adapters))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.16 * len(report.rows) + 2), 4))
    for name in names:
        shares = [100 * r.energy_shared.get(name, math.nan) for r in report.rows]
        axes.plot(range(len(shares)), shares, marker=".", lw=1, label=name)
    axes.set(ylabel="energy in the shared directions [%]", ylim=(0, None))
    if len(report.rows) <= MODULES_SHOWN:
        axes.set_xticks(range(len(report.rows)), [_short(r.module) for r in report.rows], rotation=90, fontsize=7)
    else:
        axes.set_xlabel("module, in the order of the file")
    threshold = report.settings["threshold"]
    told = f"{threshold} threshold" if isinstance(threshold, str) else f"τ = {threshold:g}"
    axes.set_title(f"{report.title}: {told}", fontsize=10)
    axes.legend(fontsize=8)
    return save_picture(figure, path)
