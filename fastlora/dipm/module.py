"""One module of the adapters that take part in a modulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora.core.factors import Factor, add, device_of
from fastlora.core.updates import Update
from fastlora.engine.materialise import materialise_factor
from fastlora.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class ModulatedModule:
    """``updates``: of every adapter, ``None`` where it lacks the module. ``members``: those that have it, in the order
    of the Gram blocks ``left``, ``right`` ``[k, k, r, r]``."""

    name: str
    adapters: tuple[str, ...]
    updates: list[Update | None]
    members: tuple[int, ...]
    left: Tensor
    right: Tensor

    @property
    def own(self) -> Update:
        """The update of the modulated adapter, which must have the module."""
        assert self.updates[0] is not None
        return self.updates[0]

    @property
    def present(self) -> list[Update]:
        """The updates of the members, in their order."""
        return [u for u in self.updates if u is not None]

    @property
    def device(self) -> torch.device:
        """Where the factors are; those of an empty update are anywhere."""
        return device_of([[u.B, u.A] for u in self.present])

    @property
    def scalings(self) -> Tensor:
        """``s_k`` of the members: float64 ``[k]``."""
        return torch.tensor([u.scaling for u in self.present], dtype=torch.float64)

    def scaled(self, products: Tensor) -> Tensor:
        """``s_k s_l · products_kl``, for ``[k, k, …]``."""
        s = self.scalings
        return products * (s[:, None] * s).reshape(*products.shape[:2], *[1] * (products.ndim - 2))

    def require_equal_ranks(self, what: str) -> None:
        """Raises :class:`InputError` when the members differ in rank; ``what`` is the setting that needs it."""
        ranks = [u.rank for u in self.present]
        if len(set(ranks)) > 1:
            found = " and ".join(f"{self.adapters[i]!r} has rank {r}" for i, r in zip(self.members, ranks, strict=True))
            raise InputError(
                f"{self.name}: {what} works on the entries of the factors, which needs equal ranks, but {found}; use "
                "on='product', or bring them to one rank with fastlora.compress (`fastlora compress --rank`)"
            )

    def factor_sum(self, weights: Sequence[Tensor], on: str) -> Update:
        """The own update with ``Σ_k s_k B_k diag(w_k)`` for ``sB``, or ``Σ_k diag(w_k) A_k`` for ``A``; ``w_k`` of the
        rank's length, or of one entry for all."""
        terms: list[Factor] = []
        for w, update in zip(weights, self.updates, strict=True):
            if update is None or not bool(w.any()):
                continue
            factor = update.B.scaled(update.scaling) if on == "B" else update.A
            terms.append(factor.scaled(float(w)) if w.numel() == 1 else factor.times(torch.diag(w)))
        if on == "B":
            return replace(self.own, B=add(terms), scaling=1.0)
        return replace(self.own, A=add(terms))


def only_own(weights: Tensor, gram: Tensor) -> float | None:
    """The factor that all own vectors are multiplied by, if no other takes part; zero vectors do not count."""
    if bool(weights[1:].any()):
        return None
    own = weights[0][gram[0, 0] > 0]
    if own.numel() and bool((own == own[0]).all()):
        return float(own[0])
    return None


def dense(factor: Factor) -> Tensor:
    """A factor in float64: ``[length, rank]`` or ``[rank, length]``."""
    return materialise_factor(factor, torch.float64)


def storage(updates: Sequence[Update]) -> torch.dtype:
    """What computed factors are kept in: float64 for float64 inputs, else float32."""
    return torch.float64 if any(torch.float64 in u.dtypes() for u in updates) else torch.float32
