"""What the similarities of a pool say, as plain data and in print: families, duplicates, outliers, neighbours."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastlora.views.tables import ROWS, Data, Table
from fastlora.views.text import escaped, print_paragraph

if TYPE_CHECKING:
    from fastlora.analysis.similar import Overlap

MEMBERS = 6  # of a family that are printed unless all are asked for


def findings(result: Overlap, *, clusters: bool, into: int | None, like: str | None, nearest: int) -> Data:
    """Duplicates and outliers, the families if they are asked for, and the ``nearest`` adapters of one."""
    found: Data = {
        "duplicates": [pair._asdict() for pair in result.duplicates()],
        "outliers": [outlier._asdict() for outlier in result.outliers()],
    }
    if clusters or into is not None:
        found["clusters"] = [cluster._asdict() for cluster in result.clusters(into)]
    if like is not None:
        found["like"] = {"name": like, "nearest": [n._asdict() for n in result.nearest(like, nearest)]}
    return found


def show_findings(found: Data, every: bool) -> None:
    """Prints what :func:`findings` says, a table each; those that are empty are left out."""
    if "like" in found:
        _show_like(found["like"])
    if "clusters" in found:
        _show_clusters(found["clusters"], every)
    if found["duplicates"]:
        _show_duplicates(found["duplicates"], every)
    if found["outliers"]:
        _show_outliers(found["outliers"], every)


def _show_like(like: Data) -> None:
    table = Table(
        "name:nearest", "number:cosine", "number:subspace overlap", title=f"nearest to {escaped(like['name'])}"
    )
    for row in like["nearest"]:
        table.add(row["name"], _number(row["cosine"]), _number(row["subspace"]))
    table.print()


def _show_clusters(clusters: list[Data], every: bool) -> None:
    families = [c for c in clusters if len(c["names"]) > 1]
    alone = len(clusters) - len(families)
    print_paragraph(
        f"{len(families)} families by average linkage of 1 − cosine, and {alone} adapters that are in none. Cosines "
        "are those between the members of a family: their mean, and the smallest."
    )
    table = Table("number:members", "name:center", "number:mean", "number:least", "text:others")
    shown = families if every else families[:ROWS]
    for c in shown:
        others = [name for name in c["names"] if name != c["center"]]
        listed = others if every else others[:MEMBERS]
        more = f" … {len(others) - len(listed)} more" if len(listed) < len(others) else ""
        table.add(
            len(c["names"]), c["center"], _number(c["within"]), _number(c["least"]),
            " ".join(escaped(n) for n in listed) + more,
        )  # fmt: skip
    if families:
        table.print()
    _tell_more(len(families) - len(shown), "families")


def _show_duplicates(pairs: list[Data], every: bool) -> None:
    table = Table("name:adapter", "name:is alike", "number:cosine", "number:ratio of norms", title="duplicates")
    shown = pairs if every else pairs[:ROWS]
    for pair in shown:
        table.add(pair["first"], pair["second"], f"{pair['cosine']:.6f}", f"{pair['ratio']:.4g}")
    table.print()
    _tell_more(len(pairs) - len(shown), "pairs")


def _show_outliers(outliers: list[Data], every: bool) -> None:
    table = Table("name:adapter", "text:stands out", "number:norm", "number:median", title="outliers")
    shown = outliers if every else outliers[:ROWS]
    for row in shown:
        table.add(row["name"], escaped(row["reason"]), f"{row['norm']:.4g}", f"{row['median']:.4g}")
    table.print()
    _tell_more(len(outliers) - len(shown), "outliers")


def _tell_more(count: int, what: str) -> None:
    if count > 0:
        print_paragraph(f"{count} more {what}: --all")


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
