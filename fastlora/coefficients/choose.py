"""``fl.choose``: which merge of a pool scores best, and whether that is more than chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.coefficients.comparison import APART, SAME, Comparison
from fastlora.coefficients.pool_gram import PoolGram
from fastlora.coefficients.sweep import Point, Row, Sweep, run_points
from fastlora.engine.inner_products import summed
from fastlora.errors import InputError
from fastlora.merging.input_rows import Statistics
from fastlora.merging.merge import full_weights, merge
from fastlora.merging.registry import find_method
from fastlora.merging.scaled import scaled

Rule = str | Mapping[str, Any]
Scores = float | Sequence[float]
Scorer = Callable[[Adapter], Scores | Mapping[str, Scores]]

RULES: tuple[Rule, ...] = (
    "pico",
    {"method": "tsv", "spectrum": "flat"},
    {"method": "iso_c", "energy": 1.0},
    "ctm",
)
"""The structured rules that are tried. Without a cut, as the sums: ``iso_c`` keeps all directions, ``ctm`` is a cut."""

BY_INPUTS: tuple[Rule, ...] = ("regmean", "ssr")
"""Those that are tried where there are statistics of inputs."""

OWN, BEST = "own", "best sum"
"""Lengths of a rule's result: as it comes, and that of the sum that scored best."""

INNER = 8
"""Scales between the half of the mean and the sum, besides these and the matched norm."""

LEAST = 4
"""Examples that can be parted into two halves with an error each."""


def choose(
    pool: Pool | PoolGram,
    score: Scorer,
    *,
    weights: Mapping[str, float] | None = None,
    methods: Sequence[Rule] | None = None,
    scales: Sequence[float] | None = None,
    budget: int | None = None,
    rank: int | None = None,
    energy: float | None = None,
    data: Statistics | str | Path | None = None,
    save: str | Path | None = None,
    key: str | None = None,
    resume: Sweep | bool | None = None,
) -> Comparison:
    """Tries merges of a pool with a score: first sums of several lengths, then structured rules.

    The Gram blocks of the pool are computed once. The sums are ``c Σ w_i ΔW_i``: the plain sum ``c = 1``, the matched
    norm ``c = mean‖w_iΔW_i‖/‖Σ w_iΔW_i‖``, the mean ``c = 1/k``, and others from ``1/(2k)`` to 1. Every rule is tried
    at the length that it gives, and at that of the best sum. The highest selection score wins, the earliest of equals.

    A score on which the best of many is chosen says too much of it. So selection and report are on different data,
    if ``score`` gives them:

        fl.choose(pool, lambda a: [float(answer == y) for answer, y in run(a)])             # halves of the examples
        fl.choose(pool, lambda a: {"select": on_dev(a), "report": on_test(a)})

    Args:
        pool: two adapters at least, or their :class:`fastlora.PoolGram`.
        score: ``score(adapter)``, where more is better (of a loss give the negative). A sequence of numbers has one for
            every example, in one order: a random half of them selects, the same for all candidates, the other reports.
            ``{"select": …, "report": …}`` has both, each a number or one for every example. One number selects and
            reports, and :attr:`Comparison.conclusion` says so.
        weights: ``{name: w_i}``; all 1 by default.
        methods: rules beside the sums, names of :func:`fastlora.methods` or ``{"method": name, parameter: value}``. By
            default ``pico``, ``tsv`` with a flat spectrum, ``iso_c`` and ``ctm``, and with ``data`` also ``regmean``
            and ``ssr``.
        scales: the ``c`` of the sums, in place of those above; 1 is always tried.
        budget: calls of ``score`` at most. Candidates are tried in a fixed order, the scales from coarse to fine; those
            that are left out are listed.
        rank: cut every candidate to this rank (where a rule has one).
        energy: or to this share of ``Σσ²``.
        data: statistics of inputs, or their file, for rules that use them.
        save: JSON file that every result is added to, as :func:`fastlora.sweep` does.
        key: a text that names the pool and the score, for a file that is to be taken up again.
        resume: as :func:`fastlora.sweep` has it.

    Returns:
        :class:`Comparison`: the winner as an adapter, its score with the standard error over examples, whether it beats
        the plain sum by more than two errors of their difference, a table, a plot.

    Raises:
        InputError: fewer than two adapters, an unknown method or one whose parameters or inputs are missing, a budget
            below 1, scores that are no finite numbers or differ in what they name, a file of another sweep.

    Cost: two passes over the factors; then for every candidate small matrices, what its score reads, and the score.
    Rules on elements (``ties``) form all elements of every ``ΔW``. At most 11 sums, and two calls for every rule.
    """
    gram = pool if isinstance(pool, PoolGram) else PoolGram(_checked(pool))
    _checked(gram.pool)
    counted, _ = full_weights(gram.pool, weights)
    statistics = Statistics.load(data) if isinstance(data, str | Path) else data
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise InputError(f"choose: budget={budget!r} must be a whole number of at least 1: calls of the score")
    rules = _rules(methods, rank, energy, statistics)
    factors = _scales(gram, counted, scales)
    points: list[Point] = [{"merge": "sum", "scale": c} for c in factors]
    points += [{"merge": name, "scale": length} for length in (OWN, BEST) for name in rules]
    tried = points[:budget]
    result = Sweep("merges", key=key)
    candidates = _Candidates(gram, counted, rules, {"rank": rank, "energy": energy}, statistics, result)
    with gram:
        run_points(result, tried, candidates.build, _apart(score), save, resume)
        names = result.scores
        best = result.best(names[0])
        winner = candidates.build(best.point)
    return Comparison(result, best, winner, points[len(tried) :], candidates.told(best))


