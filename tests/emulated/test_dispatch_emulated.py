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
        pytest.raises(
            RuntimeError, match=r"fastlora.eigh: CUDA error 719: .*shared.* something that was started earlier"
        ),
    ):
        fl.ops.eigh(torch.eye(40))
    assert emulator.last_error() == 0, "what asks for errors after a launch of its own would find this one"


def test_a_build_without_code_for_the_device_is_explained(emulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda._without_device.cache_clear()
    monkeypatch.setattr(emulator, "cuda_archs", "80-real 86-real")
    emulator.set_has_code(False)
    try:
        with cuda.use_module(emulator):
            reason = cuda.unavailable()
    finally:
        emulator.set_has_code(True)
        cuda._without_device.cache_clear()
    assert reason is not None and emulator.last_error() == 0
    assert "for 80-real 86-real, cannot run on the device, sm_90 (CUDA error 209: no kernel image" in reason
    assert "FASTLORA_CUDA_ARCHS=90-real" in reason
    with cuda.use_module(emulator):
        assert cuda.unavailable() is None
    cuda._without_device.cache_clear()


@pytest.mark.parametrize("shape", [(3, 0, 0), (0, 4, 4), (0, 40, 40)], ids=str)
def test_codes_of_matrices_without_elements(emulator: Any, shape: tuple[int, ...], poisoned_empty: None) -> None:
    with emulation.emulated(emulator):
        for op in (fl.ops.eigh_ex, fl.ops.svd_ex):
            assert op(torch.zeros(shape))[-1].tolist() == [0] * shape[0]
