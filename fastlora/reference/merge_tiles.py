"""Rules on the elements of ``ΔW`` by definition, on dense matrices in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastlora.reference.philox import words

WORDS = 2.0**32


def elements(pairs: Sequence[tuple[Tensor, Tensor] | None], scales: Sequence[float], shape: tuple[int, int]) -> Tensor:
    """``x_i = s_i B_i A_i``: float64 ``[k, n, m]``."""
    device = next((pair[0].device for pair in pairs if pair is not None), None)
    zero = torch.zeros(shape, dtype=torch.float64, device=device)
    return torch.stack([
        zero if pair is None else (scale * pair[0].double()) @ pair[1].double()
        for pair, scale in zip(pairs, scales, strict=True)
    ])  # fmt: skip


def numbers(shape: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """``e = row·m + column`` of every element."""
    n, m = shape
    return torch.arange(n * m, device=device).view(n, m)


def held(magnitudes: Tensor, magnitude: float, order: int) -> Tensor:
    """Which elements ``[n, m]`` a cut holds: those above it, and of its equals those before ``order``."""
    number = numbers((magnitudes.shape[0], magnitudes.shape[1]), magnitudes.device)
    return (magnitudes > magnitude) | ((magnitudes == magnitude) & (number < order))


def cut(magnitudes: Tensor, q: int) -> tuple[float, int]:
    """The magnitude and the order that hold the ``q`` largest of ``[n, m]``, of equals the first in order of rows."""
    if q == 0:
        return float("inf"), 0
    ordered = magnitudes.flatten().sort(descending=True, stable=True)
    return float(ordered.values[q - 1]), int(ordered.indices[q - 1]) + 1


def variance(x: Tensor) -> Tensor:
    """The population variance of ``x [k, n, m]`` over ``k``."""
    return (x - x.mean(0)).square().mean(0)


def random_mask(shape: tuple[int, int], keep: Tensor | int, key: int, module_key: int, first: int = 0) -> Tensor:
    """Where the word of an element of the rows from ``first`` on is below ``keep``, of 2³²; it may be one number an
    element."""
    drawn = words(numbers(shape).numpy() + first * shape[1], key, module_key).astype(np.int64)
    return torch.from_numpy(drawn) < (keep.cpu() if isinstance(keep, Tensor) else keep)


def row_mask(x: Tensor, least: float, span: float, key: int, module_key: int, first: int = 0) -> Tensor:
    """DELLA's mask of the rows ``x [n, m]`` of a module from ``first`` on: kept with probability ``least +
    span·rank/(m − 1)``, ranks within a row."""
    n, m = x.shape
    places = x.abs().sort(dim=1, stable=True).indices
    ranks = torch.empty_like(places).scatter_(1, places, torch.arange(m, device=x.device).expand(n, m).contiguous())
    share = least + span * ranks.double() / max(m - 1, 1)
    keep = (share * WORDS).floor().clamp(0, WORDS).long()
    return random_mask((n, m), keep, key, module_key, first).to(x.device)


def merged(
    v: Tensor,
    *,
    elect: str,
    votes: Sequence[float],
    gains: Sequence[float],
    shares: Sequence[float] | None,
    least: float,
    instead: float,
    scale: float,
    zero: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``M`` and ``S`` of trimmed ``v [k, n, m]``: ``M = scale · Σ gains_i v_i / D`` over those that agree with the
    sign of ``S``, ``D = Σ shares_i`` over them, or ``instead`` where ``|D| < least``.
    ``dtype``: of the sums."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=v.device)[:, None, None]

    vote = v * column(votes) if elect != "none" else v
    S = (vote.sign() if elect == "frequency" else vote).sum(0)
    elected = torch.where(S == 0, float(zero), S.sign())
    agree = vote.sign() == elected if elect != "none" else torch.ones_like(v, dtype=torch.bool)
    total = (v * column(gains) * agree).sum(0)
    if shares is not None:
        divisor = (column(shares) * agree).sum(0)
        total = total / torch.where(divisor.abs() < least, instead, divisor)
    return scale * total, S
