"""Gram blocks against their definition in float64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from builders import generator
from compiled import COMPILED, needs_same_bits
from factors import BACKENDS, DTYPES, SHAPES, columns, fill_padding, ragged_ranks, same_bits, special, strided, tall
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fastlora as fl
from fastlora.ops.dispatch import resolve
from fastlora.ops.passes import GramJob

BLOCKS = {
    "full": lambda i, j: True,
    "pairs": lambda i, j: i <= j,
    "chain": lambda i, j: i <= j and (j - i <= 1 or i == 0),
    "diagonal": lambda i, j: i == j,
}


def check(x: Tensor, ranks: Tensor | None, blocks: str, rows: bool) -> None:
    """Every element within the rounding of a float64 sum of ``n`` products, and zeros elsewhere."""
    got = fl.ops.gram(x, ranks, blocks=blocks, rows=rows)
    batch, k = x.shape[:2]
    n, r = (x.shape[3], x.shape[2]) if rows else (x.shape[2], x.shape[3])
    assert got.shape == (batch, k, k, r, r) and got.dtype == torch.float64
    for b in range(batch):
        for i in range(k):
            for j in range(k):
                ri, rj = (r, r) if ranks is None else (int(ranks[b, i]), int(ranks[b, j]))
                wanted, bound = torch.zeros(r, r, dtype=torch.float64), torch.zeros(r, r, dtype=torch.float64)
                if BLOCKS[blocks](i, j):
                    left, right = columns(x[b, i], ri, rows), columns(x[b, j], rj, rows)
                    wanted[:ri, :rj] = left.mT @ right
                    bound[:ri, :rj] = n * torch.finfo(torch.float64).eps * (left.abs().mT @ right.abs())
                assert ((got[b, i, j] - wanted).abs() <= bound).all(), (b, i, j)
    diagonal = got.diagonal(dim1=1, dim2=2).movedim(-1, 1)
    assert torch.equal(diagonal, diagonal.mT)
    if blocks == "full":
        assert torch.equal(got, got.transpose(1, 2).mT)


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_definition(backend: str, dtype: torch.dtype, rows: bool) -> None:
    with fl.use_backend(backend):
        for i, shape in enumerate(SHAPES):
            check(tall(*shape, dtype=dtype, rows=rows), None, list(BLOCKS)[i % 4], rows)


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_and_ragged_ranks(backend: str, blocks: str, rows: bool) -> None:
    with fl.use_backend(backend):
        for batch, k, n, r in SHAPES:
            x, ranks = tall(batch, k, n, r, dtype=torch.float32, rows=rows), ragged_ranks(batch, k, r)
            check(x, ranks, blocks, rows)
            clean, dirty = (fill_padding(x, ranks, value, rows) for value in (0.0, torch.nan))
            got = fl.ops.gram(dirty, ranks, blocks=blocks, rows=rows)
            assert torch.equal(got, fl.ops.gram(clean, ranks, blocks=blocks, rows=rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(backend: str, dtype: torch.dtype) -> None:
    with fl.use_backend(backend):
        for _, x in special(dtype):
            check(x, None, "full", False)
            check(x.mT.contiguous(), None, "full", True)


class Lopsided(TorchFunctionMode):
    """A library whose products have other last bits below the diagonal than above it, as some have on some processors:
    both sides are within the rounding of a float64 sum."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.einsum, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm):
            return result
        place = torch.arange(result.numel()).reshape(result.shape)
        return torch.where(place % 2 == 1, result * (1 + torch.finfo(torch.float64).eps), result)


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_the_reference_is_symmetric_whatever_the_library_sums(blocks: str, rows: bool) -> None:
    with fl.use_backend("reference"), Lopsided():
        x = tall(2, 3, 64, 8, dtype=torch.float64, rows=rows)
        factor = x[0, 0].mT if rows else x[0, 0]
        product = factor.mT @ factor
        assert not torch.equal(product, product.mT), "this library is symmetric, so nothing is shown"
        check(x, None, blocks, rows)
        job = GramJob([x[0, 0]], [(0, 0, 0)], rows, torch.zeros(64, dtype=torch.float64), 8)
        resolve("gram_pass", [job]).launch([job])
        assert torch.equal(job.block((0, 0, 0)), job.block((0, 0, 0)).mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(dtype: torch.dtype) -> None:
    x = torch.randint(-9, 10, (2, 3, 1000, 7), generator=generator(0))
    exact = torch.einsum("bina,bjnc->bijac", x, x).double()
    assert torch.equal(fl.ops.gram(x.to(dtype)), exact)
    assert torch.equal(fl.ops.gram(x.mT.to(dtype), rows=True), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_finite_half_is_read_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    every = every[: len(every) // 64 * 64].reshape(-1, 64)
    one = torch.zeros_like(every)
    one[:, 0] = 1
    got = fl.ops.gram(torch.stack([one, every], 1)[:, :, None], blocks="pairs")
    assert torch.equal(got[:, 0, 1, 0], every.double())


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_in_memory(dtype: torch.dtype, rows: bool) -> None:
    x = tall(2, 3, 67, 5, dtype=dtype, rows=rows)
    expected = fl.ops.gram(x, rows=rows)
    for name, same in strided(x):
        assert torch.equal(same, x)
        assert torch.equal(fl.ops.gram(same, rows=rows), expected), name


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_same_bits
def test_same_bits(dtype: torch.dtype, rows: bool) -> None:
    x, ranks = tall(5, 3, 300, 9, dtype=dtype, rows=rows), ragged_ranks(5, 3, 9)
    same_bits(lambda x: fl.ops.gram(x, rows=rows), x)
    same_bits(lambda x, ranks: fl.ops.gram(x, ranks, rows=rows), x, ranks)


@needs_same_bits
def test_a_block_does_not_depend_on_the_others() -> None:
    x = tall(2, 4, 300, 9, dtype=torch.float32, rows=False)
    full = fl.ops.gram(x)
    for blocks, wanted in BLOCKS.items():
        mask = torch.tensor([[wanted(i, j) for j in range(4)] for i in range(4)])
        assert torch.equal(fl.ops.gram(x, blocks=blocks), torch.where(mask[:, :, None, None], full, 0.0)), blocks
    assert torch.equal(fl.ops.gram(x[:, 1:3]), full[:, 1:3, 1:3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "expected"), [
    ((0, 2, 5, 3), (0, 2, 2, 3, 3)), ((2, 0, 5, 3), (2, 0, 0, 3, 3)), ((2, 2, 0, 3), (2, 2, 2, 3, 3)),
    ((2, 2, 5, 0), (2, 2, 2, 0, 0)), ((2, 5, 3), (2, 2, 3, 3)), ((2, 3, 2, 5, 3), (2, 3, 2, 2, 3, 3)),
])  # fmt: skip
def test_empty_and_other_batch_dimensions(backend: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    with fl.use_backend(backend):
        got = fl.ops.gram(torch.ones(shape))
    assert got.shape == expected and (got == shape[-2]).all()


LONG = [(1024, 16), (1063, 16), (1025, 5), (2087, 33)]
"""``(n, r)`` of half-precision factors that are long enough for tensor cores: around the sizes of their tiles."""


def check_long(x: Tensor, ranks: Tensor | None, blocks: str, rows: bool) -> Tensor:
    """Sums are float64; those of tensor cores exact but for what is 2⁻⁹ of a column, which they truncate to float32."""
    n, on_tensor_cores = x.shape[3 if rows else 2], x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    error = 2.0**-29 if on_tensor_cores else n * torch.finfo(torch.float64).eps
    got = fl.ops.gram(x, ranks, blocks=blocks, rows=rows)
    batch, k = x.shape[:2]
    r = x.shape[2 if rows else 3]
    for b in range(batch):
        for i in range(k):
            for j in range(k):
                if not BLOCKS[blocks](i, j):
                    assert not got[b, i, j].any()
                    continue
                ri, rj = (r, r) if ranks is None else (int(ranks[b, i]), int(ranks[b, j]))
                left, right = columns(x[b, i], ri, rows), columns(x[b, j], rj, rows)
                bound = error * left.norm(dim=0)[:, None] * right.norm(dim=0)
                assert ((got[b, i, j, :ri, :rj] - left.mT @ right).abs() <= bound).all(), (b, i, j)
                assert not got[b, i, j, ri:].any() and not got[b, i, j, :, rj:].any()
    diagonal = got.diagonal(dim1=1, dim2=2)
    assert torch.equal(diagonal, diagonal.transpose(1, 2))
    return got


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_long_halves(blocks: str, dtype: torch.dtype, rows: bool) -> None:
    for n, r in LONG:
        x = tall(2, 4, n, r, dtype=dtype, rows=rows, seed=n)
        whole = check_long(x, None, blocks, rows)
        ranks = ragged_ranks(2, 4, r)
        clean, dirty = (fill_padding(x, ranks, value, rows) for value in (0.0, torch.nan))
        assert torch.equal(check_long(clean, ranks, blocks, rows), fl.ops.gram(dirty, ranks, blocks=blocks, rows=rows))
        for name, same in strided(x):
            interpreted = os.environ.get("TRITON_INTERPRET") == "1"
            if not COMPILED or (name == "odd address" and interpreted):  # those are summed in float64
                check_long(same, None, blocks, rows)
                continue
            assert torch.equal(fl.ops.gram(same, blocks=blocks, rows=rows), whole), name
        if COMPILED:  # the bits of torch's products depend on the batch
            same_bits(lambda x, rows=rows: fl.ops.gram(x, blocks=blocks, rows=rows), x)


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@needs_same_bits
def test_a_block_of_long_halves_does_not_depend_on_the_others(rows: bool) -> None:
    x = tall(2, 4, 1100, 20, dtype=torch.bfloat16, rows=rows)
    full = fl.ops.gram(x, rows=rows)
    for blocks, wanted in BLOCKS.items():
        mask = torch.tensor([[wanted(i, j) for j in range(4)] for i in range(4)])
        assert torch.equal(fl.ops.gram(x, blocks=blocks, rows=rows), torch.where(mask[:, :, None, None], full, 0.0))
    assert torch.equal(fl.ops.gram(x[:, 1:3], rows=rows), full[:, 1:3, 1:3])


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
def test_many_long_halves(rows: bool) -> None:
    """More products of one factor than fit into any registers."""
    check_long(tall(1, 20, 1056, 5, dtype=torch.bfloat16, rows=rows), None, "full", rows)


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
def test_long_halves_beyond_float32(rows: bool) -> None:
    """Squares that float32 cannot hold are summed in float64; what is not finite stays in its own factor."""
    x = tall(1, 4, 1056, 6, dtype=torch.bfloat16, rows=rows)
    x[0, 1] *= 1e25
    x[0, 2] *= 1e-25
    check_long(x, None, "full", rows)
    x[0, 3, 2, 4] = torch.nan
    got = fl.ops.gram(x, rows=rows)
    assert got[0, :3, :3].isfinite().all()
    assert got[0, 3, 3].isnan().any()
