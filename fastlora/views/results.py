"""Results of decompositions and comparisons, as plain data and as tables."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fastlora.views.input_parts import input_rows, show_input_report
from fastlora.views.tables import ROWS, Data, Table, without_common
from fastlora.views.text import YELLOW, print_paragraph

if TYPE_CHECKING:
    from fastlora.analysis.similar import Overlap
    from fastlora.decomposition.input_parts import InputDecomposition
    from fastlora.decomposition.result import Decomposition

NUMBERS = re.compile(r"[\d.]+|'[^']*'")
"""What differs between two warnings of one kind: numbers and names."""

MANY = 8
"""Adapters that a matrix, or a column for each, is printed for at the most."""

NEIGHBOURS = 3


def decomposition_data(parts: Decomposition | InputDecomposition, out: Path) -> Data:
    """Every report, and where the adapters were written."""
    return {"out": str(out), "mode": parts.mode, "reports": [report.as_dict() for report in parts.reports]}


def show_decomposition(data: Data, every: bool) -> None:
    """Prints what :func:`decomposition_data` found; ``every``: all modules, not the most shared."""
    reports = data["reports"]
    if data["mode"] == "inputs":
        show_input_report(reports[0], every)
    elif len(reports) == 1:
        _show_report(reports[0], every)
    else:
        _show_reports(reports, every)
    print_paragraph(f"written: {data['out']} ({_written(data)} adapters, report.json)")


def _written(data: Data) -> int:
    """How many adapters were written: what is shared and what is unique, but of steps the last unique part alone."""
    if data["mode"] == "inputs":
        return 2 * len(data["reports"][0]["settings"]["adapters"])
    parts = [1 + len(report["settings"]["adapters"]) for report in data["reports"]]
    return 1 if data["mode"] == "iterative" else sum(parts)


def decomposition_rows(data: Data) -> list[list[object]]:
    """The modules of all reports as one table with a heading: a column for the energy of every adapter."""
    if data["mode"] == "inputs":
        return input_rows(data["reports"][0])
    names = list(dict.fromkeys(name for report in data["reports"] for name in report["settings"]["adapters"]))
    numbers = ["shared", "expected_by_chance", "chance_edge", "gap"]
    lists = ["shape", "ranks", "directions", "eigenvalues"]
    heading = ["report", "module", *numbers, *lists, *(f"energy_shared of {name}" for name in names)]
    rows: list[list[object]] = [list(heading)]
    for report in data["reports"]:
        for row in report["rows"]:
            joined = [" ".join(map(str, row[key])) for key in lists]
            energy = [row["energy_shared"].get(name, "") for name in names]
            rows.append([report["title"], row["module"], *(row[key] for key in numbers), *joined, *energy])
    return rows


def _show_report(report: Data, every: bool) -> None:
    settings = report["settings"]
    names = settings["adapters"]
    print_paragraph(
        f": {settings['chain']} chain, {settings['side']} side, {_threshold(settings)}", start=report["title"]
    )
    energy = (
        [f"named:{name} %" for name in names] if len(names) <= MANY else ["number:mean %", "number:most %", "name:of"]
    )
    table = Table(
        "name:module",
        "text:rank",
        "number:shared",
        "number:by chance",
        "text:largest eigenvalues",
        "number:chance edge",
        *energy,
    )
    rows = report["rows"]
    shown = rows if every else sorted(rows, key=lambda r: (-r["shared"], -max(r["eigenvalues"], default=0)))[:ROWS]
    short = without_common([row["module"] for row in rows])
    for row in shown:
        values = " ".join(f"{v:.3f}" for v in row["eigenvalues"][:4])
        numbers = (row["shared"], f"{row['expected_by_chance']:.2g}", values, f"{row['chance_edge']:.3f}")
        table.add(short[row["module"]], _ranks(row["directions"]), *numbers, *_energy(row["energy_shared"], names))
    table.print()
    if len(shown) < len(rows):
        print_paragraph(f"{len(rows) - len(shown)} more modules: --all, --csv FILE or report.json")
    totals = report["totals"]
    print_paragraph(
        f"{totals['shared_directions']} directions shared in {_shared_modules(rows)} of {len(rows)} modules; "
        f"{totals['expected_by_chance']:.2g} expected by chance. Columns in %: share of ‖ΔW‖² in the shared directions."
    )
    for warning in report["warnings"]:
        print_paragraph(f" {warning}", start="warning:", style=YELLOW)


def _threshold(settings: Data) -> str:
    value, weighted = settings["threshold"], settings.get("weighting")
    text = f"{value} threshold" if isinstance(value, str) else f"τ = {value:g}"
    return f"{text}, weighted by {weighted} (ρ = {settings['rho']:g})" if weighted else text


def _ranks(ranks: list[int]) -> str:
    if len(ranks) <= MANY:
        return "/".join(map(str, ranks))
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"


def _energy(shares: dict[str, float], names: list[str]) -> list[str]:
    """The share of every adapter, or of many their mean, and which has the most."""
    if len(names) <= MANY:
        return [f"{100 * shares[n]:.1f}" if n in shares else "–" for n in names]
    if not shares:
        return ["–", "–", "–"]
    most = max(shares, key=lambda name: shares[name])
    return [f"{100 * sum(shares.values()) / len(shares):.1f}", f"{100 * shares[most]:.1f}", most]


def _shared_modules(rows: list[Data]) -> int:
    return sum(1 for row in rows if row["shared"])


def _show_reports(reports: list[Data], every: bool) -> None:
    """Prints a line for each of several; of very many those that share most, and of warnings of one kind the first."""
    shown = reports if every or len(reports) <= ROWS else sorted(reports, key=_stands_out, reverse=True)[:ROWS]
    table = Table(
        "name:chain",
        "number:shared directions",
        "number:modules",
        "number:by chance",
        "number:largest eigenvalue",
        "number:warnings",
    )
    for report in shown:
        rows, totals = report["rows"], report["totals"]
        largest = max((v for row in rows for v in row["eigenvalues"]), default=0.0)
        table.add(
            report["title"],
            totals["shared_directions"],
            f"{_shared_modules(rows)} of {len(rows)}",
            f"{totals['expected_by_chance']:.2g}",
            f"{largest:.3f}",
            len(report["warnings"]),
        )
    table.print()
    if len(shown) < len(reports):
        print_paragraph(f"{len(reports) - len(shown)} more: --all, --csv FILE, --html FILE or report.json")
    kinds: dict[str, list[str]] = {}
    for warning in dict.fromkeys(w for report in shown for w in report["warnings"]):
        kinds.setdefault(warning if every else NUMBERS.sub("", warning), []).append(warning)
    for first, *others in kinds.values():
        alike = f" ({len(others)} more of this kind: --all)" if others else ""
        print_paragraph(f" {first}{alike}", start="warning:", style=YELLOW)


def _stands_out(report: Data) -> tuple[int, float]:
    """What is shared, then how far the largest eigenvalue is above what chance gives in its module."""
    above = (max(row["eigenvalues"], default=0.0) - row["chance_edge"] for row in report["rows"])
    return report["totals"]["shared_directions"], max(above, default=0.0)


def overlap_arrays(result: Overlap) -> Data:
    """What is shown of :func:`overlap_data`, as NumPy has it: lists of hundreds take a while."""
    return {"names": result.names, "cosine": result.cosine.numpy(), "subspace": result.subspace.numpy()}


def overlap_data(result: Overlap) -> Data:
    """Both matrices of a pool and of every module, in the order of the names."""
    modules = {m: {"cosine": c.tolist(), "subspace": s.tolist()} for m, (c, s) in result.modules.items()}
    return {
        "names": list(result.names),
        "cosine": result.cosine.tolist(),
        "subspace": result.subspace.tolist(),
        "norms": result.norms.tolist(),
        "modules": modules,
        "notices": list(result.notices),
    }


def show_overlap(data: Data, every: bool, csv: Path | None) -> None:
    """Prints both matrices of a few adapters, of many the nearest ones of each. ``csv``: where the matrices are."""
    names = data["names"]
    if len(names) > MANY:
        _show_neighbours(data, every)
        place = "full matrices: --csv FILE or --json" if csv is None else f"full matrices: {csv}"
        print_paragraph(place)
        return
    for title, key in (("cosine of ΔW", "cosine"), ("subspace overlap", "subspace")):
        table = Table("name:", *(f"named:{name}" for name in names), title=title)
        for name, values in zip(names, data[key], strict=True):
            table.add(name, *map(_number, values))
        table.print()


def overlap_rows(data: Data) -> list[list[object]]:
    """Both matrices as one table with a heading, one below the other."""
    rows: list[list[object]] = [["similarity", "adapter", *data["names"]]]
    for key in ("cosine", "subspace"):
        for name, values in zip(data["names"], data[key], strict=True):
            rows.append([key, name, *("" if math.isnan(v) else v for v in values)])
    return rows


def nearest(data: Data) -> list[tuple[str, list[tuple[str, float, float]]]]:
    """Every adapter with the others of the largest cosines, ``(name, cosine, subspace)``, largest first."""
    import numpy as np

    names, cosines = data["names"], np.array(data["cosine"], dtype=float)
    np.fill_diagonal(cosines, np.nan)
    order = np.argsort(-np.nan_to_num(cosines, nan=-np.inf), axis=1, kind="stable")[:, :NEIGHBOURS].tolist()
    return [
        (name, [(names[j], cosines[i, j], data["subspace"][i][j]) for j in order[i] if not math.isnan(cosines[i, j])])
        for i, name in enumerate(names)
    ]


def _show_neighbours(data: Data, every: bool) -> None:
    """The nearest adapters of each; of a long pool the adapters that are nearest to another one come first."""
    neighbours = nearest(data)
    if not every and len(neighbours) > ROWS:
        neighbours = sorted(neighbours, key=lambda row: -row[1][0][1] if row[1] else math.inf)[:ROWS]
    print_paragraph(f"The nearest {NEIGHBOURS} of each of {len(data['names'])} adapters, by the cosine of ΔW:")
    table = Table("name:adapter", "name:nearest", "number:cosine", "number:subspace overlap")
    for name, others in neighbours:
        for n, (other, cosine, subspace) in enumerate(others or [("–", math.nan, math.nan)]):
            table.add("" if n else name, other, _number(cosine), _number(subspace))
    table.print()
    if len(neighbours) < len(data["names"]):
        print_paragraph(f"{len(data['names']) - len(neighbours)} more adapters: --all")


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
