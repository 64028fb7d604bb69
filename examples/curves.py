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


def equal_forgetting(
    curves: Mapping[str, Sequence[Curve]], levels: Sequence[float], against: str | None = None
) -> list[str]:
    """A Markdown table: control accuracy at equal target accuracy; where not all seeds reach a level, how many do.

    against: the curve that the others are also compared with seed by seed, where both reach the level.
    """
    lines = [f"| | {' | '.join(f'{level:.2f}' for level in levels)} |", "|---" * (len(levels) + 1) + "|"]
    for name, found in curves.items():
        at = [[control_at(curve, level) for curve in found] for level in levels]
        lines.append(f"| {name} | {' | '.join(map(_cell, at))} |")
    for name in [n for n in curves if against is not None and n != against]:
        gains = [
            [
                None if one is None or other is None else one - other
                for one, other in (
                    (control_at(mine, level), control_at(theirs, level))
                    for mine, theirs in zip(curves[name], curves[against or ""], strict=True)
                )
            ]
            for level in levels
        ]
        lines.append(f"| {name} − {against} | {' | '.join(map(_cell, gains))} |")
    return lines


def _cell(values: Sequence[float | None]) -> str:
    reached = [v for v in values if v is not None]
    if len(reached) == len(values):
        return shown(reached)
    return f"{len(reached)} of {len(values)} seeds" + (f": {statistics.fmean(reached):.3f}" if reached else "")


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
