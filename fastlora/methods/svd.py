"""Best low-rank approximation of a sum or of one adapter (resize), exact in factor space, MATH section 6."""

from __future__ import annotations

from collections.abc import Mapping

from fastlora.adapter import Adapter, Update
from fastlora.errors import InputError
from fastlora.methods import method
from fastlora.methods.arithmetic import combination
from fastlora.methods.spectrum import SingularForm, singular_forms
from fastlora.pool import Pool


def cut(update: Update, form: SingularForm) -> Update:
    """``B' = B T = U``, ``A' = D A = Σ Vᵀ`` (scaling kept apart)."""
    return Update(update.B.times(form.T), update.A.applied(form.D), update.scaling, update.layout, update.floor)


def check_cut(rank: int | None, energy: float | None) -> None:
    """Raises unless there is one cut, with a meaning."""
    if rank is None and energy is None:
        raise InputError("compress: give rank=N or energy=X (the share of Σσ² to keep, above 0 and at most 1)")
    if rank is not None and energy is not None:
        raise InputError("compress: give a rank or a share of the energy, not both")
    if rank is not None and rank < 1:
        raise InputError(f"compress: rank={rank} must be at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise InputError(f"compress: energy={energy} must be above 0 and at most 1")


def compress(adapter: Adapter, *, rank: int | None = None, energy: float | None = None) -> Adapter:
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


def default_rank(pool: Pool) -> int:
    """The largest rank of the pool."""
    return max((u.rank for a in pool.adapters for u in a.updates.values()), default=1)


@method(
    "svd",
    summary="best rank-r approximation of Σ wᵢΔWᵢ",
    parameters={"rank": "rank of the result", "energy": "share of Σσ² to keep, instead of a rank"},
    source="truncated SVD (Eckart–Young) in factor space; MATH section 6",
)
def svd(pool: Pool, weights: Mapping[str, float], *, rank: int | None = None, energy: float | None = None) -> Adapter:
    """The best approximation of ``Σ w_i ΔW_i``; without ``rank`` and ``energy``, at the largest rank of the pool."""
    total = combination([(weights[name], pool[name]) for name in pool.names], name="svd")
    if rank is None and energy is None:
        rank = default_rank(pool)
    return compress(total, rank=rank, energy=energy)
