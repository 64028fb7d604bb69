"""What a decomposition by inputs kept and left, also at other weights of the others' inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora.core.updates import Update
from fastlora.decomposition.input_filter import Filter, Site, places_of, solved
from fastlora.engine.row_products import products_with_rows
from fastlora.merging.site_factors import over_rows

STEPS = (0.1, 1.0, 10.0)
"""Multiples of μ that a report compares."""


@dataclass(frozen=True, slots=True)
class InputRow:
    """One adapter in one module, or in all. Shares of squares, between 0 and about 1.

    ``norm_kept``: of ``‖ΔW‖²`` in the unique part. ``own_kept``: of what the adapter does to its own inputs, 1 less the
    part that the unique part misses. ``others_left``: of what it does to the inputs of others, the part that is left.
    ``at``: the same three for other multiples of μ.
    """

    adapter: str
    norm_kept: float
    own_kept: float
    others_left: float
    at: dict[str, tuple[float, float, float]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {name: getattr(self, name) for name in InputRow.__slots__}


@dataclass(frozen=True, slots=True)
class InputReport:
    """``total``: a row an adapter. ``rows``: the same by module."""

    settings: dict[str, Any]
    total: list[InputRow]
    rows: dict[str, list[InputRow]]
    notices: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "title": " + ".join(self.settings["adapters"]),
            "settings": self.settings,
            "notices": self.notices,
            "total": [row.as_dict() for row in self.total],
            "rows": {module: [row.as_dict() for row in rows] for module, rows in self.rows.items()},
        }


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one adapter in one module, squares: of ``‖ΔW‖``; of the outputs on its own inputs and on those of others;
    ``at``, for each of ``STEPS``: of ``‖X‖``, of what ``X`` changes on the own inputs, of what is left on others'."""

    whole: float
    own: float
    others: float
    at: tuple[tuple[float, float, float], ...]


def measured(
    site: Site, filters: Sequence[tuple[Update, Filter, Tensor, float]], mu: float, ridge: float
) -> list[Measured]:
    """Of all filters at one site, each with ``s²BᵀB`` and ``‖ΔW‖``.

    Cost: ``A Xᵀ`` with the rows of all adapters, and for every step the solution of :func:`solved` and its product with
    what was solved by.
    """
    if not filters:
        return []
    factors = [update.A for update, *_ in filters]
    products = products_with_rows([factors] * len(site.rows), site.rows)
    whole = [torch.cat(of_rows, 1) for of_rows in zip(*products, strict=True)]  # A Xᵀ of each, [r, N]
    places, scales = places_of(site.rows), over_rows(site.scales, site.rows)
    own = [(f.t, x[:, places[f.t]]) for (_, f, *_), x in zip(filters, whole, strict=True)]
    at: list[list[tuple[float, float, float]]] = [[] for _ in filters]
    for step in STEPS:
        for i, (found, _) in enumerate(solved(site, own, mu * step, ridge)):
            _, f, square, _ = filters[i]
            outputs, norm = _outputs(site, f.t, found, mu * step)
            missed = (outputs - whole[i])[:, places[f.t]] * site.scales[f.t]
            left = _without(outputs * scales, places[f.t])
            at[i].append((_inner(square, norm), _squared(square, missed), _squared(square, left)))
    return [
        Measured(
            norm**2,
            _squared(square, x[:, places[f.t]] * site.scales[f.t]),
            _squared(square, _without(x * scales, places[f.t])),
            tuple(steps),
        )
        for (_, f, square, norm), x, steps in zip(filters, whole, at, strict=True)
    ]


def _outputs(site: Site, t: int, found: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """``A'Xᵀ [r, N]`` and ``A'A'ᵀ [r, r]`` of what was solved."""
    if site.gram is None:
        return torch.cat([found @ x.double().mT for x in site.rows], 1), found @ found.mT
    on_rows = found * over_rows(site.weights(t, mu), site.rows)
    outputs = on_rows @ site.gram
    return outputs, outputs @ on_rows.mT


def _without(outputs: Tensor, mine: slice) -> Tensor:
    return torch.cat([outputs[:, : mine.start], outputs[:, mine.stop :]], 1)


def _squared(square: Tensor, outputs: Tensor) -> float:
    return _inner(square, outputs @ outputs.mT)


def _inner(square: Tensor, other: Tensor) -> float:
    """``tr(s²BᵀB · M)``, which rounding must not make negative."""
    return max(float((square * other).sum()), 0.0)


def input_report(
    settings: dict[str, Any], measured: Mapping[str, Mapping[str, Measured]], notices: Sequence[str]
) -> InputReport:
    """The report of what was measured, ``{module: {adapter: …}}``."""
    rows = {m: [_row(n, [told]) for n, told in of.items()] for m, of in measured.items()}
    each = {n: [of[n] for of in measured.values() if n in of] for n in settings["adapters"]}
    return InputReport(settings, [_row(n, told) for n, told in each.items()], rows, list(notices))


def _row(name: str, told: Sequence[Measured]) -> InputRow:
    whole, own, others = (sum(getattr(m, key) for m in told) for key in ("whole", "own", "others"))

    def shares(kept: float, missed: float, left: float) -> tuple[float, float, float]:
        return _share(kept, whole), 1.0 - _share(missed, own), _share(left, others)

    at = {f"{step:g}": shares(*(sum(m.at[i][j] for m in told) for j in range(3))) for i, step in enumerate(STEPS)}
    return InputRow(name, *at["1"], at)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
