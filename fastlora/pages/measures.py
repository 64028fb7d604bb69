"""What is measured of every adapter by itself: norms, ranks and spectra by module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastlora.adapters.pool import Pool
from fastlora.engine.spectrum import singular_forms
from fastlora.pages.places import Places
from fastlora.runtime.progress import track

Numbers = npt.NDArray[np.float64]

MOST_DIRECTIONS = 32
"""Points of a spectrum; of more directions the first are all there, then fewer and fewer."""


@dataclass(frozen=True, slots=True, eq=False)
class Measures:
    """Of ``k`` adapters in ``M`` modules of ``K`` kinds.

    ``norms [k, M]``: ``‖ΔW‖``, NaN where an adapter lacks a module. ``ranks``, ``numerical [k, M]``: of the factors,
    and above the noise floor; -1 where missing. ``effective [k, M]``: ``exp(−Σ p log p)`` with ``p = σ/Σσ`` (Roy and
    Vetterli, EUSIPCO 2007); 0 of a zero update. ``spectra [k, K, J]``: the share of ``‖ΔW‖²`` that the direction
    ``directions[j]``, counted from 0, has in the modules of a kind, on average; NaN without any. ``parameters [k]``:
    numbers in the factors.
    """

    norms: Numbers
    ranks: npt.NDArray[np.int64]
    numerical: npt.NDArray[np.int64]
    effective: Numbers
    spectra: Numbers
    directions: list[int]
    parameters: list[int]

    @property
    def totals(self) -> Numbers:
        """``‖ΔW_i‖`` over all modules: ``[k]``."""
        whole: Numbers = np.sqrt(np.nansum(np.square(self.norms), axis=1))
        return whole


def measure(pool: Pool, places: Places) -> Measures:
    """Everything above; one read of all factors."""
    k, modules = len(pool), {m: i for i, m in enumerate(pool.modules)}
    directions = chosen_directions(max((u.rank for a in pool.adapters for u in a.updates.values()), default=0))
    shape = k, len(modules)
    norms, effective = np.full(shape, np.nan), np.full(shape, np.nan)
    ranks, numerical = (np.full(shape, -1, dtype=np.int64) for _ in range(2))
    spectra = np.full((k, len(places.kinds), len(directions)), np.nan)
    parameters = []
    for i, adapter in enumerate(track(pool.adapters, "measuring")):
        shares: dict[int, list[Numbers]] = {}
        for module, form in singular_forms(adapter.name, adapter.updates).items():
            m, sigma = modules[module], form.sigma.numpy()
            norms[i, m], ranks[i, m], numerical[i, m] = form.norm, len(sigma), form.kept
            effective[i, m] = effective_rank(sigma)
            if form.norm > 0:
                shares.setdefault(places.kind[m], []).append(_at(np.square(sigma / form.norm), directions))
        for kind, rows in shares.items():
            spectra[i, kind] = np.mean(rows, axis=0)
        parameters.append(sum(u.rank * sum(u.shape) for u in adapter.updates.values()))
    return Measures(norms, ranks, numerical, effective, spectra, directions, parameters)


def effective_rank(sigma: Numbers) -> float:
    """``exp(−Σ p log p)`` with ``p = σ/Σσ``: ``r`` of ``r`` equal singular values, 1 of a single one; 0 of none."""
    some = sigma[sigma > 0]
    if not len(some):
        return 0.0
    p = some / some.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def chosen_directions(most: int) -> list[int]:
    """Which of ``most`` directions are shown: the first half of :data:`MOST_DIRECTIONS`, then in growing steps."""
    if most <= MOST_DIRECTIONS:
        return list(range(most))
    half = MOST_DIRECTIONS // 2
    rest = np.geomspace(half, most - 1, half).round().astype(int).tolist()
    return sorted({*range(half), *rest})


def _at(values: Numbers, directions: Sequence[int]) -> Numbers:
    """Some of the values; 0 behind the last one."""
    padded = np.zeros(max(directions, default=-1) + 1)
    padded[: len(values)] = values
    chosen: Numbers = padded[list(directions)]
    return chosen
