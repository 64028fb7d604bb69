"""``fl.compress``: an adapter at a lower rank."""

from __future__ import annotations

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import require_updates


def compress(adapter: Adapter, rank: int | None = None, *, energy: float | None = None) -> Adapter:
    """The best approximation of every ``ΔW``, of at most ``rank`` or with at least the share ``energy`` of ``Σσ²``.

    Exact in factor space, MATH section 6; the retained energy of each module is in ``.details["retained_energy"]`` of
    the result, the total in ``.provenance``. Costs one read of the factors and ``O(r³)`` operations a module.
    """
    return require_updates(adapter, "compress").compress(rank, energy=energy)
