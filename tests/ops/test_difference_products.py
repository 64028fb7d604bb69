"""Products of a difference of stored matrices: against the reference, over dtypes and layouts, bit for bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from builders import gaussian
from factors import BACKENDS, DTYPES
from tolerances import FLOAT32, FLOAT64
from torch import Tensor

from fastlora.ops.difference_products import DifferenceProducts, Precision, difference_products
from fastlora.ops.dispatch import use_backend

# n, m, width: around panels of 32 rows, blocks of 32 columns, chunks of 256 and 1024, tiles of 16 columns.
SHAPES = [(1, 1, 1), (33, 31, 7), (64, 512, 16), (257, 545, 40), (40, 1100, 33), (300, 70, 32)]
PAIRS = [*((d, d) for d in DTYPES), (torch.bfloat16, torch.float32), (None, torch.bfloat16), (None, torch.float32)]
# Of a sum of sizes: X has 16 bits where float32 is made of bfloat16; what is coarse has 8.
LIMITS: dict[Precision, tuple[float, float]] = {
    "float64": (FLOAT64, FLOAT64), "float32": (2**-16, FLOAT32), "coarse": (2**-7, 2**-7),
}  # fmt: skip


def matrices(n: int, m: int, old: torch.dtype | None, new: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """As slices of wider ones: rows with gaps, at any place."""
    fine_tuned = gaussian(n, m + 3, seed=n, dtype=torch.float64)
    base = (fine_tuned + 0.1 * gaussian(n, m + 3, seed=m, dtype=torch.float64))[:, 1 : m + 1]
    return None if old is None else base.to(old), fine_tuned.to(new)[:, 1 : m + 1]


def difference(old: Tensor | None, new: Tensor) -> Tensor:
    return new.double() if old is None else new.double() - old.double()


def furthest(found: Tensor | None, wanted: Tensor, sizes: Tensor) -> float:
    """The largest error of a sum, relative to the sum of the sizes of its terms."""
    assert found is not None and found.dtype == torch.float64
    return float(((found - wanted).abs() / sizes.clamp(min=1e-300)).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_definition(pair: tuple[torch.dtype | None, torch.dtype], precision: Precision, backend: str) -> None:
    for (n, m, width), with_right, with_left in itertools.product(SHAPES, (True, False), (True, False)):
        if not (with_right or with_left):
            continue
        old, new = matrices(n, m, *pair)
        D = difference(old, new)
        right = gaussian(m, width, seed=1).double() if with_right else None
        left = gaussian(n, width, seed=2).double() if with_left else None
        with use_backend(backend):
            found = difference_products(old, new, right, left, square=True, precision=precision)
            alone = difference_products(old, new, right, left, back=False, precision=precision)
        wanted, sizes = torch.zeros(n, width).double(), torch.zeros(n, width).double()
        if right is not None:
            wanted, sizes = D @ right, D.abs() @ right.abs()
        if left is not None:
            wanted, sizes = (wanted - left if right is not None else left), sizes + left.abs()
        near, exact = LIMITS[precision]
        images = left
        if right is not None:
            assert furthest(found.images, wanted, sizes) <= near
            assert furthest(alone.images, wanted, sizes) <= near
            images = found.images
        assert images is not None and (alone.preimages, alone.square) == (None, None)
        assert furthest(found.preimages, D.mT @ images, D.abs().mT @ images.abs()) <= exact
        assert found.square == pytest.approx(
            float(D.square().sum()), rel=FLOAT64 if precision == "float64" else FLOAT32
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e15, 1e30])
def test_special_sizes(size: float, backend: str) -> None:
    """Float64 takes all of float32's range; what float32 takes is one of ordinary sizes."""
    old, new = (size * gaussian(70, 90, seed=s) for s in (1, 2))
    D = difference(old, new)
    right = gaussian(90, 5, seed=3).double() / size
    for precision in ("float64", "float32") if 1e-15 < size < 1e16 else ("float64",):
        with use_backend(backend):
            found = difference_products(old, new, right, square=True, precision=precision)
        assert furthest(found.images, D @ right, D.abs() @ right.abs()) <= LIMITS[precision][0]
        assert found.images is not None
        sizes = D.abs().mT @ found.images.abs()
        assert furthest(found.preimages, D.mT @ found.images, sizes) <= LIMITS[precision][1]
        assert found.square == pytest.approx(float(D.square().sum()), rel=FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", LIMITS)
def test_special_values(precision: Precision, backend: str) -> None:
    old, new = (gaussian(40, 100, seed=s).bfloat16() for s in (1, 2))
    right = gaussian(100, 3, seed=3).double()
    with use_backend(backend):
        zero = difference_products(old, old, right, square=True, precision=precision)
        assert zero.images is not None and zero.preimages is not None
        assert not zero.images.any() and not zero.preimages.any() and zero.square == 0.0
        for value in (math.nan, math.inf, -math.inf):
            for row, column in ((0, 0), (39, 99), (33, 64)):
                bad = new.clone()
                bad[row, column] = value
                found = difference_products(old, bad, right, square=True, precision=precision)
                assert found.images is not None and found.preimages is not None and found.square is not None
                assert not bool(found.images[row].isfinite().any()) and not math.isfinite(found.square)
                assert not bool(found.preimages[column].isfinite().any())


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, precision: Precision) -> None:
    old, new = matrices(700, 300, dtype, dtype)
    right, left = gaussian(300, 20, seed=1).double(), gaussian(700, 20, seed=2).double()

    def run(threads: int) -> DifferenceProducts:
        with use_backend("auto"):
            return difference_products(old, new, right, left, square=True, precision=precision, threads=threads)

    one = run(1)
    for other in (run(2), run(3), run(16)):
        assert one.images is not None and other.images is not None and torch.equal(one.images, other.images)
        assert one.preimages is not None and other.preimages is not None
        assert torch.equal(one.preimages, other.preimages) and one.square == other.square


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout(backend: str) -> None:
    old, new = (x.contiguous() for x in matrices(50, 70, torch.bfloat16, torch.bfloat16) if x is not None)
    right = gaussian(70, 6, seed=1).double()
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.mT.contiguous().mT, lambda x: x.repeat(1, 2)[:, :70], lambda x: x[:, :1].expand(50, 70),
        lambda x: x[:1].expand(50, 70),
    ]  # fmt: skip
    with use_backend(backend):
        for change in layouts:
            found = difference_products(change(old), change(new), right.mT.contiguous().mT, square=True)
            wanted = difference_products(change(old).contiguous(), change(new).contiguous(), right, square=True)
            assert found.images is not None and wanted.images is not None and found.square == wanted.square
            assert torch.equal(found.images, wanted.images)


