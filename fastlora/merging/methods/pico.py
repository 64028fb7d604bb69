"""Pico: output directions that many adapters share count less, arXiv 2604.16826."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fastlora import ops
from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.engine import shares
from fastlora.merging.forms import cores
from fastlora.merging.forms.bases import squared_norms, squares_of
from fastlora.merging.forms.result import rescaled
from fastlora.merging.registry import method


@method(
    "cores",
    summary="γ Σ U diag(α) Uᵀ wᵢΔWᵢ, αⱼ = 1/(1 + (k−1)cⱼ), cⱼ the energy share of output direction uⱼ",
    source="Pico, arXiv 2604.16826, with the updates in place of their factors",
    rank="Σrᵢ, or cut",
)
def pico(
    pool: Pool,
    weights: Mapping[str, float],
    *,
    rank: int | None = None,
    energy: float | None = None,
    gauge: Literal["free", "raw"] = "free",
    scale: Literal["matched", "none"] = "matched",
) -> Adapter:
    """``γ Σ_i U diag(α) Uᵀ X_i`` with ``X_i = w_i ΔW_i``, ``Σ_i X_iX_iᵀ = U diag(λ) Uᵀ``, ``c = λ/Σλ`` and
    ``α_j = 1/(1 + (k−1) c_j)``.

    ``k`` counts the updates of a module that are not zero. ``γ`` gives the result the mean norm of the ``X_i``, over
    all modules. The paper has ``Σ_i B_iB_iᵀ`` in place of ``Σ X_iX_iᵀ`` (``gauge="raw"``): it depends on how the
    updates are factored (another factorisation moved the correction by more than its size) and ignores scalings and
    weights. One adapter stays as it is. Cost: one eigendecomposition of ``R×R`` more than a cut.

    Args:
        rank: rank to cut the result to; by default nothing is cut, and the rank is at most Σrᵢ
        energy: share of Σσ² that every module keeps, in (0, 1], instead of a rank
        gauge: directions of the updates themselves (free), or of the stored B as in the paper (raw)
        scale: whether the result gets the mean norm of the updates, over all modules
    """
    seen: dict[str, Tensor] = {}  # ‖X_i‖² of every module, and the square of its result: [k + 1]

    def program(stack: Tensor, stacks: tuple[Tensor, Tensor], keys: tuple[Sequence[str], Sequence[str]]) -> Tensor:
        gram = squares_of(stack)[0] if gauge == "free" else stacks[0] @ stacks[0].mT
        values, vectors = ops.eigh(gram.contiguous())
        values = values.clamp(min=0)
        energies = values / values.sum(1, keepdim=True).clamp(min=1e-300)
        count = (squared_norms(stack) > 0).sum(1, keepdim=True).clamp(min=1)
        alpha = 1 / (1 + (count - 1) * energies)
        result = (vectors * alpha[:, None]) @ (vectors.mT @ stack.sum(1))
        squares = torch.cat([squared_norms(stack), squared_norms(result[:, None])], 1)
        seen.update(zip(keys[1], squares.unbind(), strict=True))
        return result

    program.__name__ = "pico"
    merged = cores.merge_whole(program, pool, weights, rank=rank, energy=energy)
    squares = shares.each("norms for pico", lambda: seen, ())
    *own, total = torch.stack([squares[m] for m in pool.modules]).sum(0).unbind()
    norms = torch.stack(own).sqrt()
    gamma = float(norms.sum() / (norms > 0).sum().clamp(min=1) / total.sqrt()) if float(total) > 0 else 1.0
    used = {"rank": rank, "energy": energy, "gauge": gauge, "scale": scale}
    return rescaled(merged, pool, weights, gamma if scale == "matched" else 1.0, used)
