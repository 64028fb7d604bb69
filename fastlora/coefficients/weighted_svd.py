"""Many truncated sums ``Σ w_i ΔW_i`` of one pool: what does not depend on the weights is computed once."""

from __future__ import annotations

from collections.abc import Mapping

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.dtypes import widest
from fastlora.core.inert import NO_CHANGE
from fastlora.core.sums import combine_extras, common_base
from fastlora.core.updates import Update
from fastlora.engine.blocks import read_pair_blocks
from fastlora.engine.checks import LARGEST
from fastlora.engine.spectrum import check_cut
from fastlora.errors import InputError
from fastlora.merging.forms.frames import Frames
from fastlora.merging.forms.result import largest_rank, retained
from fastlora.runtime.progress import track


class WeightedSVD:
    """The best approximations of ``Σ w_i ΔW_i`` at a rank or an energy, for any number of weights.

    Two eigendecompositions of ``R×R`` matrices a module once (``R = Σr_i``) and ``24·R²`` bytes a module; every merge
    then takes one, and no pass over the factors. What the Gram cache in use has is not read at the start either.
    Results are those of ``fastlora.merge(method="svd")`` to rounding.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.frames = [Frames.of(blocks) for blocks in read_pair_blocks(pool, "preparing merges")]

    def merge(self, weights: Mapping[str, float], rank: int | None, energy: float | None) -> Adapter:
        """``weights``: of every adapter of the pool."""
        if rank is None and energy is None:
            rank = largest_rank(self.pool)
        check_cut(rank, energy)
        terms = [(weights[name], self.pool[name]) for name in self.pool.names]
        given = [w for w, _ in terms]
        updates: dict[str, Update] = {}
        squares: dict[str, tuple[float, float]] = {}
        for frames in track(self.frames, "merging"):
            scales = frames.scales(given)
            total = frames.total(scales)  # ΔW = Q_B total Q_Aᵀ
            if not bool((total.abs() <= LARGEST).all()):  # not so with NaN, either
                raise InputError(f"the weighted sum overflows: lower the weights {given}")
            cut, noises = frames.cut(given, rank, energy), frames.noises(given)
            cut_updates = frames.updates(total, frames.right_of_total(scales), cut, noises)
            for module, (update, kept, of_all) in cut_updates.items():
                updates[module], squares[module] = update, (kept, of_all)
        share, shares = retained(squares)
        whole = [total for _, total in squares.values()]
        return Adapter(
            "svd",
            {m: updates[m] for m in self.pool.modules},
            extras=combine_extras(terms),
            base=common_base(self.pool.adapters),
            dtype=widest(a.dtype for a in self.pool.adapters),
            provenance={
                "compress": {"sum": [{"weight": w, "of": a.provenance} for w, a in terms]},
                "rank": rank,
                "energy": energy,
                "retained_energy": share,
            },
            notes=tuple(
                dict.fromkeys([*(n for a in self.pool.adapters for n in a.notes), *([] if any(whole) else [NO_CHANGE])])
            ),
            details={"retained_energy": shares},
        )
