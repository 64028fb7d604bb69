"""Core Space: a rule on the elements of small cores in common bases, arXiv 2509.17786."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from fastlora import ops
from fastlora.merging.forms import cores
from fastlora.merging.forms.bases import squares_of
from fastlora.merging.forms.elementwise import Combine, Elementwise, Rule, idle
from fastlora.merging.forms.frames import Cut


@cores.method(
    summary="U rule(UᵀwᵢΔWᵢV) Vᵀ in bases U, V of all updates; the rule is elementwise",
    source="Core Space, arXiv 2509.17786",
    whole=True,
    idle=idle,
)
def core(
    stack: Tensor,
    sides: tuple[Tensor, Tensor],
    weights: Tensor,
    keys: tuple[Sequence[str], Sequence[str]],
    stacks: tuple[Tensor, Tensor],
    nulls: Cut,
    *,
    rule: Rule = "ties",
    density: float = 0.2,
    combine: Combine = "mean",
    seed: int = 0,
    gamma: float = 0.01,
    epsilon: float = 0.15,
    select_topk: float = 1.0,
    gauge: Literal["free", "raw"] = "free",
) -> Tensor:
    """``U · rule(M_1, M_2, …) · Vᵀ`` with ``M_i = Uᵀ w_i ΔW_i V [R, R]``.

    With ``gauge="free"`` the columns of ``U`` are the left singular vectors of ``[w_1ΔW_1 | w_2ΔW_2 | …]``, those of
    ``V`` the right ones of ``[w_1ΔW_1; w_2ΔW_2; …]``: they depend on the updates alone. The paper takes those of
    ``[B_1 | B_2 | …]`` and ``[A_1; A_2; …]`` (``raw``), which another factorisation of the same updates changes.
    ``rule="sum"`` gives the exact sum in either, and shows that a linear rule needs no container.

    ``density`` counts elements of the ``rank U × rank V`` that the updates have; null directions of duplicates and zero
    adapters do not count. Rules do not depend on the signs of basis vectors, but they do on the basis: where singular
    values are equal, the result is one of many. Cost: two eigendecompositions of ``R×R`` and ``O(k R³)`` a module.

    Args:
        rule: what is done with the elements, as the methods of these names do; della_linear elects no signs
        density: share of the elements of a core that every adapter keeps, in (0, 1]
        combine: what rules with elected signs take of the elements that agree, their mean or their sum
        seed: of the random masks of dare and della, which also depend on the names of adapters and modules
        gamma: of breadcrumbs, the share of the largest elements that are dropped, in [0, 1)
        epsilon: of della, half the span of the probabilities; density ± epsilon must lie in [0, 1]
        select_topk: of sce, the share of the places that vary which are kept, in (0, 1]
        gauge: bases of the updates themselves (free), or of the stored factors as in the paper (raw)
    """
    elementwise = Elementwise("core", rule, density, combine, seed, gamma, epsilon, select_topk)
    if gauge == "free":
        left, right = squares_of(stack)
    else:
        left, right = (x @ x.mT for x in stacks)
    bases, counts = [], []
    for gram in (left, right):
        values, vectors = ops.eigh(gram.contiguous())
        counts.append(nulls.above(values.flip(-1).clamp(min=0).sqrt()))
        bases.append(vectors.flip(-1))
    return elementwise.in_frames(sides, bases[0], bases[1], (counts[0], counts[1]), weights, keys)
