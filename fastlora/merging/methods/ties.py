"""TIES, arXiv 2306.01708: trim, elect signs, average what agrees."""

from __future__ import annotations

from typing import Literal

from fastlora.merging.forms import tiles
from fastlora.merging.forms.tile_rules import Divisor, Largest, Rule, Votes, check_share


@tiles.rule(
    summary="elementwise: the largest of each ΔWᵢ, elected signs, mean of those that agree",
    source="TIES-Merging, arXiv 2306.01708; PEFT's ties_svd, mergekit's ties",
)
def ties(
    *,
    density: float = 0.2,
    convention: Literal["peft", "mergekit", "paper"] = "peft",
    elect: Literal["total", "frequency"] = "total",
    combine: Literal["mean", "sum"] = "mean",
    scope: Literal["module", "model"] | None = None,
) -> Rule:
    """Elements of ``ΔW``, each by itself.

    Trim: every adapter keeps its ``⌊density·n·m⌋`` largest magnitudes of a module, or (``scope="model"``) the
    ``⌊density·N⌋`` largest of its ``N`` elements in all modules, where modules with large elements keep more. Elect:
    the sign of the sum of what is kept. Merge: the mean, or the sum, of the elements that are not zero and have this
    sign; zero where there is none. The three conventions differ in details:

    * ``peft``: of equal magnitudes the first are kept; weights do not vote; plus where the sum is zero; the mean is
      ``Σ w_i v_i`` over the number of adapters that agree.
    * ``mergekit``: the same with votes ``w_i v_i``, and the mean is over the sum of the weights that agree.
    * ``paper``: the scope is the model; all that are equal to the last kept magnitude are kept, too; where the sum is
      zero, the sign that most places have (of all modules, or of the module by ``scope="module"``); otherwise as
      ``peft``. The code of the paper, and fusion_bench's, keep one element more.

    Modules that an adapter lacks are zeros of it, and count among its elements.

    Args:
        density: share of the elements that every adapter keeps, in (0, 1]
        convention: whose details: peft, mergekit or paper
        elect: what elects a sign, the sum of values (total) or of signs (frequency)
        combine: what is taken of the elements that agree, their mean or their sum
        scope: what is trimmed together, every module by itself or all of the model; by default module, and model for
            the paper
    """
    check_share("ties", "density", density)
    votes: Votes = "weighted" if convention == "mergekit" else "plain"
    mean: Divisor = "weights" if convention == "mergekit" else "count"
    together = scope or ("model" if convention == "paper" else "module")
    return Rule(
        trim=Largest(density, all_equals=convention == "paper", scope=together),
        elect=elect,
        votes=votes,
        divide=mean if combine == "mean" else "none",
        zero="majority" if convention == "paper" else "plus",
    )
