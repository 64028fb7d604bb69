"""Forgetting as curves of target against control accuracy, compared at equal forgetting rather than equal strength."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
from common import mean_and_error, shown

Curve = list[tuple[float, float]]  # (target, control accuracy), by strength from 0
Curves = dict[str, list[Curve]]  # by what was negated, one curve a seed


def control_at(curve: Curve, level: float) -> float | None:
    """Control accuracy where the target's first falls to ``level``, between strengths by straight lines; None if it
    never does."""
    for (before, kept), (after, left) in pairwise(curve):
        if before >= level >= after and before > after:
            return kept + (left - kept) * (before - level) / (before - after)
    return None


def equal_forgetting(curves: Mapping[str, Sequence[Curve]], levels: Sequence[float]) -> list[str]:
    """A Markdown table: control accuracy at equal target accuracy; where not all seeds reach a level, how many do."""
    lines = [f"| | {' | '.join(f'{level:.2f}' for level in levels)} |", "|---" * (len(levels) + 1) + "|"]
    for name, found in curves.items():
        cells = []
        for level in levels:
            reached = [v for v in (control_at(c, level) for c in found) if v is not None]
            mean = f": {statistics.fmean(reached):.3f}" if reached else ""
            part = f"{len(reached)} of {len(found)} seeds{mean}"
            cells.append(shown(reached) if len(reached) == len(found) else part)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def plot_curves(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]], labels: Sequence[tuple[str, str]], out: Path
) -> None:
    """One panel each, with standard errors over seeds along both axes; forgetting goes to the right."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (title, curves), (x_label, y_label) in zip(axes[0], panels.items(), labels, strict=True):
        for name, found in curves.items():
            points = list(zip(*found, strict=True))
            x, y = ([mean_and_error([p[i] for p in point]) for point in points] for i in (0, 1))
            axis.errorbar(
                [v for v, _ in x],
                [v for v, _ in y],
                xerr=[e for _, e in x],
                yerr=[e for _, e in y],
                fmt="o-",
                markersize=3,
                label=name,
            )
        axis.set(title=title, xlabel=x_label, ylabel=y_label)
        axis.invert_xaxis()
        axis.legend()
    figure.savefig(out, dpi=120)
