"""KnOTS: a rule on the rows of all updates in their common left basis, arXiv 2410.19735."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.updates import sources
from fastlora.engine.blocks import read_pair_blocks
from fastlora.engine.schedule import split_to_fit
from fastlora.engine.spectrum import check_cut
from fastlora.merging.forms.cores import FRAMES, PART_BYTES
from fastlora.merging.forms.elementwise import Combine, Elementwise, Rule, idle, taking_part
from fastlora.merging.forms.frames import Frames
from fastlora.merging.forms.result import ByModule, merged_adapter, of_modules
from fastlora.merging.forms.rows import Rows
from fastlora.merging.registry import method
from fastlora.runtime.memory import release

BASES = 12  # matrices R×R of a module, with those of its frames


@method(
    "cores",
    summary="U rule(ΣV₁ᵀ, ΣV₂ᵀ, …) with [w₁ΔW₁ | w₂ΔW₂ | …] = UΣ[V₁ᵀ | V₂ᵀ | …]; the rule is elementwise",
    source="KnOTS, arXiv 2410.19735, with the scalings that its code leaves out",
    cost="Gram, rows",
    rank="≤ Σrᵢ, or cut",
    idle=idle,
)
def knots(
    pool: Pool,
    weights: Mapping[str, float],
    *,
    rank: int | None = None,
    energy: float | None = None,
    rule: Rule = "ties",
    density: float = 0.2,
    combine: Combine = "mean",
    seed: int = 0,
    gamma: float = 0.01,
    epsilon: float = 0.15,
    select_topk: float = 1.0,
) -> Adapter:
    """``U · rule(ΣV_1ᵀ, ΣV_2ᵀ, …)`` with the singular form ``[w_1ΔW_1 | w_2ΔW_2 | …] = U Σ [V_1ᵀ | V_2ᵀ | …]``.

    ``U [n, c]`` comes from ``c ≤ R = Σ r_i`` eigenvectors in factor space, ``ΣV_iᵀ = Uᵀ w_i ΔW_i [c, m]`` from the
    ``A_i``: no ``ΔW_i`` is formed. ``rule="sum"`` gives the exact sum. Rules do not depend on the signs of the columns
    of ``U``; where singular values are equal, the result is one of many. The ``A`` of the result is a new matrix, and
    stays in memory until it is saved. Random words are numbered as in rows of ``m``. Cost: the passes of the rule over
    ``k·c·m`` elements in float64 (:mod:`fastlora.ops.merge_tiles`), ``O(c²·m + R³)`` operations beside, and the
    memory of one ``[c, m]`` matrix in float64.

    Args:
        rank: rank to cut the result to; by default nothing is cut, and the rank is at most Σrᵢ
        energy: share of Σσ² that every module keeps, in (0, 1], instead of a rank
        rule: what is done with the elements, as the methods of these names do; della_linear elects no signs
        density: share of the elements of ΣVᵢᵀ that every adapter keeps, in (0, 1]
        combine: what rules with elected signs take of the elements that agree, their mean or their sum
        seed: of the random masks of dare and della, which also depend on the names of adapters and modules
        gamma: of breadcrumbs, the share of the largest elements that are dropped, in [0, 1)
        epsilon: of della, half the span of the probabilities; density ± epsilon must lie in [0, 1]
        select_topk: of sce, the share of the places that vary which are kept, in (0, 1]
    """
    rule_on_rows = Elementwise("knots", rule, density, combine, seed, gamma, epsilon, select_topk).tile_rule()
    if rank is not None or energy is not None:
        check_cut(rank, energy)
    given = [weights[n] for n in pool.names]
    chosen = taking_part(given)
    names, most = [pool.names[i] for i in chosen], PART_BYTES * torch.get_num_threads()

    def merged() -> ByModule:
        found: ByModule = {}
        for blocks in read_pair_blocks(pool, "cores of knots", matrices=FRAMES, most=most, shared=True):
            group = Frames.of(blocks)
            sizes = [8 * BASES * group.left.shape[1] ** 2] * len(blocks.modules)
            for part in split_to_fit(sizes, most):
                frames = group.part(part)
                rows, cut, noises = Rows.of(frames, given), frames.cut(given, rank, energy), frames.noises(given)
                for g, module in enumerate(frames.blocks.modules):
                    result = rows.merged(g, rule_on_rows, chosen, names)
                    found[module] = rows.update(g, result, cut.of(g), noises[g])
                    release(sources(frames.blocks.updates[g]))
        return found

    updates, squares = of_modules("merging by knots", merged, pool)
    used = {
        "rank": rank, "energy": energy, "rule": rule, "density": density, "combine": combine, "seed": seed,
        "gamma": gamma, "epsilon": epsilon, "select_topk": select_topk,
    }  # fmt: skip
    was_cut = rank is not None or energy is not None
    return merged_adapter("knots", pool, given, updates, used, squares=squares if was_cut else None)
