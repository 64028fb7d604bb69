"""Parameters that a live adapter has by ``target_parameters``: the experts of a mixture, one by one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastlora.core.factors import Factor
from fastlora.core.updates import Layout, Update


def expert_updates(path: str, wrapper: Any, B: Tensor, A: Tensor, scaling: float) -> dict[str, Update]:
    """``{path[e]: update}`` with ``ΔW_e = s B_e A_e [out, in]``, named as :func:`fastlora.load` names them.

    peft has ``A [experts·r, in]``, expert by expert, and ``B [out, r·experts]``, whose fastest index is the expert.
    Those of ``B`` are copied: kernels need rows that lie together.
    """
    experts = wrapper.num_experts
    rank = A.shape[0] // experts
    left = B.reshape(B.shape[0], rank, experts).permute(2, 0, 1).contiguous()
    right = A.reshape(experts, rank, A.shape[1])
    return {
        f"{path}[{e}]": Update(
            Factor.of("B", left[e]),
            Factor.of("A", right[e]),
            scaling,
            Layout("expert", container=path, expert=e, experts=experts),
        )
        for e in range(experts)
    }