def _checked(pool: Pool) -> Pool:
    if len(pool) < 2:
        raise InputError("choose: a pool of one adapter has nothing to choose; give two adapters or more")
    return pool


class _Candidates:
    """The adapters of points; ``result`` has the rows that are there, which say which sum was the best."""

    def __init__(
        self,
        gram: PoolGram,
        weights: Mapping[str, float],
        rules: Mapping[str, Mapping[str, Any]],
        cut: Mapping[str, Any],
        data: Statistics | None,
        result: Sweep,
    ) -> None:
        self.gram, self.weights, self.rules, self.data, self.result = gram, weights, rules, data, result
        self.cut = {name: value for name, value in cut.items() if value is not None}

    def build(self, point: Point) -> Adapter:
        name, scale = point["merge"], point["scale"]
        if name == "sum":
            return self._sum(scale)
        told = self.told(Row(point, {}, 0.0))
        found = merge(self.gram.pool, told["weights"], method=told["method"], **self._settings(name))
        factor = 1.0 if scale == OWN else self._length_of_best() / _length(found)
        longer = scaled(found, factor, "choose: a scale")
        parameters = longer.provenance.get("parameters")
        more = {"lambda": factor} if factor != 1.0 else {}
        used = {**(parameters if isinstance(parameters, dict) else {}), **more}
        return replace(longer, provenance={**longer.provenance, "parameters": used})

    def told(self, row: Row) -> dict[str, Any]:
        """Method and weights of a row, as :func:`fastlora.merge` takes them."""
        name, scale = row.point["merge"], row.point["scale"]
        if name != "sum":
            return {"method": self.rules[name]["method"], "weights": dict(self.weights)}
        weights = {n: scale * w for n, w in self.weights.items()}
        return {"method": "svd" if self.cut else "cat", "weights": weights}

    def _sum(self, scale: float) -> Adapter:
        weights = {n: scale * w for n, w in self.weights.items()}
        if self.cut:
            return self.gram.merge(weights, **self.cut)
        return merge(self.gram.pool, weights, method="cat")

    def _settings(self, name: str) -> dict[str, Any]:
        settings = {n: v for n, v in self.rules[name].items() if n != "method"}
        return {**settings, **({"data": self.data} if find_method(self.rules[name]["method"]).takes_data else {})}

    def _length_of_best(self) -> float:
        """The norm of the sum that scored best; the first of equals."""
        name = self.result.scores[0]
        rows = [r for r in self.result.rows if r.point["merge"] == "sum"]
        best = max(rows, key=lambda r: -math.inf if math.isnan(r.scores[name]) else r.scores[name])
        return float(abs(best.point["scale"])) * _sum_norm(self.gram, self.weights)


def _length(adapter: Adapter) -> float:
    """``‖ΔW‖``; infinite for nothing, which no factor makes longer."""
    inner = float(summed(Pool([adapter])).clamp(min=0).sqrt())
    return inner if inner > 0 else math.inf


def _sum_norm(gram: PoolGram, weights: Mapping[str, float]) -> float:
    w = torch.tensor([weights[n] for n in gram.pool.names], dtype=torch.float64)
    return float((w @ gram.inner() @ w).clamp(min=0).sqrt())


