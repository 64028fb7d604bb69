"""The stand-in itself, where it stands in: work is late, and what a device would refuse or not see is not hidden."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def test_work_is_done_when_somebody_waits() -> None:
    x, host = torch.zeros(4, device="cuda"), torch.ones(4).pin_memory()
    x.copy_(host, non_blocking=True)
    host.fill_(7)
    assert x.tolist() == [7.0] * 4
    host.copy_(x + 1, non_blocking=True)
    assert host.tolist() == [7.0] * 4
    torch.cuda.synchronize()
    assert host.tolist() == [8.0] * 4


ORDER = """
import torch
side = torch.cuda.Stream()
x, y = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
torch.cuda.synchronize()
x += 1
with torch.cuda.stream(side):
    y += 1
print(torch.cuda.current_stream().query(), side.query())
"""


@pytest.mark.parametrize(
    ("at_once", "done"), [("none", "False False"), ("default", "True False"), ("others", "False True")]
)
def test_whose_work_is_done_at_once(at_once: str, done: str, tmp_path: Path) -> None:
    script = tmp_path / "order.py"
    script.write_text(ORDER, encoding="utf-8")
    command = [sys.executable, Path(__file__).with_name("run.py"), script]
    environment = {**os.environ, "REHEARSAL_AT_ONCE": at_once}
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.split() == done.split()


@pytest.mark.parametrize("waits", [False, True])
def test_a_missing_wait_between_streams_shows(waits: bool) -> None:
    side, x = torch.cuda.Stream(), torch.zeros(4, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        x += 1
    if waits:
        torch.cuda.current_stream().wait_stream(side)
    assert (x + 1).tolist() == [2.0 if waits else 1.0] * 4
    torch.cuda.synchronize()


def test_a_graph_does_nothing_until_it_is_replayed() -> None:
    x = torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2 + 1
    assert y.isnan().all()
    for value in (5.0, 6.0):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [2 * value + 1] * 3


@pytest.mark.parametrize("what", ["a look at a value", "a copy to the host", "a copy from pageable memory"])
def test_a_capture_refuses_to_wait(what: str) -> None:
    x, host = torch.ones(3, device="cuda"), torch.zeros(3)
    with pytest.raises(RuntimeError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        if what == "a look at a value":
            x.sum().item()
        elif what == "a copy to the host":
            host.copy_(x)
        else:
            x.copy_(host)


def test_numbers_where_an_op_has_tensors() -> None:
    x = torch.arange(70000, 70003, device="cuda")
    assert (x & 65535).tolist() == [4464, 4465, 4466] and (x > 70000).tolist() == [False, True, True]
    assert (x.float() * 2).dtype == torch.float32 and (x + 1).dtype == torch.int64


def test_memory_is_not_zero_and_devices_do_not_mix() -> None:
    assert torch.empty(2**20, device="cuda").isnan().any()
    with pytest.raises(RuntimeError, match="meets tensors on the device"):
        torch.ones(2, device="cuda") + torch.ones(2)


def test_a_launch_that_cuda_would_refuse() -> None:
    driver = ctypes.CDLL("libcuda.so.1")
    function = ctypes.c_void_p()
    assert driver.cuModuleGetFunction(ctypes.byref(function), None, b"kernel") == 0
    most_dynamic_shared = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    for size in (0, 227 * 1024, 227 * 1024 + 1):
        assert (driver.cuFuncSetAttribute(function, most_dynamic_shared, size) == 0) == (size <= 227 * 1024)


CODE = """
import torch
from fastlora.backends import cuda
print(cuda.unavailable())
torch.zeros(4, device="cuda").add_(1)  # looks for errors that were left
"""


@pytest.mark.parametrize("without", [False, True])
def test_a_device_that_the_build_is_not_for(without: bool, tmp_path: Path) -> None:
    script = tmp_path / "code.py"
    script.write_text(CODE, encoding="utf-8")
    environment = {**os.environ, **({"REHEARSAL_WITHOUT_CODE": "1"} if without else {})}
    command = [sys.executable, Path(__file__).with_name("run.py"), script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("cannot run on the device, sm_90 (CUDA error 209" in done.stdout) == without
    assert without or done.stdout == "None\n"


@pytest.mark.parametrize("dtype", [tl.float32, tl.float64], ids=str)
def test_a_fused_multiply_add_is_rounded_once(dtype: tl.dtype) -> None:
    """No neighbour is nearer: where the product cancels, decides between two numbers, or is too small to be held."""
    kind, draw = np.dtype(dtype.name.replace("fp", "float")), np.random.default_rng(1)
    digits, tiny = np.finfo(kind).nmant + 1, np.finfo(kind).tiny
    x, y = draw.standard_normal((64, 1)).astype(kind), draw.standard_normal(64).astype(kind)
    p, q = (kind.type([1 + 2.0**-n]) for n in (digits // 2, digits - digits // 2))
    for given in ((x, y, -x * y), (x * tiny, y, x * tiny), (p, q, p * 0 + tiny), (p, q, p * 0 - tiny)):
        found = InterpreterBuilder().create_fma(*(TensorHandle(o, dtype) for o in given)).data
        assert found.dtype == kind
        for *numbers, value in zip(*(o.flat for o in np.broadcast_arrays(*given, found)), strict=True):
            a, b, c = (Fraction(float(number)) for number in numbers)
            beside = (np.nextafter(value, kind.type(end)) for end in (-np.inf, np.inf))
            off, *others = (abs(Fraction(float(v)) - (a * b + c)) for v in (value, *beside))
            assert off <= min(others), numbers


def test_what_is_imported_between_two_kernels_stays() -> None:
    """Compilers of torch import parts of Triton's language when they are first needed."""
    import kernels

    language = kernels._Language()
    part, own = ModuleType("triton.language.extra.part"), tl.extra.__dict__
    own["part"], own["function"] = part, len
    try:
        language.restore()
        assert own["part"] is part and "function" not in own
    finally:
        own.pop("part")


class Dim3(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


@pytest.mark.parametrize("kernel", ["svd_block_kernelIfLb0", "svd_block_kernelIdLb0", "eigh_block_kernelIfLb0"])
def test_static_arrays_count_among_what_a_launch_may_have(kernel: str) -> None:
    import fastlora.backends.cuda  # registers the kernels

    assert fastlora.backends.cuda
    runtime = ctypes.CDLL("libcudart.so.13")
    runtime.rehearsal_kernel.restype = ctypes.c_void_p
    runtime.cudaLaunchKernel.argtypes = [
        ctypes.c_void_p, Dim3, Dim3, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p,
    ]  # fmt: skip
    own = ctypes.c_int()
    address = ctypes.c_void_p(runtime.rehearsal_kernel(kernel.encode(), ctypes.byref(own)))
    assert address and own.value in (128, 256)
    most_dynamic_shared = 8  # cudaFuncAttributeMaxDynamicSharedMemorySize
    arguments = ctypes.create_string_buffer(8)

    def taken(dynamic: int) -> bool:
        error: int = runtime.cudaLaunchKernel(address, Dim3(1, 1, 1), Dim3(32, 1, 1), arguments, dynamic, None)
        return error == 0

    def asked(dynamic: int) -> bool:
        error: int = runtime.cudaFuncSetAttribute(address, most_dynamic_shared, dynamic)
        return error == 0

    assert taken(48 * 1024 - own.value) and not taken(48 * 1024 - own.value + 1)
    assert not asked(227 * 1024 - own.value + 1) and asked(227 * 1024 - own.value)
    assert taken(227 * 1024 - own.value) and not taken(227 * 1024)
