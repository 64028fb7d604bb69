"""What a page shows of the similarities of a pool: both matrices, the tree, families, duplicates, outliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastlora.analysis.similar import Cluster, Neighbour, Outlier, Overlap, Pair
from fastlora.pages.packing import packed, packed_shares, upper

LISTED = 200
"""Duplicates that a page lists at the most: all pairs of a pool may be some."""


class Resemblance(NamedTuple):
    """``families``: those with several members. ``family``: of every adapter, by its number in ``families``, or
    ``None``. ``nearest``: of every adapter the one with the largest cosine."""

    families: list[Cluster]
    family: dict[str, int | None]
    nearest: dict[str, Neighbour | None]
    duplicates: list[Pair]
    outliers: list[Outlier]


def resemblance(overlap: Overlap) -> Resemblance:
    """Everything that the similarities say."""
    families = [cluster for cluster in overlap.clusters() if len(cluster.names) > 1]
    family: dict[str, int | None] = dict.fromkeys(overlap.names)
    family |= {name: i for i, cluster in enumerate(families) for name in cluster.names}
    nearest = {name: next(iter(overlap.nearest(name, 1)), None) for name in overlap.names}
    return Resemblance(families, family, nearest, overlap.duplicates(), overlap.outliers())


def oddities(found: Resemblance) -> dict[str, list[str]]:
    """``{adapter: sentences}``: what is unusual about an adapter beside the others."""
    told: dict[str, list[str]] = {}
    for outlier in found.outliers:
        told.setdefault(outlier.name, []).append(outlier.reason)
    for pair in found.duplicates[:LISTED]:
        for name, other in ((pair.first, pair.second), (pair.second, pair.first)):
            told.setdefault(name, []).append(f"like {other!r}: cosine {pair.cosine:.6f}")
    return told


def matrices(overlap: Overlap) -> dict[str, Any]:
    """Both matrices without their diagonals, the order of the leaves and the joints of the tree."""
    data: dict[str, Any] = {
        "cosine": packed_shares(upper(overlap.cosine.numpy())),
        "subspace": packed_shares(upper(overlap.subspace.numpy())),
        "order": overlap.order(),
    }
    if len(overlap.names) > 1:
        data["joints"] = packed(overlap.joints()[:, :3], "f4")
    return data


def closest_pairs(overlap: Overlap, every_pair: int) -> list[tuple[str, str]]:
    """The pairs that are worth a decomposition: all of a pool of ``every_pair`` adapters or fewer; else every adapter
    with the one whose column spaces are most like its own."""
    names, k = overlap.names, len(overlap.names)
    if k <= every_pair:
        return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    alike = overlap.subspace.nan_to_num(nan=-1.0).clone()
    alike.fill_diagonal_(-2.0)
    best, at = alike.max(1)
    chosen = {(min(i, j), max(i, j)) for i, (j, x) in enumerate(zip(at.tolist(), best.tolist(), strict=True)) if x >= 0}
    return [(names[i], names[j]) for i, j in sorted(chosen)]


def as_rows(found: Resemblance, index: Mapping[str, int]) -> dict[str, Any]:
    """Families, duplicates and outliers by numbers of adapters."""
    return {
        "families": [
            {
                "members": [index[name] for name in cluster.names],
                "center": index[cluster.center],
                "within": cluster.within,
                "least": cluster.least,
            }
            for cluster in found.families
        ],
        "duplicates": [
            {"first": index[p.first], "second": index[p.second], "cosine": p.cosine, "ratio": p.ratio}
            for p in found.duplicates[:LISTED]
        ],
        "outliers": [
            {"adapter": index[o.name], "reason": o.reason, "norm": o.norm, "median": o.median} for o in found.outliers
        ],
    }
