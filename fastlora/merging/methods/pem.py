"""The sum of the factors, arXiv 2306.14870."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.engine.checks import require_finite
from fastlora.merging.arithmetic import add
from fastlora.merging.registry import method


@method(
    "factors",
    summary="elementwise on the factors, (ΣλᵢBᵢ)(ΣλᵢAᵢ), λᵢ = wᵢ/Σw",
    source="PEM, arXiv 2306.14870; MATH section 4",
    rank="rᵢ",
)
def pem(pool: Pool, weights: Mapping[str, float]) -> Adapter:
    """The paper's addition of LoRA adapters of equal modules, ranks and scalings, :func:`fastlora.add`."""
    require_finite(pool.adapters)  # no Gram pass here would find NaN
    return replace(add(pool.adapters, [weights[name] for name in pool.names], semantics="pem"), name="pem")
