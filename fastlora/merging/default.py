"""What ``fastlora merge A B C`` does when nobody says how: the exact sum, as long as the adapters are on average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fastlora.adapters.pool import Pool
from fastlora.engine.inner_products import summed
from fastlora.errors import InputError

# A sum that is shorter than its terms by this factor has no direction that could be scaled.
CANCELLED = 1e-6
# Ratios of norms: up to the first a cut keeps all adapters alike; beyond the second the largest one decides the sum.
ALIKE, UNLIKE = 2.0, 3.0


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A method with its weights and parameters, and why: ``norms`` and ``cosine`` of the whole adapters, in the order
    of the pool. ``scale``: the weight of all, where no weights were given; the ``mean`` would have ``1/k``."""

    method: str
    weights: dict[str, float]
    parameters: dict[str, object] = field(default_factory=dict)
    scale: float | None = None
    norms: list[float] = field(default_factory=list)
    cosine: list[list[float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose(pool: Pool, weights: Mapping[str, float] | None, *, rank: int | None, energy: float | None) -> Choice:
    """How to merge adapters when no method was named.

    Weights that are given stay as they are: the exact sum with them, or its best approximation where a rank or an
    energy asks for a cut. Without weights every adapter gets ``c = mean‖ΔW_i‖ / ‖Σ ΔW_i‖`` (norms of all modules
    together; 1 for one adapter): between the mean, which is right when all tasks see the same inputs, and the sum,
    which is right when they see disjoint ones. Weights alone cannot tell which it is. With a rank, adapters of unlike
    norms share the subspace that keeps most of all of them alike; else the largest would take it.

    Raises :class:`InputError` where the adapters cancel each other.

    Cost: without weights, two passes over the factors, MATH (13).
    """
    cut = rank is not None or energy is not None
    if weights is not None:
        return Choice("svd" if cut else "cat", dict(weights))
    inner = summed(pool)
    norms = inner.diagonal().clamp(min=0).sqrt()
    scale = _scale(inner, norms)
    there = norms[norms > 0]
    ratio = float(there.max() / there.min()) if len(there) else 1.0
    notes = []
    if ratio > UNLIKE:
        notes.append(
            f"the longest adapter is {ratio:.1f} times as long as the shortest and decides most of the sum; "
            "--method equal_energy gives all one length"
        )
    together = rank is not None and ratio > ALIKE
    method = "ctm" if together else "svd" if cut else "cat"
    parameters: dict[str, object] = {"rule": "sum", "balance": 0.0} if together else {}
    cosine = (inner / norms / norms[:, None]).clamp(-1.0, 1.0)
    given = dict.fromkeys(pool.names, scale)
    return Choice(method, given, parameters, scale, norms.tolist(), cosine.tolist(), notes)


def _scale(inner: Tensor, norms: Tensor) -> float:
    """``c``; 1 where there is one adapter, or nothing."""
    count = int((norms > 0).sum())
    if count < 2:
        return 1.0
    total = float(inner.sum().clamp(min=0).sqrt())
    if total <= CANCELLED * float(norms.sum()):
        raise InputError(
            "merge: these adapters cancel each other, so that their sum has no length that could be matched; give "
            "weights (A:0.7 B:0.3) or a method"
        )
    return float(norms.sum()) / count / total
