"""Sweeps: one adapter for every point of a grid of coefficients, each scored."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.coefficients.plots import plot_sweep
from fastlora.coefficients.pool_gram import PoolGram
from fastlora.core.vector_space import VectorSpace
from fastlora.errors import InputError
from fastlora.expressions.compose import compose
from fastlora.expressions.functions import WORDS
from fastlora.expressions.grammar import bind, parse
from fastlora.files.disk_errors import writing
from fastlora.files.earlier import Overwrite
from fastlora.files.output import replacing
from fastlora.files.pictures import check_picture
from fastlora.runtime.progress import track

if TYPE_CHECKING:
    from rich.table import Table


Point = dict[str, Any]
Build = Callable[[Point], VectorSpace]
Value = float | Sequence[float]
Score = Callable[[Any], Value | Mapping[str, Value]] | Mapping[str, Callable[[Any], Value]]
Adapters = Pool | PoolGram | Mapping[str, Adapter]

FORMAT = "fastlora sweep 2"


@dataclass(frozen=True, slots=True)
class Row:
    """One point of a sweep: its coefficients, its scores and the seconds that they took. Scores that were given example
    by example count with their mean, and are in ``examples``."""

    point: Point
    scores: dict[str, float]
    seconds: float
    examples: dict[str, list[float]] = field(default_factory=dict)


@dataclass(eq=False)
class Sweep:
    """The rows of a sweep, in the order of the grid: what :func:`fastlora.sweep` returns.

    ``of`` is the expression, or the name of the function that was swept. A row has ``point``
    (``{variable: value}``), ``scores`` (``{name: number}``) and ``seconds``. ``key`` is what the caller named it by.
    """

    of: str
    rows: list[Row] = field(default_factory=list)
    key: str | None = None

    @property
    def variables(self) -> list[str]:
        """The names of the grid, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.point))

    @property
    def scores(self) -> list[str]:
        """The names of the scores, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.scores))

    def best(self, score: str | None = None, *, maximize: bool = True) -> Row:
        """The row with the highest value of a score, or the lowest with ``maximize=False``.

        ``score`` is the first one by default. The earliest of equal rows is returned, and NaN never wins. Raises
        :class:`InputError` for an unknown score, or where no row has a number.
        """
        name = self._score(score)
        known = self._known(name)
        if not known:
            raise InputError(f"the sweep of {self.of} has no row with a {name!r} that is a number")
        return (max if maximize else min)(known, key=lambda r: r.scores[name])

    def _score(self, name: str | None) -> str:
        if not self.scores:
            raise InputError(f"the sweep of {self.of} has no rows yet")
        if name is None:
            return self.scores[0]
        if name not in self.scores:
            raise InputError(f"the sweep has no score {name!r}; it has {', '.join(self.scores)}")
        return name

    def table(self) -> Table:
        """A :class:`rich.table.Table` of all rows; a star marks the highest value of every score."""
        from rich.table import Table

        table = Table(title=self.of, title_justify="left")
        for name in [*self.variables, *self.scores]:
            table.add_column(name, justify="right")
        best = {name: self.best(name) for name in self.scores if self._known(name)}
        for row in self.rows:
            cells = [_cell(row.point.get(v)) for v in self.variables]
            for name in self.scores:
                star = " *" if best.get(name) is row else ""
                cells.append(_cell(row.scores.get(name)) + star)
            table.add_row(*cells)
        return table

    def _known(self, name: str) -> list[Row]:
        return [r for r in self.rows if not math.isnan(r.scores.get(name, math.nan))]

    def plot(self, path: str | Path, *, overwrite: Overwrite = False) -> Path:
        """Draws the scores into the file ``path`` (``.png``, ``.pdf``, ``.svg`` or ``.jpg``).

        One variable gives curves, two give a map, and more give the scores in the order of the rows. A picture that
        fastlora drew is replaced with ``overwrite=True``, any file with ``overwrite="force"``. Needs matplotlib
        (``pip install fastlora[plot]``). Raises :class:`InputError` without rows or for another ending,
        :class:`OutputError` for a path that cannot be written.
        """
        check_picture(Path(path), overwrite)
        self._score(None)
        points = [{name: row.point.get(name) for name in self.variables} for row in self.rows]
        scores = {name: [row.scores.get(name) for row in self.rows] for name in self.scores}
        return plot_sweep(points, scores, self.of, Path(path))

    def as_dict(self) -> dict[str, Any]:
        """Plain data; scores that are no numbers are ``None``."""
        rows = [
            {
                "point": row.point,
                "scores": {n: _told(v) for n, v in row.scores.items()},
                "seconds": round(row.seconds, 6),
                **({"examples": {n: [*map(_told, v)] for n, v in row.examples.items()}} if row.examples else {}),
            }
            for row in self.rows
        ]
        return {"format": FORMAT, "of": self.of, "key": self.key, "rows": rows}

    def save(self, path: str | Path) -> Path:
        """Writes all rows as JSON to ``path``; the file exists whole or as it was before.

        Raises :class:`OutputError` when it cannot be written.
        """
        path = Path(path)
        text = json.dumps(self.as_dict(), allow_nan=False, indent=1) + "\n"
        with replacing(path, overwrite="force") as staging, writing(path):
            staging.write_text(text, encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """Reads the file that :meth:`save` wrote to ``path``. Raises :class:`InputError` for any other file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']!r}")
            rows = [_row(r) for r in data["rows"]]
            return cls(str(data["of"]), rows, None if data["key"] is None else str(data["key"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no saved sweep ({error}); choose another file, or delete it") from None


def _row(data: Mapping[str, Any]) -> Row:
    """A row as it was saved."""
    scores = {n: _read(v) for n, v in data["scores"].items()}
    examples = {n: [*map(_read, values)] for n, values in data.get("examples", {}).items()}
    return Row(data["point"], scores, data["seconds"], examples)


def _told(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def sweep(
    expression: str | Build,
    grid: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]],
    *,
    score: Score,
    adapters: Adapters | None = None,
    save: str | Path | None = None,
    key: str | None = None,
    resume: Sweep | bool | None = None,
) -> Sweep:
    """Builds and scores an adapter for every point of a grid.

    With ``adapters``, their Gram blocks are computed once (:class:`fastlora.PoolGram`: two passes over the factors),
    and whatever a point merges, decomposes or compresses of them reads no factor again but to form its result.

        fl.sweep("lam*a + (1 - lam)*b", {"lam": [0.1, 0.5, 0.9]}, adapters=pool, score=accuracy)
        fl.sweep(lambda p: fl.decompose(pool, p["tau"]).shared, {"tau": [0.3, 0.6]}, adapters=pool, score=accuracy)

    Args:
        expression: an expression of :func:`fastlora.compose` in which the names of the grid stand for their values, or
            a function ``build(point) -> Adapter``.
        grid: ``{name: values}`` for all combinations, the last name fastest, or a list of points.
        score: ``score(adapter)`` returns a number, or several by name; or ``{name: function}``. A sequence of numbers,
            one an example, counts with its mean.
        adapters: what the expression names, as a pool or ``{name: adapter}``; a PoolGram is used as it is.
        save: JSON file that every row is added to. A file that exists is taken up again with ``key`` or ``resume``: the
            points that it has are not computed a second time. Otherwise it is refused.
        key: a text that names what is swept and how it is scored, for a file that is to be taken up again. Choose
            another one when any of it changes.
        resume: ``True`` takes up the file ``save`` without a key. A :class:`Sweep` gives rows of an earlier, unfinished
            sweep besides (:meth:`Sweep.load`, or an error's ``sweep``).

            Earlier rows must agree with this call in the expression or the function's name, in the key if they have
            one, in the variables and in the names of the scores. That the adapters, the function and the scores are
            still the same is the caller's word: they are not compared.

    Returns:
        :class:`Sweep`. When a point fails or Ctrl-C is pressed, the error is passed on with the rows that are done in
        its attribute ``sweep``; they are also in the file ``save``.

    Raises:
        InputError: an empty grid, points that name different variables, scores that are no numbers, a file that belongs
            to another sweep, or may do so.
        ExpressionError: an expression that :func:`fastlora.compose` refuses.

    Cost: two passes over the factors of ``adapters``. After that every point costs small matrices, the forming of its
    result where the score reads it, and the score itself.
    """
    points = grid_points(grid)
    gram, names = _prepared(adapters)
    if isinstance(expression, str):
        label = expression
        build = expression_builder(expression, list(points[0]), names)
    else:
        label, build = getattr(expression, "__qualname__", type(expression).__qualname__), expression
    if key is not None and (not isinstance(key, str) or not key):
        raise InputError(f"sweep: key={key!r} must be a text that names the function, the adapters and the score")
    result = Sweep(label, key=key)
    with gram or contextlib.nullcontext():
        return run_points(result, points, build, score, save, resume)


def run_points(
    result: Sweep, points: list[Point], build: Build, score: Score, save: str | Path | None, resume: Sweep | bool | None
) -> Sweep:
    """Fills a sweep, which ``build`` may look at: the rows of the points before are in it."""
    scorers = _scorers(score)
    done = _earlier(result, list(points[0]), save, resume)
    try:
        for point in track(points, "sweeping"):
            row = done.get(_key(point))
            if row is None:
                row = _run(build, dict(point), scorers)
                _require_same_scores(row, done)
            result.rows.append(row)
            if save is not None:
                result.save(save)
    except BaseException as error:
        error.sweep = result  # type: ignore[attr-defined]
        error.add_note(f"{len(result.rows)} of {len(points)} points of the sweep are done: see the error's `.sweep`")
        raise
    return result


def grid_points(grid: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]) -> list[Point]:
    """Every point of a grid."""
    if isinstance(grid, Mapping):
        values = {name: list(v) for name, v in grid.items()}
        points = [dict(zip(values, v, strict=True)) for v in itertools.product(*values.values())]
    else:
        points = [dict(p) for p in grid]
    if not points or not points[0]:
        raise InputError("sweep: the grid has no points; give {name: [values…]} or a list of {name: value}")
    for point in points:
        if point.keys() != points[0].keys():
            raise InputError(
                "sweep: the points of a grid name the same variables, but one has "
                f"{', '.join(point) or 'none'} and the first {', '.join(points[0])}"
            )
        for name, value in point.items():
            if hasattr(value, "item") and not getattr(value, "shape", ()):  # numbers of numpy and torch
                point[name] = value = value.item()
            if isinstance(value, numbers.Real) and not isinstance(value, bool):
                point[name] = int(value) if isinstance(value, numbers.Integral) else float(value)
    return points


Scored = tuple[dict[str, float], dict[str, list[float]]]
"""Scores by name, and those that were given example by example."""


def _scorers(score: Score) -> Callable[[VectorSpace], Scored]:
    def run(adapter: VectorSpace) -> Scored:
        if isinstance(score, Mapping):
            result: Any = {name: function(adapter) for name, function in score.items()}
        else:
            result = score(adapter)
        named = dict(result) if isinstance(result, Mapping) else {"score": result}
        scores: dict[str, float] = {}
        examples: dict[str, list[float]] = {}
        try:
            for name, value in named.items():
                if hasattr(value, "__len__") and not isinstance(value, str) and getattr(value, "shape", None) != ():
                    examples[str(name)] = own = [float(v) for v in value]
                    scores[str(name)] = math.fsum(own) / len(own)
                else:
                    scores[str(name)] = float(value)
        except (TypeError, ValueError, ZeroDivisionError):
            raise InputError(f"sweep: a score must be a number or numbers by name, not {result!r}") from None
        return scores, examples

    return run


def _prepared(adapters: Adapters | None) -> tuple[PoolGram | None, dict[str, Adapter]]:
    """The Gram blocks of the adapters, and the adapters by name."""
    if adapters is None:
        return None, {}
    if isinstance(adapters, Pool):
        adapters = PoolGram(adapters)
    if isinstance(adapters, PoolGram):
        return adapters, {name: adapters.pool[name] for name in adapters.pool.names}
    low_rank = [replace(a, name=name) for name, a in adapters.items() if isinstance(a, Adapter)]
    return PoolGram(Pool(low_rank)) if low_rank else None, dict(adapters)


def expression_builder(expression: str, variables: Sequence[str], names: Mapping[str, Adapter]) -> Build:
    """``build(point)`` for an expression: it is composed with the point's values in the place of the variables."""
    if not names:
        raise InputError("sweep: an expression needs adapters=…, the adapters that it names")
    tree = parse(expression)
    for variable in variables:
        if variable in names:
            raise InputError(f"sweep: {variable!r} is an adapter and a variable of the grid; rename one of them")
        if bind(tree, {variable: 0.0}, WORDS) == tree:
            raise InputError(f"sweep: the grid's variable {variable!r} does not occur in {expression!r}")
    return lambda point: compose(expression, names, numbers=point)


def _run(build: Build, point: Point, scorers: Callable[[VectorSpace], Scored]) -> Row:
    start = time.perf_counter()
    adapter = build(point)
    if not hasattr(adapter, "save"):
        raise InputError(f"sweep: what was built for {point} is a {type(adapter).__name__}, not an adapter")
    scores, examples = scorers(adapter)
    return Row(point, scores, time.perf_counter() - start, examples)


def _key(point: Point) -> str:
    return json.dumps(point, sort_keys=True, default=str)


def _earlier(
    sweep: Sweep, variables: list[str], save: str | Path | None, resume: Sweep | bool | None
) -> dict[str, Row]:
    """Rows that are there already, by point."""
    earlier: list[Sweep] = []
    if save is not None and Path(save).exists():
        saved = Sweep.load(save)
        _require_same(saved, sweep, variables, f"the rows of {save}")
        if resume in (None, False) and (sweep.key is None or saved.key != sweep.key):
            raise InputError(
                f"sweep: {save} holds {len(saved.rows)} rows of a sweep of {saved.of!r}, but whether their function "
                "and score are those of this call cannot be known. Give key='…', a name for them, when a sweep starts "
                "and when it is taken up again; or say that the rows are of this sweep, with resume=True; or choose "
                "another file"
            )
        earlier.append(saved)
    if isinstance(resume, Sweep):
        _require_same(resume, sweep, variables, "the rows of resume=")
        earlier.append(resume)
    return {_key(row.point): row for one in earlier for row in one.rows}


def _require_same(earlier: Sweep, sweep: Sweep, variables: list[str], what: str) -> None:
    difference = None
    if earlier.of != sweep.of:
        difference = f"are of {earlier.of!r}, not of {sweep.of!r}"
    elif earlier.key is not None and earlier.key != sweep.key:
        difference = f"have the key {earlier.key!r}, not {sweep.key!r}"
    elif earlier.rows and set(earlier.variables) != set(variables):
        difference = f"have the variables {', '.join(earlier.variables)}, not {', '.join(variables)}"
    if difference is not None:
        raise InputError(f"sweep: {what} {difference}; choose another file, or leave them out")


def _require_same_scores(row: Row, done: Mapping[str, Row]) -> None:
    for earlier in done.values():
        if earlier.scores.keys() != row.scores.keys():
            raise InputError(
                f"sweep: the earlier rows have the scores {', '.join(earlier.scores)}, but this call computes "
                f"{', '.join(row.scores)}; they are of another sweep: choose another file"
            )
