"""What every op keeps to: torch's contracts, messages, backends that are forced, memory that is written."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import gaussian
from compiled import COMPILED, ON_HOST, needs_kernels
from tolerances import FLOAT32, SUMS32
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastlora as fl
from fastlora.ops import dispatch
from fastlora.ops.dispatch import Kernel

Call = Callable[[Tensor], Any]


def square(dtype: torch.dtype = torch.float64) -> Tensor:
    x = gaussian(3, 2, 9, 4, seed=0, dtype=torch.float64)
    return torch.einsum("bina,bjnc->bijac", x, x).to(dtype)


RANKS = torch.tensor([[4, 2], [0, 3], [1, 4]])
TALL = gaussian(3, 2, 9, 4, seed=1)
SMALL = gaussian(3, 2, 4, 5, seed=2)
SMALL_ROWS = gaussian(3, 2, 5, 9, seed=4)
RIGHT = square().diagonal(dim1=1, dim2=2).movedim(-1, 1).contiguous()

OPS: dict[str, tuple[Call, Tensor]] = {
    "gram": (lambda x: fl.ops.gram(x, RANKS), TALL),
    "gram of rows": (lambda x: fl.ops.gram(x, blocks="chain", rows=True), TALL),
    "combine": (lambda x: fl.ops.combine(x, SMALL, RANKS), TALL),
    "combine rows": (lambda x: fl.ops.combine(x, SMALL_ROWS, rows=True), TALL),
    "eigh": (lambda x: fl.ops.eigh(x), square()[:, 0, 0]),
    "svd": (lambda x: fl.ops.svd(x), TALL),
    "chain": (lambda x: fl.ops.chain(x, RIGHT), square()),
    "chain mean": (lambda x: fl.ops.chain(x, RIGHT, kind="mean", floor=torch.zeros(3, 2).double()), square()),
}

NODES: dict[str, tuple[Any, ...]] = {
    "gram": (TALL, RANKS, "full", False),
    "combine": (TALL, SMALL, RANKS, False),
    "eigh": (square()[:, 0, 0],),
    "svd": (TALL,),
    "chain": (square(), RIGHT, None, 0.5, "product", 1e-6, 0, 1.0),
}


def every_op(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize(("call", "x"), OPS.values(), ids=OPS)(test)


def tensors(result: Any) -> list[Tensor]:
    return [t for t in tree_leaves(result) if isinstance(t, Tensor)]


assert fl.ops  # registers torch.ops.fastlora


@pytest.mark.parametrize("name", NODES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.fastlora, name).default, NODES[name])


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("backend", ON_HOST)
def test_results_look_as_announced(name: str, backend: str) -> None:
    """Shape, dtype and strides of the fake kernel, which compiled code relies on, on every backend."""
    node = getattr(torch.ops.fastlora, name).default
    announced = node(*(a.to("meta") if isinstance(a, Tensor) else a for a in NODES[name]))
    with fl.use_backend(backend):
        for got, fake in zip(tensors(node(*NODES[name])), tensors(announced), strict=True):
            assert (got.shape, got.dtype, got.stride()) == (fake.shape, fake.dtype, fake.stride())


@every_op
def test_compiled(call: Call, x: Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    for got, expected in zip(tensors(compiled), tensors(call(x)), strict=True):
        assert torch.equal(got, expected)


@every_op
def test_gradients_are_refused(call: Call, x: Tensor) -> None:
    tracked = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        call(tracked)
    with torch.no_grad():
        result = call(tracked)
    for got, expected in zip(tensors(result), tensors(call(x)), strict=True):
        assert torch.equal(got, expected)


@every_op
@pytest.mark.parametrize("backend", ON_HOST)
def test_every_element_is_written(call: Call, x: Tensor, backend: str, poisoned_empty: None) -> None:
    with fl.use_backend(backend):
        result = call(x)
    for got in tensors(result):
        assert got.isfinite().all() if got.is_floating_point() else (got != -(2**31)).all()


@every_op
def test_inputs_are_left_alone(call: Call, x: Tensor) -> None:
    before = x.clone()
    call(x)
    assert torch.equal(x, before)


@every_op
@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool], ids=str)
def test_other_dtypes_are_refused_by_name(call: Call, x: Tensor, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"must be .*got {dtype}"):
        call(x.to(dtype))


@every_op
def test_too_few_dimensions(call: Call, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \[.*got shape \(7,\)"):
        call(torch.zeros(7, dtype=x.dtype))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: fl.ops.gram(TALL, RANKS.int()), r"gram: `ranks` must be int64 \[3, 2\], got torch.int32"),
    (lambda: fl.ops.gram(TALL, RANKS[:2]), r"gram: `ranks` must be int64 \[3, 2\]"),
    (lambda: fl.ops.gram(TALL, blocks="some"), "blocks='some' does not exist: use one of full"),
    (lambda: fl.ops.combine(TALL, SMALL, RANKS[0]), r"combine: `ranks` must be int64 \[3, 2\]"),
    (lambda: fl.ops.combine(TALL, SMALL[:2]), r"combine: `coefficients` .* do not fit"),
    (lambda: fl.ops.combine(TALL, SMALL, rows=True), r"combine: `coefficients` .* do not fit"),
    (lambda: fl.ops.eigh(TALL), "must be square"),
])  # fmt: skip
def test_wrong_shapes(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("ranks", [[[5, 2], [0, 3], [1, 4]], [[4, 2], [0, -1], [1, 4]]], ids=["beyond", "negative"])
@pytest.mark.parametrize("backend", ON_HOST)
def test_ranks_outside_the_factors_read_nothing_else(ranks: list[list[int]], backend: str) -> None:
    clamped = torch.tensor(ranks).clamp(0, 4)
    with fl.use_backend(backend):
        assert torch.equal(fl.ops.gram(TALL, torch.tensor(ranks)), fl.ops.gram(TALL, clamped))
        assert torch.equal(fl.ops.combine(TALL, SMALL, torch.tensor(ranks)), fl.ops.combine(TALL, SMALL, clamped))


@every_op
def test_backends_agree(call: Call, x: Tensor) -> None:
    with fl.use_backend("reference"):
        expected = call(x)
    found = call(x)
    if isinstance(
        found, fl.ops.Chain
    ):  # any orthonormal basis of the shared space will do; test_chain.py compares spaces
        found, expected = found[1:], expected[1:]
    for got, wanted in zip(tensors(found), tensors(expected), strict=True):
        if got.shape[-1:] and got.dtype != torch.int64:
            torch.testing.assert_close(got.abs(), wanted.abs(), rtol=SUMS32, atol=FLOAT32)
        else:
            assert torch.equal(got, wanted)


@every_op
def test_a_forced_backend_never_falls_back(call: Call, x: Tensor) -> None:
    with fl.use_backend("cuda"), pytest.raises(RuntimeError, match=r"requested 'cuda'.*\n  cuda: ") as error:
        call(x)
    assert "cpu:" not in str(error.value)


@needs_kernels
def test_a_forced_backend_that_cannot_names_the_one_that_can() -> None:
    """Each backend of a GPU has half of the kernels."""
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    kernel = Kernel(lambda *_: None, dispatch.always)
    passes, small = {"gram": kernel, "combine": kernel}, {"chain": kernel, "eigh": kernel}
    with dispatch.use_kernels("triton", passes), dispatch.use_kernels("cuda", small):
        for forced, op, taker in (("cuda", "gram", "triton"), ("triton", "eigh", "cuda")):
            way = rf"use_backend\('auto'\) \(`--backend auto`\) takes {taker} here.* needs both triton and cuda"
            with fl.use_backend(forced), pytest.raises(RuntimeError, match=way) as error:
                dispatch.resolve(op, on_gpu)
            assert "on the CPU" not in str(error.value)
            with fl.use_backend("auto"):
                assert dispatch.resolve(op, on_gpu) is kernel
    with fl.use_backend("cuda"), pytest.raises(RuntimeError, match=r"`--backend auto`\) takes cpu here$"):
        fl.ops.eigh(torch.eye(3))


def test_a_missing_kernel_is_listed_and_not_replaced() -> None:
    with dispatch.use_kernels("cpu", {}):
        with fl.use_backend("cpu"), pytest.raises(RuntimeError, match="cpu: has no kernel for gram"):
            fl.ops.gram(TALL)
        with fl.use_backend("auto"):
            fl.ops.gram(TALL)


@needs_kernels
def test_kernels_can_be_given_for_a_block() -> None:
    """Nested, in every thread, and no longer than the block."""
    own = dispatch.kernels("cpu")
    given = {"eigh": Kernel(lambda *_: None, dispatch.always)}
    with dispatch.use_kernels("cpu", given):
        with dispatch.use_kernels("cpu", {}), ThreadPoolExecutor(1) as thread:
            assert thread.submit(dispatch.kernels, "cpu").result() == {}
        assert dispatch.resolve("eigh", torch.eye(3)) is given["eigh"]
    assert dispatch.kernels("cpu") is own
    with pytest.raises(fl.InputError, match="backend 'gpu' does not exist"), dispatch.use_kernels("gpu", {}):
        pass


def test_a_missing_core_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlora.backends import cpu

    monkeypatch.setattr(cpu, "unavailable", lambda: "no compiled module")
    with fl.use_backend("cpu"), pytest.raises(RuntimeError, match="cpu: no compiled module"):
        fl.ops.gram(TALL)


def test_auto_takes_torch_where_no_compiled_backend_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlora.backends import cpu
    from fastlora.backends import torch as plain

    monkeypatch.setattr(cpu, "unavailable", lambda: "no compiled module")
    for op in dispatch.RULES:
        assert dispatch.resolve(op, TALL) is plain.KERNELS[op]


def test_which_backend_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLORA_BACKEND", raising=False)
    assert dispatch.current_backend() == "auto"
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")
    assert dispatch.current_backend() == "reference"
    with fl.use_backend("cpu"):
        assert dispatch.current_backend() == "cpu"
        with fl.use_backend("auto"):
            assert dispatch.current_backend() == "auto"
        assert dispatch.current_backend() == "cpu"
    monkeypatch.setenv("FASTLORA_BACKEND", "gpu")
    with pytest.raises(fl.InputError, match="backend 'gpu' does not exist: use one of auto, cuda"):
        fl.ops.gram(TALL)
    with pytest.raises(fl.InputError, match="backend 'gpu' does not exist"), fl.use_backend("gpu"):
        pass


@needs_kernels
def test_another_device_is_refused() -> None:
    with fl.use_backend("cpu"), pytest.raises(RuntimeError, match="a tensor is on meta, this backend needs the CPU"):
        dispatch.resolve("gram", TALL.to("meta"))


def test_rules_name_backends_that_have_the_op() -> None:
    for op, by_device in dispatch.RULES.items():
        assert set(by_device) == {"cpu", "cuda"}
        for device, names in by_device.items():
            tables = [importlib.import_module(f"fastlora.backends.{name}").KERNELS for name in names]
            assert set(names) <= set(dispatch.ORDER)
            assert any(op in table for table in tables), f"nothing computes {op} on {device}"
            assert "reference" not in names or device == "cpu", "the slow formulas run on a GPU when they are forced"
            assert "torch" in names, "plain torch takes what no compiled backend does"
    every = {op for name in dispatch.ORDER for op in importlib.import_module(f"fastlora.backends.{name}").KERNELS}
    assert every == set(dispatch.RULES) | (every & set(dispatch.SHORTCUTS))
    assert set(dispatch.SHORTCUTS.values()) <= set(dispatch.RULES)


def test_a_shortcut_is_that_of_the_backend_that_takes_the_call() -> None:
    for backend in ("torch", "reference"):
        with fl.use_backend(backend):
            assert dispatch.shortcut("factor_pass", "cpu", []) is None
    assert dispatch.shortcut("factor_pass", "cuda", []) is dispatch.shortcut("factor_pass", "meta", []) is None
    assert dispatch.shortcut("factor_pass", "cpu", []) is (True if COMPILED else None)


def test_auto_goes_by_the_device() -> None:
    assert dispatch.candidates("eigh", "cuda")[0] == "cuda"
    assert dispatch.candidates("gram", "cuda")[0] == "triton"
    assert dispatch.candidates("eigh", "cpu")[0] == "cpu"
    assert dispatch.candidates("gram", "xpu") == dispatch.candidates("chain", "mps") == ("torch",)
    with pytest.raises(RuntimeError, match=r"there are no kernels for tensors on meta: move them with `.to\('cpu'\)`"):
        dispatch.resolve("gram", TALL.to("meta"))
    assert dispatch.device_of() == dispatch.device_of([]) == "cpu"


def test_tensors_on_different_devices() -> None:
    with pytest.raises(ValueError, match=r"chain: tensors on different devices \(`left` on cpu, `right` on meta\)"):
        fl.ops.chain(square(), RIGHT.to("meta"))
