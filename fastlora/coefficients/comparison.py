"""What :func:`fastlora.choose` found: the winner, beside the plain sum."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.adapters.lora import Adapter
from fastlora.coefficients.plots import plot_bars
from fastlora.coefficients.sweep import Point, Row, Sweep
from fastlora.errors import InputError
from fastlora.files.earlier import Overwrite
from fastlora.files.pictures import check_picture

if TYPE_CHECKING:
    from rich.table import Table

APART = ("select", "report")
SAME = "score"
ERRORS = 2.0
"""Standard errors that a difference must exceed."""

Measured = tuple[float, float | None]
"""A mean and its standard error; ``None`` where there are no examples."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """The merges of a pool that were tried: what :func:`fastlora.choose` returns.

    ``sweep`` has a row for every candidate: ``point["merge"]``, a rule or ``"sum"``, and ``point["scale"]``, the factor
    of a sum, ``"own"`` or ``"best sum"``; scores, and examples where they were given. ``best``: the row that won.
    ``adapter``: what it made. ``left``: candidates for which the budget did not last. ``settings``: method and weights
    of the winner.
    """

    sweep: Sweep
    best: Row
    adapter: Adapter
    left: Sequence[Point]
    settings: dict[str, Any]

    @property
    def plain(self) -> Row:
        """The row of the plain sum, with the factor 1."""
        return next(r for r in self.sweep.rows if r.point["merge"] == "sum" and r.point["scale"] == 1.0)

    @property
    def best_sum(self) -> Row:
        """The row of the sum that scored best."""
        sums = Sweep(self.sweep.of, [r for r in self.sweep.rows if r.point["merge"] == "sum"])
        return sums.best(self._selected)

    @property
    def apart(self) -> bool:
        """Whether the data that selected and those of the report are different ones."""
        return self._selected in APART

    @property
    def _selected(self) -> str:
        return self.sweep.scores[0]

    @property
    def _reported(self) -> str:
        return self.sweep.scores[-1]

    def reported(self, row: Row) -> Measured:
        """The report score of a ``row``, and its standard error ``s/√n`` over the examples."""
        return _measured(row.scores[self._reported], row.examples.get(self._reported))

    def gain(self, row: Row, over: Row) -> Measured:
        """The report score of a ``row`` minus that of another (``over``), and the standard error of the difference,
        example by example. Raises :class:`InputError` for rows of unlike examples."""
        mine, theirs = (r.examples.get(self._reported) for r in (row, over))
        difference = row.scores[self._reported] - over.scores[self._reported]
        if mine is None or theirs is None:
            return difference, None
        if len(mine) != len(theirs):
            raise InputError(
                f"choose: the score gave {len(mine)} examples for one candidate and {len(theirs)} for another; they "
                "must be the same ones, in one order"
            )
        return _measured(difference, [a - b for a, b in zip(mine, theirs, strict=True)])

    @property
    def beats_sum(self) -> bool | None:
        """Whether the winner beats the plain sum by more than two standard errors; ``None`` where there are none."""
        gain, error = self.gain(self.best, self.plain)
        return None if error is None else gain > ERRORS * error

    @property
    def conclusion(self) -> list[str]:
        """What was found, in sentences."""
        lines = [
            f"The winner of {len(self.sweep.rows)}: {name_of(self.best.point)}, {_shown(self.reported(self.best))}."
        ]
        if self.best is self.plain:
            lines.append("It is the plain sum itself.")
        else:
            lines.append(self._versus("the plain sum", self.plain))
            if self.best.point["merge"] != "sum" and self.best_sum is not self.plain:
                lines.append(self._versus(f"the best of the sums ({name_of(self.best_sum.point)})", self.best_sum))
        if not self.apart:
            lines.append(
                "Selection and report are on the same data, so the winner's score is too high by what the best of "
                f"{len(self.sweep.rows)} owes to chance."
            )
        if self.left:
            told = ", ".join(map(name_of, self.left))
            lines.append(f"The budget left out {len(self.left)}: {told}.")
        return lines

    def _versus(self, what: str, row: Row) -> str:
        gain, error = self.gain(self.best, row)
        if error is None:
            return f"Over {what} it gains {gain:+.4f}. Whether that is chance cannot be known: there are no examples."
        much = "more" if gain > ERRORS * error else "not more"
        return f"Over {what} it gains {_shown((gain, error), signed=True)}: {much} than two errors."

    def table(self) -> Table:
        """A :class:`rich.table.Table` of all candidates; a star marks the winner."""
        from rich.table import Table

        columns, rows = self.rows()
        table = Table(title="merges", title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        return table

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headings, and a row of text for every candidate."""
        columns = ["merge", "scale", *(["selection"] if self.apart else []), "report" if self.apart else "score"]
        rows = []
        for row in self.sweep.rows:
            gain = "" if row is self.plain else _shown(self.gain(row, self.plain), signed=True)
            scores = [f"{row.scores[self._selected]:.4g}"] if self.apart else []
            star = " *" if row is self.best else ""
            rows.append([row.point["merge"] + star, _scale(row.point), *scores, _shown(self.reported(row)), gain])
        return [*columns, "− plain sum"], rows

    def plot(self, path: str | Path, *, overwrite: Overwrite = False) -> Path:
        """Draws the report scores with their errors into the file ``path`` (``.png``, ``.pdf``, ``.svg``, ``.jpg``).

        A picture that fastlora drew is replaced with ``overwrite=True``, any file with ``overwrite="force"``. Needs
        matplotlib (``pip install fastlora[plot]``). Raises :class:`InputError` for another ending,
        :class:`OutputError` for a path that cannot be written.
        """
        check_picture(Path(path), overwrite)
        names = [name_of(row.point) for row in self.sweep.rows]
        found = [self.reported(row) for row in self.sweep.rows]
        means, errors = [mean for mean, _ in found], [error or 0.0 for _, error in found]
        line = self.reported(self.plain)[0]
        return plot_bars(names, means, errors, self.sweep.rows.index(self.best), line, Path(path))

    def as_dict(self) -> dict[str, Any]:
        """Plain data: the candidates, the winner, and what was concluded."""
        (mean, error), (gain, of_gain) = self.reported(self.best), self.gain(self.best, self.plain)
        return {
            "winner": {**self.best.point, **self.settings, "score": mean, "error": error},
            "gain_over_plain_sum": {"gain": gain, "error": of_gain, "more_than_two_errors": self.beats_sum},
            "selected_and_reported_on_different_data": self.apart,
            "candidates": [
                {**r.point, "scores": r.scores, "error": self.reported(r)[1], "seconds": r.seconds}
                for r in self.sweep.rows
            ],
            "left_out": list(self.left),
            "conclusion": self.conclusion,
        }


def name_of(point: Point) -> str:
    """A candidate in words."""
    if point["merge"] == "sum":
        return f"sum × {_scale(point)}"
    return f"{point['merge']}, {'as it is' if point['scale'] == 'own' else 'as long as the best sum'}"


def _scale(point: Point) -> str:
    return f"{point['scale']:.4g}" if isinstance(point["scale"], float) else str(point["scale"])


def _measured(mean: float, values: Sequence[float] | None) -> Measured:
    if values is None or len(values) < 2:
        return mean, None
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def _shown(found: Measured, *, signed: bool = False) -> str:
    mean, error = found
    text = f"{mean:+.4f}" if signed else f"{mean:.4f}"
    return text if error is None else f"{text} ± {error:.4f}"
