"""SCE of FuseChat 3, arXiv 2408.07990: select by variance, weigh by energy, erase minority signs."""

from __future__ import annotations

from fastlora.merging.forms import tiles
from fastlora.merging.forms.tile_rules import Rule, Varied, check_share


@tiles.rule(
    summary="elementwise: mean weighted by energy, of the places that vary most, of those with the sign of the sum",
    source="SCE, arXiv 2408.07990; mergekit's sce",
)
def sce(*, select_topk: float = 1.0) -> Rule:
    """``Σ e_i v_i / Σ e_i`` over the adapters whose sign is that of ``Σ v_i``, place by place.

    Select: ``v_i`` is ``ΔW_i`` at the ``⌊select_topk·V⌋`` places with the largest variance over the adapters, of the
    ``V`` places that have one, and 0 elsewhere. Calculate: ``e_i ∝ w_i mean(v_i²)`` of the module, over their sum.
    Erase: an element whose sign is not that of the plain sum takes no part. mergekit knows no weights ``w_i``.

    Args:
        select_topk: share of the places that vary which are kept, in (0, 1]
    """
    check_share("sce", "select_topk", select_topk)
    return Rule(Varied(select_topk), elect="total", divide="weights", weigh="energy")
