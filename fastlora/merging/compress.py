"""``fl.compress``: an adapter at a lower rank."""

from __future__ import annotations

import torch

from fastlora.adapters.lora import Adapter
from fastlora.adapters.placing import place
from fastlora.adapters.pool import require_updates
from fastlora.engine.checks import require_finite_extras
from fastlora.runtime import devices


def compress(
    adapter: Adapter,
    rank: int | None = None,
    *,
    energy: float | None = None,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
) -> Adapter:
    """Cuts every ``ΔW = U Σ Vᵀ`` of an adapter to its ``q`` largest singular values, ``U_q Σ_q V_qᵀ``.

    This is the best approximation of rank ``q`` in the Frobenius norm (Eckart–Young). It is computed exactly in factor
    space, MATH (3) and section 6: ``B' = B T`` is ``U_q`` and ``A' = D A`` is ``Σ_q V_qᵀ``, with small ``T`` and ``D``.

    Args:
        adapter: a LoRA adapter ``B [n, r]``, ``A [r, m]`` a module, stored or a sum.
        rank: the largest ``q`` that a module may have, at least 1.
        energy: instead of ``rank``: the smallest ``q`` that keeps this share of ``Σσ²``, in ``(0, 1]``.
        memory: bound on the peak resident memory while this computes, as bytes or ``"1GiB"``; factors that were loaded
            from files are given back to the system after use. The result has the same bits. With a ``device`` it
            bounds the memory taken there: modules are streamed through it when the adapter does not fit.
        device: where to compute: ``"cuda"``, ``"cuda:1"``, ``"cpu"``; by default where the adapter is.

    Returns:
        :class:`Adapter` with ``B' [n, q]`` and ``A' [q, m]``, in the dtype of ``adapter``. ``q`` may differ between
        modules, and is 0 for an update of zero. ``details["retained_energy"]`` has the share of ``Σσ²`` that each
        module keeps, ``provenance["retained_energy"]`` the share of all modules together.

    Raises:
        InputError: no cut, both cuts, or one out of range; a device that cannot be used or bounded.
        NonFiniteError: a factor that holds NaN or Inf, or a singular value whose square overflows, by module.
        UnsupportedAdapter: an (IA)³ adapter or a task vector, which have no factors.

    Cost: one read of the factors and ``O(r³)`` operations a module.
    """
    given = require_updates(adapter, "compress")
    require_finite_extras([given])
    placed = place([given], devices.parse(device) or given.device, memory)
    with placed.in_use():
        return given.to(placed.device).compress(rank, energy=energy)
