"""Pictures of sweeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora.files.pictures import load_pyplot, save_picture


def plot_sweep(
    points: Sequence[Mapping[str, object]], scores: Mapping[str, Sequence[float | None]], title: str, path: Path
) -> Path:
    """Scores at the points of a grid: curves over one variable, a map a score over two, else in the order of the
    points. ``scores``: ``{name: one a point}``, ``None`` where it is missing."""
    pyplot = load_pyplot()
    names = list(points[0]) if points else []
    columns: dict[str, list[Any]] = {n: [point.get(n) for point in points] for n in names}
    heights = {s: [math.nan if v is None else v for v in values] for s, values in scores.items()}
    numeric = all(isinstance(v, int | float) for values in columns.values() for v in values)
    if len(names) == 2 and numeric and len(points) > 2:
        figure, panels = pyplot.subplots(1, len(scores), figsize=(5 * len(scores), 4), squeeze=False)
        for axes, (score, values) in zip(panels[0], heights.items(), strict=True):
            dots = axes.scatter(columns[names[0]], columns[names[1]], c=values, s=180, marker="s", cmap="viridis")
            axes.set(xlabel=names[0], ylabel=names[1])
            axes.set_title(score, fontsize=10)
            figure.colorbar(dots, ax=axes)
        return save_picture(figure, path)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    over: list[Any] = columns[names[0]] if len(names) == 1 and numeric else list(range(len(points)))
    order = sorted(range(len(over)), key=lambda i: over[i])
    for score, values in heights.items():
        axes.plot([over[i] for i in order], [values[i] for i in order], marker="o", label=score)
    axes.set_xlabel(names[0] if len(names) == 1 and numeric else f"point ({', '.join(names)})")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    return save_picture(figure, path)


def plot_bars(
    names: Sequence[str], means: Sequence[float], errors: Sequence[float], best: int, line: float, path: Path
) -> Path:
    """Means with their errors, one a line, the ``best`` in another colour; ``line``: what they are compared with."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.25 * len(names)))
    places = list(range(len(names)))
    colours = ["tab:orange" if i == best else "tab:blue" for i in places]
    axes.errorbar(means, places, xerr=errors, fmt="none", ecolor="grey")
    axes.scatter(means, places, c=colours, zorder=3)
    axes.axvline(line, color="grey", linestyle=":")
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("report score (dotted: the plain sum)")
    return save_picture(figure, path)
