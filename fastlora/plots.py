"""Pictures of results: spectra beside chance, shared energy by layer, similarity of a pool. Needs matplotlib."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.errors import InputError, OutputError

if TYPE_CHECKING:
    from fastlora.methods.overlap import Overlap
    from fastlora.report import ModuleRow, Report
    from fastlora.sweeps import Sweep

MODULES_SHOWN = 40


def require_matplotlib() -> None:
    """Refuses, before any work, plots that could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("plots need matplotlib: `pip install fastlora[plot]`") from None


def check_picture(path: Path, overwrite: bool = False) -> None:
    """Refuses, before any work, a picture that could not be written."""
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    if _format(path) not in FigureCanvasBase.get_supported_filetypes():
        raise InputError(f"{path} is no name for a picture: end it in .png, .pdf, .svg or .jpg")
    if path.is_dir() or (os.path.lexists(path) and not overwrite):
        raise OutputError(f"{path} exists; choose another name" + ("" if path.is_dir() else ", or use --overwrite"))
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path} cannot be written: there is no directory {path.absolute().parent}")


def _format(path: Path) -> str:
    return path.suffix[1:].lower()


def _pyplot() -> Any:
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> Path:
    """Writes a picture that exists whole or not at all."""
    unfinished = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        figure.savefig(unfinished, format=_format(path), dpi=150, bbox_inches="tight")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
        _pyplot().close(figure)
    return path


def _short(module: str) -> str:
    """A module path without what every path has in common with it: the last four parts."""
    return ".".join(module.split(".")[-4:])


def plot_spectrum(report: Report, path: Path) -> Path:
    """Eigenvalues of every module, with ``τ`` and each module's chance edge; modules with most shared first."""
    pyplot = _pyplot()
    rows = _most_shared(report)
    figure, axes = pyplot.subplots(figsize=(9, 0.28 * len(rows) + 1.6))
    for y, row in enumerate(rows):
        axes.plot(row.eigenvalues, [y] * len(row.eigenvalues), "o", color="tab:blue", ms=4, alpha=0.7)
        axes.plot([row.chance_edge], [y], "|", color="tab:red", ms=12, mew=2)
    axes.axvline(report.settings["threshold"], color="black", ls="--", lw=1)
    axes.plot([], [], "o", color="tab:blue", label="eigenvalue")
    axes.plot([], [], "|", color="tab:red", ms=12, mew=2, label="largest by chance (Wachter edge)")
    axes.plot([], [], "--", color="black", label=f"τ = {report.settings['threshold']:g}")
    axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5), xlabel="eigenvalue of the projection chain")
    axes.set_yticks(range(len(rows)), [_short(r.module) for r in rows], fontsize=7)
    axes.set_title(f"{report.title}: {report.settings['chain']} chain, {report.settings['side']} side", fontsize=10)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.06), ncols=3, fontsize=8, frameon=False)
    return _save(figure, path)


def _most_shared(report: Report) -> list[ModuleRow]:
    ordered = sorted(report.rows, key=lambda r: (-r.shared, -max(r.eigenvalues, default=0.0)))[:MODULES_SHOWN]
    names = {r.module for r in ordered}
    return [r for r in report.rows if r.module in names]


def plot_energy(report: Report, path: Path) -> Path:
    """Share of each adapter's energy ``‖ΔW_i‖²`` that lies in the shared directions, module by module."""
    pyplot = _pyplot()
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
    axes.set_title(f"{report.title}: τ = {report.settings['threshold']:g}", fontsize=10)
    axes.legend(fontsize=8)
    return _save(figure, path)


def plot_overlap(overlap: Overlap, path: Path) -> Path:
    """Heat maps of the pool's cosine and subspace similarity."""
    pyplot = _pyplot()
    k = len(overlap.names)
    figure, panels = pyplot.subplots(
        1, 2, figsize=(2 * max(3.2, 0.6 * k + 1.6), max(3.2, 0.5 * k + 1.6)), layout="constrained"
    )
    pictures = (("cosine of ΔW", overlap.cosine, "coolwarm", -1), ("subspace overlap", overlap.subspace, "viridis", 0))
    for axes, (title, values, colours, low) in zip(panels, pictures, strict=True):
        image = axes.imshow(values, vmin=low, vmax=1, cmap=colours)
        for i in range(k):
            for j in range(k):
                value = float(values[i, j])
                dark = value < 0.6 if colours == "viridis" else abs(value) > 0.8
                colour = "white" if dark else "black"
                axes.text(j, i, f"{value + 0.0:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(k), overlap.names, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(k), overlap.names, fontsize=8)
        axes.set_title(title, fontsize=10)
        figure.colorbar(image, ax=axes, shrink=0.8)
    return _save(figure, path)


def plot_sweep(sweep: Sweep, path: Path) -> Path:
    """Scores of a sweep: curves over one variable, a map a score over two, else in the order of the rows."""
    pyplot = _pyplot()
    names, scores = sweep.variables, sweep.scores
    columns = {n: [row.point.get(n) for row in sweep.rows] for n in names}
    numeric = all(isinstance(v, int | float) for values in columns.values() for v in values)
    if len(names) == 2 and numeric and len(sweep.rows) > 2:
        figure, panels = pyplot.subplots(1, len(scores), figsize=(5 * len(scores), 4), squeeze=False)
        for axes, score in zip(panels[0], scores, strict=True):
            values = [row.scores.get(score, math.nan) for row in sweep.rows]
            points = axes.scatter(columns[names[0]], columns[names[1]], c=values, s=180, marker="s", cmap="viridis")
            axes.set(xlabel=names[0], ylabel=names[1])
            axes.set_title(score, fontsize=10)
            figure.colorbar(points, ax=axes)
        return _save(figure, path)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    over: list[Any] = columns[names[0]] if len(names) == 1 and numeric else list(range(len(sweep.rows)))
    order = sorted(range(len(over)), key=lambda i: over[i])
    for score in scores:
        axes.plot(
            [over[i] for i in order],
            [sweep.rows[i].scores.get(score, math.nan) for i in order],
            marker="o",
            label=score,
        )
    axes.set_xlabel(names[0] if len(names) == 1 and numeric else f"point ({', '.join(names)})")
    axes.set_title(sweep.of, fontsize=10)
    axes.legend(fontsize=8)
    return _save(figure, path)