def _scales(gram: PoolGram, weights: Mapping[str, float], given: Sequence[float] | None) -> list[float]:
    """The factors of the sum, the plain one first, then from coarse to fine."""
    if given is not None:
        if any(isinstance(c, bool) or not isinstance(c, int | float) or not math.isfinite(c) for c in given):
            raise InputError(f"choose: scales={list(given)!r} must be finite numbers")
        return list(dict.fromkeys([1.0, *map(float, given)]))
    count = sum(w != 0 for w in weights.values()) or 1
    norms = [abs(w) * norm for w, norm in zip(weights.values(), gram.norms().values(), strict=True) if w != 0]
    total, found = _sum_norm(gram, weights), [1.0]
    if norms and total > 1e-6 * sum(norms):
        found.append(sum(norms) / len(norms) / total)
    found.append(1.0 / count)
    order = sorted(range(INNER), key=lambda i: f"{i:03b}"[::-1])  # 0, 4, 2, 6, …: halves, then quarters
    found += [0.5 / count * (2.0 * count) ** (i / INNER) for i in order]
    return list(dict.fromkeys(float(f"{c:.4g}") for c in found))


def _rules(
    given: Sequence[Rule] | None, rank: int | None, energy: float | None, data: Statistics | None
) -> dict[str, dict[str, Any]]:
    """``{what a rule is called: its method and parameters}``; a cut for all of them counts where a rule has none."""
    if isinstance(given, str):
        raise InputError(f"choose: methods={given!r} must be a list of rules, [{given!r}]")
    rules = (*RULES, *(BY_INPUTS if data is not None else ())) if given is None else given
    found: dict[str, dict[str, Any]] = {}
    for rule in rules:
        settings = {"method": rule} if isinstance(rule, str) else dict(rule)
        method = find_method(str(settings.get("method")))
        cut = {n: v for n, v in (("rank", rank), ("energy", energy)) if v is not None and n in method.parameters}
        if given is None and cut:
            settings.pop("energy", None)
        if not {"rank", "energy"} & settings.keys():
            settings |= cut
        if method.takes_data and data is None:
            raise InputError(f"choose: method {method.name!r} needs data=…, the inputs of every adapter's modules")
        if method.form == "tiles" and not {"rank", "energy"} & settings.keys():
            raise InputError(
                f"choose: method {method.name!r} makes matrices of full rank; give rank=… or energy=… for all, or "
                f"{{'method': {method.name!r}, 'rank': …}}"
            )
        parameters = {n: v for n, v in settings.items() if n != "method"}
        method.checked(parameters)
        shown = {n: v for n, v in parameters.items() if n not in cut and (given is not None or n != "energy")}
        told = ", ".join(f"{n}={v}" for n, v in shown.items())
        found[f"{method.name} ({told})" if told else method.name] = settings
    return found


def _apart(score: Scorer) -> Callable[[Adapter], dict[str, Scores]]:
    """A score that has its selection and its report, or the one number that is both."""

    def run(adapter: Adapter) -> dict[str, Scores]:
        found = score(adapter)
        if not isinstance(found, Mapping):
            value = _numbers(found)
            return _halves(value) if isinstance(value, list) else {SAME: value}
        if set(found) != set(APART):
            raise InputError(
                f"choose: a score that returns several has {' and '.join(map(repr, APART))}, not "
                f"{', '.join(map(repr, found)) or 'none'}"
            )
        return {name: _numbers(found[name]) for name in APART}

    return run


def _halves(values: list[float]) -> dict[str, Scores]:
    """Two halves of the examples, drawn once for each number of them."""
    if len(values) < LEAST:
        raise InputError(
            f"choose: the score returned {len(values)} examples, and two halves of them need {LEAST} or more; return "
            "one number, or {'select': …, 'report': …}"
        )
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0)).tolist()
    half = len(values) // 2
    parts = (sorted(order[:half]), sorted(order[half:]))
    return {name: [values[i] for i in places] for name, places in zip(APART, parts, strict=True)}


def _numbers(value: Any) -> float | list[float]:
    """A number, or one for every example; all are finite."""
    listed = hasattr(value, "__len__") and not isinstance(value, str) and getattr(value, "shape", None) != ()
    try:
        numbers = [float(v) for v in value] if listed else [float(value)]
    except (TypeError, ValueError):
        raise InputError(f"choose: a score must be a number, or one for every example, not {value!r}") from None
    if not numbers or not all(map(math.isfinite, numbers)):
        raise InputError("choose: a score must be finite, and there must be one; this one has NaN, Inf or no number")
    return numbers if listed else numbers[0]
