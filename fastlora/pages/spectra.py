"""What a page shows of decompositions: spectra of modules beside the chance edge, and what is shared of every adapter.

All pairs of a pool can be thousands: their rows lie in a few arrays one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastlora.decomposition.report import Report
from fastlora.pages.packing import packed, packed_shares

EIGENVALUES = 8
MOST_NUMBERS = 2_000_000
"""Eigenvalues and shares of energy that a page holds at the most: 4 bytes of text for each."""

MOST_REPORTS = 2000

IN_ORDER = 30
"""Reports that stay in the order in which they were made."""


def of_the_whole(reports: Sequence[Report]) -> list[Report]:
    """Shares of energy as those of the adapters of the pool: a step of ``mode="iterative"`` has shares of what the
    steps before have left of the target."""
    left: dict[tuple[str, str], float] = {}
    told = []
    for report in reports:
        if report.settings["mode"] != "iterative":
            told.append(report)
            continue
        target, rows = report.settings["adapters"][0], []
        for row in report.rows:
            share, before = row.energy_shared[target], left.get((target, row.module), 1.0)
            left[target, row.module] = before * (1 - share)
            rows.append(replace(row, energy_shared={**row.energy_shared, target: before * share}))
        told.append(replace(report, rows=rows))
    return told


def excess(report: Report) -> float:
    """How far the largest eigenvalue stands above what chance gives in its module."""
    return max((max(row.eigenvalues, default=0.0) - row.chance_edge for row in report.rows), default=0.0)


def chosen(reports: Sequence[Report]) -> list[Report]:
    """The reports that a page has room for; of many those first whose eigenvalues stand out most above chance."""
    room = MOST_NUMBERS
    taken: set[int] = set()
    order = sorted(range(len(reports)), key=lambda i: -excess(reports[i]))
    for i in order:
        room -= sum(EIGENVALUES + len(row.adapters) for row in reports[i].rows)
        if taken and (room < 0 or len(taken) == MOST_REPORTS):
            break
        taken.add(i)
    return [reports[i] for i in (order if len(reports) > IN_ORDER else range(len(reports))) if i in taken]


def reports_data(reports: Sequence[Report], adapters: Mapping[str, int], modules: Mapping[str, int]) -> dict[str, Any]:
    """The reports in arrays: the rows of report ``i`` are those from ``starts[i]`` to ``starts[i + 1]``, and the shares
    of energy of one row those of all adapters of its report. ``adapters``, ``modules``: their numbers in the page."""
    rows = [row for report in reports for row in report.rows]
    energy = [
        row.energy_shared.get(name, np.nan)
        for report in reports
        for row in report.rows
        for name in report.settings["adapters"]
    ]
    values = np.full((len(rows), EIGENVALUES), np.nan)
    for i, row in enumerate(rows):
        listed = row.eigenvalues[:EIGENVALUES]
        values[i, : len(listed)] = listed
    return {
        "reports": [
            {
                "title": report.title,
                "adapters": [adapters[name] for name in report.settings["adapters"]],
                "warnings": report.warnings,
            }
            for report in reports
        ],
        "first": max(range(len(reports)), key=lambda i: excess(reports[i]), default=None),
        "threshold": _threshold(reports[0]) if reports else None,
        "starts": np.cumsum([0, *(len(report.rows) for report in reports)]).tolist(),
        "module": packed([modules[row.module] for row in rows], "i4"),
        "shared": packed([row.shared for row in rows], "u2"),
        "edge": packed_shares([row.chance_edge for row in rows]),
        "expected": packed([row.expected_by_chance for row in rows], "f4"),
        "values": packed_shares(values),
        "energy": packed_shares(energy),
    }


def _threshold(report: Report) -> float | None:
    """Where a line is drawn; a soft threshold has none."""
    threshold = report.settings["threshold"]
    return None if isinstance(threshold, str) else threshold


def summary(report: Report, norms: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """One line of the table of reports. ``norms``: ``‖ΔW‖`` by adapter and module."""
    names = report.settings["adapters"]
    shared = []
    for name in names:
        squares = {row.module: norms[name].get(row.module, 0.0) ** 2 for row in report.rows}
        whole = sum(norm**2 for norm in norms[name].values())
        part = sum(row.energy_shared.get(name, 0.0) * squares[row.module] for row in report.rows)
        shared.append(part / whole if whole > 0 else 0.0)
    return {
        "title": report.title,
        "shared": report.shared_directions,
        "modules": sum(1 for row in report.rows if row.shared),
        "of": len(report.rows),
        "chance": report.expected_by_chance,
        "largest": max((v for row in report.rows for v in row.eigenvalues), default=0.0),
        "edge": max((row.chance_edge for row in report.rows), default=0.0),
        "least_energy": min(shared, default=0.0),
        "most_energy": max(shared, default=0.0),
        "warnings": len(report.warnings),
    }
