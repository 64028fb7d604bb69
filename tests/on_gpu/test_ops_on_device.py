"""The ops on a CUDA device: torch's contracts, graphs, streams, determinism, messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import gaussian
from tolerances import MODEL32, SUMS32
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastlora as fl

Call = Callable[[Tensor], Any]


def tall(seed: int = 0) -> Tensor:
    return gaussian(3, 2, 37, 5, seed=seed).cuda()


def square(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    x = tall(seed).double()
    return torch.einsum("bina,bjnc->bijac", x, x).contiguous().to(dtype)


def right() -> Tensor:
    return square(9).diagonal(dim1=1, dim2=2).movedim(-1, 1).contiguous()


RANKS = [[5, 2], [0, 3], [1, 5]]

# The call, and two inputs of one shape.
OPS: dict[str, tuple[Call, Callable[[int], Tensor]]] = {
    "gram": (lambda x: fl.ops.gram(x, torch.tensor(RANKS).to(x.device)), tall),
    "gram of rows": (lambda x: fl.ops.gram(x, blocks="chain", rows=True), tall),
    "combine": (lambda x: fl.ops.combine(x, gaussian(3, 2, 5, 4, seed=2).to(x.device)), tall),
    "eigh": (lambda x: fl.ops.eigh_ex(x), lambda seed: square(seed, torch.float32)[:, 0, 0].contiguous()),
    "eigh n=65": (lambda x: fl.ops.eigh_ex(x @ x.mT), lambda seed: gaussian(4, 65, 70, seed=seed).cuda()),
    "svd": (lambda x: fl.ops.svd_ex(x), tall),
    "chain": (lambda x: fl.ops.chain(x, right(), threshold=0.3), square),
    "chain mean": (lambda x: fl.ops.chain(x, right(), threshold=0.3, kind="mean"), square),
}
CAPTURED = ("eigh", "svd")  # ops that need no table: a graph of them replays with new data

every_op = pytest.mark.parametrize(("call", "make"), OPS.values(), ids=OPS)


def tensors(result: Any) -> list[Tensor]:
    return [t for t in tree_leaves(result) if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", ["gram", "combine", "eigh", "svd", "chain"])
def test_opcheck(name: str) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "gram": (tall(), None, "full", False),
        "combine": (tall(), gaussian(3, 2, 5, 4, seed=2).cuda(), None, False),
        "eigh": (square()[:, 0, 0].contiguous(),),
        "svd": (tall(),),
        "chain": (square(), right(), None, 0.5, "product", 1e-6, 0, 1.0),
    }
    assert fl.ops
    torch.library.opcheck(getattr(torch.ops.fastlora, name).default, arguments[name])


@every_op
def test_as_on_the_cpu(call: Call, make: Callable[[int], Tensor]) -> None:
    x = make(0)
    found, wanted = settled(call(x)), settled(call_on_cpu(call, x))
    for got, expected in zip(tensors(found), tensors(wanted), strict=True):
        assert got.device.type == "cuda" and (got.dtype, got.shape) == (expected.dtype, expected.shape)
        if got.is_floating_point() or got.is_complex():
            largest = float(expected.abs().max())  # what an eigenvalue is off by is small beside the largest one
            torch.testing.assert_close(
                got.cpu().abs(), expected.abs(), rtol=2 * MODEL32, atol=2 * SUMS32 * max(1.0, largest)
            )
        else:
            assert torch.equal(got.cpu(), expected)


def settled(result: Any) -> Any:
    """What rounding cannot turn: not the basis of a shared space, nor vectors of eigenvalues that are close."""
    if isinstance(result, fl.ops.Chain):
        return result[1:]
    if isinstance(result, tuple) and len(result) == 3:  # eigh_ex
        values, vectors, info = result
        return values, (vectors * values[..., None, :]) @ vectors.mT, info
    return result


def call_on_cpu(call: Call, x: Tensor) -> Any:
    original = right

    def on_cpu() -> Tensor:
        return original().cpu()

    globals()["right"] = on_cpu
    try:
        return call(x.cpu())
    finally:
        globals()["right"] = original


@every_op
def test_the_same_bits_every_time_and_on_any_stream(call: Call, make: Callable[[int], Tensor]) -> None:
    x = make(0)
    first = tensors(call(x))
    stream = torch.cuda.Stream()
    for _ in range(3):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = tensors(call(x))
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@every_op
def test_work_is_ordered_on_the_current_stream(call: Call, make: Callable[[int], Tensor]) -> None:
    """The input is written late on the stream that the op is called on: an op on another stream would read zeros."""
    x = make(0)
    wanted = tensors(call(x))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        found = tensors(call(late))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_in_a_graph(name: str) -> None:
    call, make = OPS[name]
    held = make(0).clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(held)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = tensors(call(held))
    for seed in (1, 2):
        held.copy_(make(seed))
        graph.replay()
        for got, expected in zip(result, tensors(call(make(seed))), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["eigh", "svd", "chain"])
def test_a_bad_matrix_spoils_no_other(name: str) -> None:
    call, make = OPS[name]
    x = make(0)
    wanted = tensors(call(x))
    bad = x.clone()
    bad[1] = torch.nan
    found = tensors(call(bad))
    assert found[-1].tolist() == [0, 1, 0] or name == "svd"
    for got, expected in zip(found, wanted, strict=True):
        assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2])


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"chain: tensors on different devices \(`left` on cuda:0, `right` on cpu\)"):
        fl.ops.chain(square(), right().cpu())
    with (
        fl.use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"eigh: no usable backend(.|\n)*cuda: .*300(.|\n)*auto.* takes torch here"),
    ):
        fl.ops.eigh(torch.eye(300, device="cuda"))
    assert torch.equal(fl.ops.eigh(torch.eye(300, device="cuda"))[0].cpu(), torch.ones(300))  # by plain torch
    with fl.use_backend("cpu"), pytest.raises(RuntimeError, match="cpu: a tensor is on cuda:0"):
        fl.ops.eigh(torch.eye(3, device="cuda"))
    with fl.use_backend("cuda"), pytest.raises(RuntimeError, match=r"cuda: .*on cpu"):
        fl.ops.eigh(torch.eye(3))
    with pytest.raises(TypeError, match=r"eigh: `a` must be float32/float64, got torch\.bfloat16"):
        fl.ops.eigh(torch.eye(3, device="cuda", dtype=torch.bfloat16))
