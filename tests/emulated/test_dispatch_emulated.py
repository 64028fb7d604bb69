"""The contracts of every op, on the CUDA backend."""

from __future__ import annotations

from typing import Any

import emulation
import pytest
import test_dispatch as contracts
import torch

import fastlora as fl
import fastlora.ops  # registers the operators
from fastlora.backends import cuda

# `coefficients` is a step of a plan and no operator.
OPS = sorted(set(cuda.KERNELS) - {"coefficients"})


@pytest.mark.parametrize("name", OPS)
def test_results_look_as_announced(emulator: Any, name: str) -> None:
    with emulation.emulated(emulator):
        contracts.test_results_look_as_announced(name, "cuda")


@pytest.mark.parametrize("name", [name for name in contracts.OPS if name.split()[0] in OPS])
def test_every_element_is_written(emulator: Any, name: str, poisoned_empty: None) -> None:
    with emulation.emulated(emulator):
        contracts.test_every_element_is_written(*contracts.OPS[name], "cuda", None)


@pytest.mark.parametrize("name", [name for name in contracts.OPS if name.split()[0] in OPS])
def test_compiled(emulator: Any, name: str) -> None:
    with emulation.emulated(emulator):
        contracts.test_compiled(*contracts.OPS[name])
        contracts.test_inputs_are_left_alone(*contracts.OPS[name])


@pytest.mark.parametrize(("call", "message"), [
    (lambda: fl.ops.eigh(torch.zeros(257, 257)), "eigh takes n up to 256, got n = 257"),
    (lambda: fl.ops.svd(torch.zeros(300, 257)), r"svd takes min\(p, q\) up to 256 .* got 300 x 257"),
    (lambda: fl.ops.svd(torch.zeros(2, 4097)), r"max\(p, q\) up to 4096, got 2 x 4097"),
    (lambda: fl.ops.eigh(torch.zeros(2, 2, device="meta")), "a tensor is on meta, this backend needs a CUDA device"),
])  # fmt: skip
def test_what_is_not_supported_is_named(emulator: Any, call: Any, message: str) -> None:
    with emulation.emulated(emulator), pytest.raises(RuntimeError, match=message):
        call()


def test_a_cpu_tensor_is_refused_and_auto_goes_on(emulator: Any) -> None:
    a = torch.eye(3)
    with cuda.use_module(emulator):
        with fl.use_backend("cuda"), pytest.raises(RuntimeError, match="a tensor is on cpu, this backend needs a CUDA"):
            fl.ops.eigh(a)
        with fl.use_backend("auto"):
            fl.ops.eigh(a)


def test_a_build_without_cuda_is_explained() -> None:
    with (
        cuda.use_module(None),
        fl.use_backend("cuda"),
        pytest.raises(RuntimeError, match="this build has no CUDA kernels"),
    ):
        fl.ops.eigh(torch.eye(3))


def test_a_failing_launch_is_one_clear_message(emulator: Any) -> None:
    """Shared memory for not even the vectors of a block."""
    with (
        emulation.emulated(emulator, 0, 1024 + 64),
        pytest.raises(RuntimeError, match=r"fastlora.eigh: CUDA error 719: .*shared"),
    ):
        fl.ops.eigh(torch.eye(40))
