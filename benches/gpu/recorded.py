"""``python -m benches.gpu.recorded``: the launches of Triton kernels that the windows need, without a device.

Forms and cases run on the CPU with the Triton backend in the place of the CPU's; what it would launch is written down
instead, as one JSON object a line: the kernel, and of each argument what the just-in-time compiler looks at.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastlora import DecompositionPlan
from fastlora.backends import triton
from fastlora.bench.gpu.forms import all_forms
from fastlora.bench.gpu.sweeps import variants
from fastlora.bench.gpu.targets import MAIN
from fastlora.bench.workloads import find, make_pool
from fastlora.ops import dispatch
from tritonkernels import launch

POINTERS = {
    torch.int8: "i8", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.float16: "fp16",
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.bool: "i1",
}  # fmt: skip
ALIGNED = 16  # bytes, and whole numbers, that the compiler has a case of its own for


def of_argument(x: object) -> Any:
    """An argument as JSON: ``[dtype, aligned]`` of a tensor, a whole number by its case."""
    if isinstance(x, Tensor):
        return [POINTERS[x.dtype], x.data_ptr() % ALIGNED == 0]
    if isinstance(x, int) and not isinstance(x, bool):
        wide = abs(x) >= 2**31
        return x if x == 1 else (ALIGNED if x % ALIGNED == 0 else 3) + (2**40 if wide else 0)
    return x


def of_constant(x: object) -> Any:
    """A constant as JSON; Triton's dtypes by name."""
    return {"dtype": str(x)} if type(x).__name__ == "dtype" else x


def described(own: launch.Launch) -> str:
    """A launch as one line."""
    return json.dumps(
        {
            "module": own.kernel.fn.__module__,
            "kernel": own.kernel.fn.__name__,
            "arguments": [of_argument(x) for x in own.arguments],
            "constants": {name: of_constant(x) for name, x in own.constants.items()},
            "warps": own.warps,
            "stages": own.stages,
        }
    )


@contextlib.contextmanager
def recording(found: dict[str, None]) -> Iterator[None]:
    """Inside the block, tensors on the CPU go to the Triton backend, which launches nothing."""
    table = dispatch.kernels("cpu")
    assert not isinstance(table, str), table
    with (
        mock.patch.object(launch.Launch, "run", lambda self: found.setdefault(described(self))),
        mock.patch.object(triton, "is_interpreted", lambda: True),
        mock.patch.object(torch, "empty", torch.zeros),  # what nobody fills is the same every time
        dispatch.use_kernels("cpu", {**table, **triton.KERNELS}),
    ):
        yield


def launches_of(dtype: torch.dtype, side: str) -> list[Any]:
    """Those of a decomposition of one layer of the model that is timed."""
    plan = DecompositionPlan(make_pool(replace(find(MAIN).head(7), dtype=dtype)), side=side)
    return [*plan.gram.launches, *plan.combine.launches]


def main() -> None:
    """Prints what the forms launch, decompositions of a model, and sweeps over their launches."""
    found: dict[str, None] = {}
    with recording(found):
        for form in all_forms().values():
            # Its answer is whatever was in memory before; what it launched until that is found wrong is written down.
            with contextlib.suppress(Exception):
                form.check("cpu")
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for side in ("left", "right"):
                for own in launches_of(dtype, side):
                    own.run()
        for own in launches_of(find(MAIN).dtype, "left"):
            found |= dict.fromkeys(map(described, variants(own)))  # what sweeps try
    print("\n".join(found))


if __name__ == "__main__":
    main()
