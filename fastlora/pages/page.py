"""One page about a pool, as data: what the template prints, and the numbers that scripts draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlora._version import __version__
from fastlora.adapters.pool import Pool
from fastlora.analysis.similar import Overlap
from fastlora.core.card import recipe_yaml
from fastlora.decomposition.report import Report
from fastlora.pages.measures import Measures, measure
from fastlora.pages.packing import packed
from fastlora.pages.places import places, without_beginning
from fastlora.pages.resemblance import LISTED, Resemblance, as_rows, matrices, oddities, resemblance
from fastlora.pages.spectra import chosen, excess, of_the_whole, reports_data, summary

MOST_IN_MATRIX = 12
"""Adapters whose similarities are a table of numbers, too."""

Data = dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """What a page is made of.

    ``reports``: of decompositions, if there are any. ``result``: the name of the adapter of the pool that was made of
    the others. ``told``: settings and results in words, ``(what, text)``.
    """

    title: str
    pool: Pool
    overlap: Overlap
    reports: Sequence[Report] = ()
    result: str | None = None
    told: Sequence[tuple[str, str]] = ()
    notices: Sequence[str] = ()


def page_data(content: Content) -> tuple[Data, Data]:
    """``(printed, drawn)``: what the template writes as text and tables, and the arrays for scripts. Reads all factors
    once."""
    pool = content.pool
    where = places(pool.modules)
    measures = measure(pool, where)
    found = resemblance(content.overlap)
    index = {name: i for i, name in enumerate(pool.names)}
    modules = {module: m for m, module in enumerate(pool.modules)}
    told = _oddities(pool, measures, found)
    reports = of_the_whole(chosen(content.reports))
    adapters = [_adapter_row(i, pool, measures, found, told, content) for i in range(len(pool))]
    norms = {
        name: dict(zip(pool.modules, np.nan_to_num(row).tolist(), strict=True))
        for name, row in zip(pool.names, measures.norms, strict=True)
    }
    printed: Data = {
        "title": content.title,
        "version": __version__,
        "adapters": adapters,
        "overview": _overview(pool, measures, found) | {"has_result": content.result is not None},
        "notices": list(dict.fromkeys([*pool.told, *content.notices])),
        "matrix": _matrix(content.overlap),
        "duplicates_in_all": len(found.duplicates),
        "reports": [summary(report, norms) | {"excess": excess(report)} for report in reports],
        "reports_in_all": len(content.reports),
        "settings": _settings(content.reports),
        "warnings": list(content.reports[0].warnings) if len(content.reports) == 1 else [],
        "told": list(content.told),
        "listed": LISTED,
        **as_rows(found, index),
    }
    drawn: Data = {
        "adapters": adapters,
        "modules": pool.modules,
        "layers": without_beginning(where.layers),
        "kinds": where.kinds,
        "layer": where.layer,
        "kind": where.kind,
        "norm": packed(measures.totals, "f4"),
        "norms": packed(measures.norms, "f4"),
        "ranks": packed(measures.ranks, "i4"),
        "numerical": packed(measures.numerical, "i4"),
        "effective": packed(measures.effective, "f4"),
        "spectra": packed(measures.spectra, "f4"),
        "directions": measures.directions,
        "provenance": [recipe_yaml(adapter.provenance) for adapter in pool.adapters],
        "similar": matrices(content.overlap),
        "decompositions": reports_data(reports, index, modules),
    }
    return printed, drawn


def _adapter_row(
    i: int,
    pool: Pool,
    measures: Measures,
    found: Resemblance,
    told: Mapping[str, Sequence[str]],
    content: Content,
) -> Data:
    adapter = pool.adapters[i]
    there = measures.ranks[i] >= 0
    ranks = measures.ranks[i][there].tolist()
    nearest = found.nearest[adapter.name]
    return {
        "name": adapter.name,
        "is_result": adapter.name == content.result,
        "family": found.family[adapter.name],
        "modules": int(there.sum()),
        "least_rank": min(ranks, default=0),
        "most_rank": max(ranks, default=0),
        "parameters": measures.parameters[i],
        "norm": float(measures.totals[i]),
        "effective": float(measures.effective[i][there].mean()) if there.any() else 0.0,
        "nearest": None if nearest is None else pool.names.index(nearest.name),
        "cosine": None if nearest is None else nearest.cosine,
        "dtype": str(adapter.dtype)[6:],
        "base": adapter.base.model or "not named",
        "oddities": list(told.get(adapter.name, ())),
        "notes": list(adapter.notes),
    }


def _oddities(pool: Pool, measures: Measures, found: Resemblance) -> dict[str, list[str]]:
    told = oddities(found)
    for i, adapter in enumerate(pool.adapters):
        norms, ranks, numerical = (x[i] for x in (measures.norms, measures.ranks, measures.numerical))
        zero, missing = int((norms == 0).sum()), int((ranks < 0).sum())
        cut = int(((numerical < ranks) & (norms > 0)).sum())
        sentences = [
            (zero if measures.totals[i] > 0 else 0, "modules change nothing"),
            (missing, f"of {len(ranks)} modules are missing"),
            (cut, "modules have directions below the rounding of the stored numbers"),
            (len(adapter.extras), "parameters beside the updates"),
        ]
        own = [f"{count} {text}" for count, text in sentences if count]
        if own:
            told.setdefault(adapter.name, []).extend(own)
    return told


def _overview(pool: Pool, measures: Measures, found: Resemblance) -> Data:
    totals = measures.totals
    bases = list(dict.fromkeys(a.base.model or "not named" for a in pool.adapters))
    ranks = measures.ranks[measures.ranks >= 0]
    return {
        "adapters": len(pool),
        "modules": len(pool.modules),
        "parameters": sum(measures.parameters),
        "least_rank": int(ranks.min()) if len(ranks) else 0,
        "most_rank": int(ranks.max()) if len(ranks) else 0,
        "median_norm": float(np.median(totals)),
        "least_norm": float(totals.min()),
        "most_norm": float(totals.max()),
        "families": len(found.families),
        "alone": sum(1 for family in found.family.values() if family is None),
        "duplicates": len(found.duplicates),
        "outliers": len({outlier.name for outlier in found.outliers}),
        "bases": bases,
    }


def _matrix(overlap: Overlap) -> Data | None:
    if len(overlap.names) > MOST_IN_MATRIX:
        return None
    return {"cosine": overlap.cosine.tolist(), "subspace": overlap.subspace.tolist()}


def _settings(reports: Sequence[Report]) -> list[tuple[str, str]]:
    """What the decompositions were made with."""
    if not reports:
        return []
    names = ("chain", "side", "threshold", "weighting", "rho", "rank", "energy", "rtol", "mode")
    given = ((name, reports[0].settings.get(name)) for name in names)
    return [(name, f"{value:g}" if isinstance(value, float) else str(value)) for name, value in given if value]
