"""Products onto stored matrices, in memory and between files: against the formula, rounded once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from builders import gaussian
from compiled import needs_same_bits
from factors import BACKENDS, DTYPES
from torch import Tensor

from fastlora.ops.add_products import FilePlace, ProductTask, Segment, add_products
from fastlora.ops.dispatch import use_backend
from fastlora.reference.add_products import add_products as formula

SHAPES = [(1, 1), (7, 33), (130, 47), (9, 500), (300, 16)]
NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}


def pair(n: int, m: int, r: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    return gaussian(n, r, seed=seed, dtype=dtype), gaussian(r, m, seed=seed + 1, dtype=dtype) / max(1, r) ** 0.5


def segments(n: int, m: int, dtype: torch.dtype) -> list[Segment]:
    """Columns with nothing, one and three products, of ragged ranks."""
    cut, end = m // 3, m - m // 4
    three = [pair(n, end - cut, r, dtype, 10 * r) for r in (5, 0, 19)]
    one = [pair(n, m - end, 2, dtype, 7)]
    return [Segment(0, cut), Segment(cut, end - cut, three, [0.5, 3.0, -1.25]), Segment(end, m - end, one, [0.1])]


def wanted(W: Tensor, parts: list[Segment]) -> Tensor:
    return formula(W, [(s.left, s.width, s.pairs, s.scales) for s in parts])


def check(found: Tensor, exact: Tensor, sums: torch.dtype) -> None:
    """Half a unit of the last place, and the rounding of sums of a few dozen terms of ordinary size."""
    eps, least = torch.finfo(found.dtype).eps, torch.finfo(found.dtype).smallest_normal
    allowed = 0.5 * eps * exact.abs().clamp(min=least) * (1 + eps) + 40 * torch.finfo(sums).eps * (1 + exact.abs())
    assert bool(((found.double() - exact).abs() <= allowed).all())


CASES = [(stored, factor, (130, 47)) for stored in DTYPES for factor in DTYPES]
CASES += [(dtype, dtype, shape) for dtype in (torch.bfloat16, torch.float32) for shape in SHAPES if shape != (130, 47)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("stored", "factor", "shape"), CASES, ids=lambda x: NAMES.get(x, str(x)))
def test_definition(stored: torch.dtype, factor: torch.dtype, shape: tuple[int, int], backend: str) -> None:
    n, m = shape
    wide = stored.itemsize > 2 or factor == torch.float64
    sums = torch.float64 if wide else torch.float32
    W, parts = gaussian(n, m, seed=3, dtype=stored), segments(n, m, factor)
    out = W.clone()
    with use_backend(backend):
        assert add_products(ProductTask(shape, parts, stored, stored, sums), out, out) is None
    check(out, wanted(W, parts), sums)
    assert torch.equal(out[:, : parts[1].left], W[:, : parts[1].left])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("source", DTYPES, ids=NAMES.get)
def test_files_of_any_dtype(source: torch.dtype, target: torch.dtype, backend: str, tmp_path: Path) -> None:
    """Of several tiles, at odd places; as in memory, bit for bit; what is copied is only converted."""
    n, m = 331, 1001
    W, parts = gaussian(n, m, seed=3, dtype=source), segments(n, m, torch.bfloat16)
    W[0, 0] = -0.0
    sums = torch.float64 if source.itemsize > 2 else torch.float32
    task = ProductTask((n, m), parts, source, target, sums)
    (tmp_path / "from").write_bytes(b"abc" + W.view(torch.uint8).numpy().tobytes() + b"end")
    (tmp_path / "to").write_bytes(b"before")
    one, other = os.open(tmp_path / "from", os.O_RDONLY), os.open(tmp_path / "to", os.O_RDWR)
    try:
        with use_backend(backend):
            assert add_products(task, FilePlace(one, 3), FilePlace(other, 5)) is None
            out = torch.empty(n, m, dtype=target)
            assert add_products(task, W, out) is None
    finally:
        os.close(one)
        os.close(other)
    content = (tmp_path / "to").read_bytes()
    assert content[:5] == b"befor" and len(content) == 5 + n * m * target.itemsize
    found = torch.frombuffer(bytearray(content[5:]), dtype=target).view(n, m)
    assert torch.equal(found.view(torch.uint8), out.view(torch.uint8))
    check(found, wanted(W, parts), sums)
    copied = W[:, : parts[1].left]
    if target.itemsize < 4:  # of float64 torch itself rounds to float16 twice on x86, once on aarch64
        copied = copied.float()
    copied = copied.to(target).contiguous()
    assert torch.equal(found[:, : parts[1].left].contiguous().view(torch.uint8), copied.view(torch.uint8))


@needs_same_bits
def test_bits_depend_on_nothing_but_the_task() -> None:
    """On none of: threads, rows beside it, columns beside it."""
    n, m = 700, 600
    W, (L, R) = gaussian(n, m, seed=3, dtype=torch.bfloat16), pair(n, m, 40, torch.bfloat16, 5)
    found = []
    with use_backend("auto"):
        for threads in (1, 2, 5):
            out = torch.empty_like(W)
            task = ProductTask((n, m), [Segment(0, m, [(L, R)], [0.3])], W.dtype, W.dtype, threads=threads)
            assert add_products(task, W, out) is None
            found.append(out)
        part = W[13:40, 50:].clone()
        task = ProductTask((27, m - 50), [Segment(0, m - 50, [(L[13:40], R[:, 50:])], [0.3])], W.dtype, W.dtype)
        assert add_products(task, part, part) is None
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0][13:40, 50:], part)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_beyond_the_cache(backend: str) -> None:
    n, m = 24, 700
    W, (L, R) = gaussian(n, m, seed=3), pair(n, m, 900, torch.float32, 5)
    out = torch.empty_like(W)
    with use_backend(backend):
        task = ProductTask((n, m), [Segment(0, m, [(L, R)], [2.0])], W.dtype, W.dtype, torch.float64)
        assert add_products(task, W, out) is None
    check(out, wanted(W, list(task.segments)), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stops_it(backend: str, tmp_path: Path) -> None:
    n, m = 40, 30
    W, (L, R) = gaussian(n, m, seed=3, dtype=torch.float16), pair(n, m, 2, torch.float32, 5)
    task = ProductTask((n, m), [Segment(0, m, [(L, R)], [1e6])], W.dtype, W.dtype)
    (tmp_path / "from").write_bytes(W.view(torch.uint8).numpy().tobytes())
    (tmp_path / "to").write_bytes(b"")
    one, other = os.open(tmp_path / "from", os.O_RDONLY), os.open(tmp_path / "to", os.O_RDWR)
    try:
        with use_backend(backend):
            out = torch.empty_like(W)
            problem = add_products(task, W, out)
            assert problem is not None and problem.what == "not finite"
            problem = add_products(task, FilePlace(one, 0), FilePlace(other, 0))
            assert problem is not None and problem.what == "not finite" and not (tmp_path / "to").stat().st_size
            small = ProductTask((n, m), [Segment(0, m, [(L, R)], [1.0])], W.dtype, W.dtype)
            problem = add_products(small, FilePlace(one, 4), FilePlace(other, 0))
            assert problem is not None and problem.what == "short"
            problem = add_products(small, FilePlace(other, 0), FilePlace(one, 0))
            assert problem is not None and problem.what == "short"
            (tmp_path / "to").write_bytes((tmp_path / "from").read_bytes())
            problem = add_products(small, FilePlace(other, 0), FilePlace(one, 0))  # opened to be read
            assert problem is not None and problem.what == "write" and problem.errno
            problem = add_products(small, FilePlace(-7, 0), FilePlace(other, 0)) if backend != "cpu" else problem
            assert problem is not None and problem.errno
    finally:
        os.close(one)
        os.close(other)


def test_no_rows_and_no_columns() -> None:
    for shape in ((0, 4), (4, 0)):
        W = torch.zeros(shape)
        task = ProductTask(shape, [Segment(0, shape[1])], W.dtype, W.dtype)
        for backend in BACKENDS:
            with use_backend(backend):
                assert add_products(task, W, W) is None


def test_refusals() -> None:
    L, R = pair(4, 6, 2, torch.float32, 0)
    f32 = torch.float32
    with pytest.raises(ValueError, match="all columns"):
        ProductTask((4, 6), [Segment(1, 5)], f32, f32)
    with pytest.raises(ValueError, match="5 columns for 6"):
        ProductTask((4, 6), [Segment(0, 5)], f32, f32)
    with pytest.raises(ValueError, match=r"\[4, 2\] and \[2, 6\] for \[5, 6\]"):
        ProductTask((5, 6), [Segment(0, 6, [(L, R)], [1.0])], f32, f32)
    with pytest.raises(ValueError, match="no product"):
        ProductTask((4, 6), [Segment(0, 6, [(L, R[:1])], [1.0])], f32, f32)
    with pytest.raises(TypeError, match="float64"):
        ProductTask((4, 6), [Segment(0, 6, [(L.double(), R)], [1.0])], f32, f32)
    with pytest.raises(TypeError, match="int8"):
        ProductTask((4, 6), [Segment(0, 6)], torch.int8, f32)
    task = ProductTask((4, 6), [Segment(0, 6, [(L, R)], [1.0])], f32, f32)
    with pytest.raises(ValueError, match="source is"):
        add_products(task, torch.zeros(4, 5), torch.zeros(4, 6))
    with pytest.raises(ValueError, match="contiguous"):
        add_products(task, torch.zeros(6, 4).mT, torch.zeros(4, 6))
    with pytest.raises(ValueError, match="both"):
        add_products(task, torch.zeros(4, 6), FilePlace(1, 0))
