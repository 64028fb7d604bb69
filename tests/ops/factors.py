"""Inputs of the ops by property, and the places in memory where they may lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from builders import gaussian
from compiled import ON_HOST
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# In Triton's interpreter, where a process can run nothing else, the same tests are of the Triton kernels.
BACKENDS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ON_HOST
if os.environ.get("FASTLORA_TEST_DEVICE"):
    BACKENDS = ["cpu", "reference"]  # "cpu" stands for what `auto` takes there (conftest.py)
elif os.environ.get("FASTLORA_ISA"):
    BACKENDS = ["cpu"]  # what a named instruction set changes

SHAPES = [(2, 1, 1, 1), (1, 1, 300, 1), (3, 2, 129, 5), (1, 3, 64, 8), (2, 4, 515, 17), (1, 2, 7, 33), (2, 5, 31, 3)]
"""``(batch, k, n, r)``: around the sizes of tiles and vectors, ``r > n``, one of everything."""


def tall(batch: int, k: int, n: int, r: int, *, dtype: torch.dtype, rows: bool, seed: int = 0) -> Tensor:
    """Random factors ``[batch, k, n, r]``, or ``[batch, k, r, n]`` with ``rows``."""
    x = gaussian(batch, k, n, r, seed=seed, dtype=dtype)
    return x.mT.contiguous() if rows else x


def special(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Named factors ``[2, 3, 50, 6]`` whose products are easy to get wrong."""
    x = gaussian(2, 3, 50, 6, seed=9)
    deficient = x.clone()
    deficient[..., 3:] = x[..., :3] * 2
    graded = x * 10.0 ** -torch.arange(6)
    cases = {"zero": x * 0, "one zero": x * torch.tensor([1.0, 0.0, 1.0])[:, None, None], "deficient": deficient}
    cases |= {"duplicate": x[:, :1].expand(2, 3, 50, 6), "graded": graded}
    if dtype != torch.float16:
        cases |= {"huge": x * 1e30, "tiny": x * 1e-30, "huge and tiny": x * torch.tensor([1e30, 1e-30] * 3)}
    for name, case in cases.items():
        yield name, case.to(dtype).contiguous()


def ragged_ranks(batch: int, k: int, r: int) -> Tensor:
    """Ranks from 0 to ``r``, different in every module."""
    return (torch.arange(batch * k).reshape(batch, k) * 2 + 1) % (r + 1)


def columns(x: Tensor, rank: int, rows: bool) -> Tensor:
    """The float64 factor ``[n, rank]`` without its padding."""
    return (x.mT if rows else x)[:, :rank].double()


def fill_padding(x: Tensor, ranks: Tensor, value: float, rows: bool) -> Tensor:
    x = x.clone()
    for i in torch.cartesian_prod(*(torch.arange(s) for s in ranks.shape)).tolist():
        (x.mT if rows else x)[tuple(i)][:, int(ranks[tuple(i)]) :] = value
    return x


def at_odd_address(x: Tensor) -> Tensor:
    """The same values at an address that is no multiple of anything, as tensors lie in files."""
    raw = bytearray(b"\0") + bytearray(x.contiguous().view(torch.uint8).numpy().tobytes())
    moved = torch.frombuffer(raw, dtype=x.dtype, offset=1, count=x.numel()).reshape(x.shape)
    assert moved.data_ptr() % 2 == 1
    return moved


def strided(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in other layouts."""
    yield "transposed", x.mT.contiguous().mT
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    wide[..., 1:-2:2] = x
    yield "every second", wide[..., 1:-2:2]
    yield "batch last", x.movedim(0, -1).contiguous().movedim(-1, 0)
    yield "odd address", at_odd_address(x)


def same_bits(call: Callable[..., Tensor], *batched: Tensor) -> None:
    """The result of a batched call does not depend on threads, repetition, order or size of the batch."""
    whole = call(*batched)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(call(*batched), whole), f"{threads} threads"
        finally:
            torch.set_num_threads(before)
    order = torch.arange(len(whole)).flip(0)
    assert torch.equal(call(*(x[order] for x in batched))[order], whole), "reversed"
    for i in range(len(whole)):
        assert torch.equal(call(*(x[i] for x in batched)), whole[i]), f"{i} alone"
