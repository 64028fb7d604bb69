"""What a merge that nobody described did, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastlora.views.tables import Data, Table
from fastlora.views.text import print_paragraph, share_text

if TYPE_CHECKING:
    from fastlora.merging.default import Choice

MANY = 8
"""Adapters beyond which the matrix of cosines is left to ``fastlora overlap``."""


def choice_data(choice: Choice, kept: Mapping[str, float]) -> Data:
    """A choice and what is kept of every adapter, NaN as ``None``; nothing of a sum with given weights."""
    names = list(choice.weights)
    shares = {name: None if math.isnan(share) else share for name, share in kept.items()}
    data: Data = {"method": choice.method, "weights": choice.weights, "retained_energy_by_adapter": shares or None}
    if choice.scale is not None:
        cosine = [[None if math.isnan(x) else x for x in row] for row in choice.cosine]
        scales = {"matched_norm": choice.scale, "mean": 1 / len(names), "sum": 1.0}
        data |= {"scales": scales, "names": names, "norms": choice.norms, "cosine": cosine}
    return data


def show_choice(data: Data) -> None:
    """Prints the scale beside those that it lies between, and the adapters."""
    kept = data["retained_energy_by_adapter"]
    scales = data.get("scales")
    if scales is None or len(data["names"]) < 2:
        if kept:
            print_paragraph("kept of each: " + ", ".join(f"{n} {_share(x)}" for n, x in kept.items()))
        return
    print_paragraph(
        f"No weights were given: every adapter × {scales['matched_norm']:.3g}, at which the sum has their mean norm. "
        f"That is a guess between the mean (× {scales['mean']:.3g}) and the sum (× 1): only data or a score can tell. "
        "Weights that you give, A:0.5 B:0.5, are taken as they are."
    )
    if data["method"] == "ctm":
        print_paragraph(
            "Their norms differ by more than 2:1, so the cut keeps the directions that hold most of all adapters "
            "alike, and not those of the largest (--method svd)."
        )
    names, few = data["names"], len(data["names"]) <= MANY
    columns = ["number:norm", *(["number:kept"] if kept else []), *(f"named:{name}" for name in names if few)]
    table = Table("name:adapter", *columns, title="norms, and cosines of ΔW" if few else "norms")
    for i, name in enumerate(names):
        cells = [f"{data['norms'][i]:.4g}", *([_share(kept[name])] if kept else [])]
        table.add(name, *cells, *(_number(x) for x in data["cosine"][i] if few))
    table.print()
    if not few:
        print_paragraph("cosines: fastlora overlap")


def _share(value: float | None) -> str:
    return "–" if value is None else share_text(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