def test_what_is_empty_and_what_is_refused() -> None:
    old, new = gaussian(5, 7, seed=1), gaussian(5, 7, seed=2)
    right, left = gaussian(7, 3, seed=3).double(), gaussian(5, 3, seed=4).double()
    none = difference_products(old[:, :0], new[:, :0], right[:0], left, square=True)
    assert none.images is not None and torch.equal(none.images, -left) and none.square == 0.0
    assert none.preimages is not None and none.preimages.shape == (0, 3)
    square = difference_products(old, new, square=True)
    assert square.images is None and square.preimages is None
    assert square.square == pytest.approx(float((new - old).square().sum()), rel=FLOAT32)
    with pytest.raises(TypeError, match=r"new must be floating-point of 16 to 64 bits, got torch\.int32"):
        difference_products(old, new.int(), right)
    with pytest.raises(ValueError, match=r"must be matrices of one shape, got \[\[4, 7\], \[5, 7\]\]"):
        difference_products(old, new[:4], right)
    with pytest.raises(TypeError, match=r"right must be float64, got torch\.float32"):
        difference_products(old, new, right.float())
    with pytest.raises(ValueError, match=r"left must be \[5, width\], got \[4, 3\]"):
        difference_products(old, new, None, left[:4])
    with pytest.raises(ValueError, match="right and left must be as wide, got 3 and 2 columns"):
        difference_products(old, new, right, left[:, :2])
