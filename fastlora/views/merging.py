"""What a merge that nobody described did, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastlora.views.tables import Data, Table
from fastlora.views.text import print_paragraph, share_text

if TYPE_CHECKING:
    from fastlora.merging.default import Choice

MANY = 8
"""Adapters beyond which the matrix of cosines is left to ``fastlora overlap``."""


def kept_data(kept: Mapping[str, float]) -> Data:
    """What a cut keeps of every adapter, NaN as ``None``; ``None`` where nothing was cut."""
    shares = {name: None if math.isnan(share) else share for name, share in kept.items()}
    return {"retained_energy_by_adapter": shares or None}


def show_kept(data: Data) -> None:
    """Prints what is kept of every adapter, or of many the least."""
    kept = data["retained_energy_by_adapter"]
    if not kept:
        return
    shown, said = list(kept.items()), "kept of each: "
    if len(kept) > MANY:
        known = [(name, share) for name, share in kept.items() if share is not None]
        shown, said = sorted(known, key=lambda pair: pair[1])[:MANY], f"kept of each of {len(kept)}, the least: "
    print_paragraph(said + ", ".join(f"{name} {_share(share)}" for name, share in shown))


def choice_data(choice: Choice) -> Data:
    """A choice; of a sum with given weights these alone."""
    names = list(choice.weights)
    data: Data = {"method": choice.method, "weights": choice.weights}
    if choice.scale is not None:
        cosine = [[None if math.isnan(x) else x for x in row] for row in choice.cosine]
        scales = {"matched_norm": choice.scale, "mean": 1 / len(names), "sum": 1.0}
        data |= {"scales": scales, "names": names, "norms": choice.norms, "cosine": cosine}
    return data


def show_choice(data: Data, kept: Data) -> None:
    """Prints the scale beside those that it lies between, and the adapters with what is kept of each."""
    scales, shares = data.get("scales"), kept["retained_energy_by_adapter"]
    if scales is None or len(data["names"]) < 2:
        show_kept(kept)
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
    columns = ["number:norm", *(["number:kept"] if shares else []), *(f"named:{name}" for name in names if few)]
    table = Table("name:adapter", *columns, title="norms, and cosines of ΔW" if few else "norms")
    for i, name in enumerate(names):
        cells = [f"{data['norms'][i]:.4g}", *([_share(shares[name])] if shares else [])]
        table.add(name, *cells, *(_number(x) for x in data["cosine"][i] if few))
    table.print()
    if not few:
        print_paragraph("cosines: fastlora overlap")


def show_chosen(columns: Sequence[str], rows: Sequence[Sequence[str]], conclusion: Sequence[str]) -> None:
    """Prints the candidates of a choice by score, the winner with a star, and what was concluded."""
    table = Table(f"name:{columns[0]}", *(f"number:{column}" for column in columns[1:]), title="merges that were tried")
    for row in rows:
        table.add(*row)
    table.print()
    for line in conclusion:
        print_paragraph(line)


def _share(value: float | None) -> str:
    return "–" if value is None else share_text(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
