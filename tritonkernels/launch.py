"""A kernel with its arguments: what a plan is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton

INTERPRETED: bool = triton.knobs.runtime.interpret  # read when the kernels were decorated


@dataclass(frozen=True, slots=True)
class Launch:
    """Runs on the current stream; allocates nothing and waits for nothing once the kernel is compiled."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]
    warps: int
    stages: int

    def run(self) -> None:
        self.kernel[(self.programs,)](
            *self.arguments,
            **self.constants,
            num_warps=self.warps,
            num_stages=self.stages,
            # Products and sums are rounded where the source says so: fused steps are written as tl.fma.
            enable_fp_fusion=False,
        )
