"""The best approximation of an adapter at a rank or a share of its energy."""

from __future__ import annotations

from fastlora.adapters.lora import Adapter
from fastlora.engine.spectrum import check_cut, cut, singular_forms


def best_approximation(adapter: Adapter, *, rank: int | None = None, energy: float | None = None) -> Adapter:
    """Every ``ΔW`` replaced by its best approximation of at most ``rank``, or with at least the share ``energy`` of
    ``Σσ²``. The share that was kept is in ``details["retained_energy"]``, per module, and in total in ``provenance``.
    """
    check_cut(rank, energy)
    forms = singular_forms(adapter.name, adapter.updates, rank=rank, energy=energy)
    total = sum(f.norm**2 for f in forms.values())
    kept = sum(f.retained * f.norm**2 for f in forms.values())
    result = Adapter(
        adapter.name,
        {m: cut(u, forms[m]) for m, u in adapter.updates.items()},
        extras=adapter.extras,
        base=adapter.base,
        dtype=adapter.dtype,
        provenance={
            "compress": adapter.provenance,
            "rank": rank,
            "energy": energy,
            "retained_energy": kept / total if total > 0 else 1.0,
        },
        notes=adapter.notes,
    )
    result.details["retained_energy"] = {m: f.retained for m, f in forms.items()}
    return result
