"""Pictures of sweeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.files.pictures import load_pyplot, save_picture

if TYPE_CHECKING:
    from fastlora.coefficients.sweep import Sweep


def plot_sweep(sweep: Sweep, path: Path) -> Path:
    """Scores of a sweep: curves over one variable, a map a score over two, else in the order of the rows."""
    pyplot = load_pyplot()
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
        return save_picture(figure, path)
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
    return save_picture(figure, path)
