"""All pairs of stacked updates: against the definition, and bit for bit against themselves."""

from __future__ import annotations

import pytest
import torch
from builders import gaussian
from compiled import needs_same_bits
from factors import BACKENDS
from tolerances import FLOAT32
from torch import Tensor

from fastlora.ops.dispatch import use_backend
from fastlora.ops.similarity import similarity

KERNELS = [backend for backend in BACKENDS if backend != "reference"]
SAME_BITS = [backend for backend in KERNELS if backend != "torch"]  # torch's products sum in an order of their own
RANKS = {
    "one": [5],
    "ragged": [3, 0, 8, 1, 16, 7, 7],
    "tiles": [8] * 60,
    "wide": [70, 4, 200, 33],
}
LENGTHS = {"one": (1, 1), "ragged": (65, 300), "tiles": (129, 40), "wide": (600, 257)}

Stacks = tuple[Tensor, Tensor, Tensor, Tensor]


def stacks(kind: str, seed: int = 0) -> Stacks:
    """Columns of length one on the left, of falling sizes on the right; one direction of each does not count."""
    ranks, (n, m) = RANKS[kind], LENGTHS[kind]
    left, right = (gaussian(x, sum(ranks), seed=seed + x, dtype=torch.float32) for x in (n, m))
    starts = torch.tensor([0, *ranks]).cumsum(0)
    kept = torch.tensor([max(0, r - 1) for r in ranks])
    return left / left.norm(dim=0), right / right.norm(dim=0), starts, kept


def bounds(s: Stacks) -> tuple[Tensor, Tensor]:
    """``‖U_iᵀU_j‖`` and ``‖R_iR_jᵀ‖`` at the most, by the numbers of unit columns: what errors are relative to."""
    widths = s[2].diff().double().clamp(min=1)
    return widths[:, None] * widths, widths[:, None] * widths


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", RANKS)
def test_definition(kind: str, backend: str) -> None:
    given = stacks(kind)
    with use_backend("reference"):
        wanted = similarity(*given)
    with use_backend(backend):
        found = similarity(*given)
    for x, y, bound in zip(found, wanted, bounds(given), strict=True):
        assert bool(((x - y).abs() <= FLOAT32 * bound).all()) and torch.equal(x, x.mT)
    for i in range(len(given[3])):
        u = given[0][:, given[2][i] : given[2][i + 1]].double()
        r = given[1][:, given[2][i] : given[2][i + 1]].double()
        assert float((u @ r.mT).square().sum() - wanted[0][i, i]) == pytest.approx(0, abs=1e-12 * float(bound.max()))


@pytest.mark.parametrize("backend", KERNELS)
def test_split(backend: str) -> None:
    given = stacks("ragged")
    with use_backend(backend):
        whole, parted = similarity(*given), similarity(*given, split=3)
    for x, y in zip(whole, parted, strict=True):
        assert torch.equal(x[:3, 3:], y[:3, 3:]) and torch.equal(y, y.mT)
        assert not y[:3, :3].any() and not y[3:, 3:].any()


@needs_same_bits
@pytest.mark.parametrize("backend", SAME_BITS)
def test_bits_do_not_depend_on_the_rest_or_the_threads(backend: str, threads: object) -> None:
    left, right, starts, kept = stacks("tiles")
    some = slice(8 * 30, 8 * 43)
    with use_backend(backend):
        whole = similarity(left, right, starts, kept)
        part = similarity(left[:, some].contiguous(), right[:, some].contiguous(), starts[:14], kept[:13])
        threads(1)  # type: ignore[operator]
        alone = similarity(left, right, starts, kept)
    for x, y, z in zip(whole, part, alone, strict=True):
        assert torch.equal(x[30:43, 30:43], y) and torch.equal(x, z)


def test_long_sums_are_blocked() -> None:
    """Two columns that are parallel and long: the sum of a float32 loop would be off by more."""
    n = 20000
    x = gaussian(n, 1, seed=3, dtype=torch.float32).abs()
    x /= x.double().norm().float()
    with use_backend("auto"):
        inner, _ = similarity(x, x, torch.tensor([0, 1]), torch.tensor([1]))
    assert float(inner) == pytest.approx(float((x.double().mT @ x.double()) ** 2), abs=FLOAT32)


@pytest.mark.parametrize("backend", KERNELS)
def test_all_digits_count(backend: str) -> None:
    """Columns of equal values: what is lost of one is lost of all, and no sign makes up for it. Few, for sums of many
    lose more in float32."""
    x = torch.full((8, 3), (1 + 2**-7 - 2**-23) / 3)
    x[:, 1:] *= torch.tensor([1 - 2**-9, 2**-30])
    wanted = (x.double().mT @ x.double()) ** 2
    with use_backend(backend):
        inner, shared = similarity(x, x, torch.arange(4), torch.ones(3, dtype=torch.int64))
    for found in (inner, shared):
        assert float(((found - wanted) / wanted).abs().max()) < FLOAT32


@pytest.mark.parametrize("backend", KERNELS)
def test_what_would_round_to_infinity(backend: str) -> None:
    """The largest numbers have more digits than half of them can hold, and are not rounded up."""
    left = torch.tensor([[torch.finfo(torch.float32).max, 1e-30]])
    with use_backend(backend):
        inner, _ = similarity(left, torch.ones(1, 2), torch.arange(3), torch.ones(2, dtype=torch.int64))
    assert float(inner[0, 1]) == pytest.approx(float(left[0, 0]) * 1e-30, rel=FLOAT32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(65, 42, dtype=torch.float64)}, "left must be float32"),
        ({1: torch.zeros(9, 41)}, "right must be"),
        ({2: torch.tensor([0, 1])}, "starts must ascend"),
        ({3: torch.tensor([3, 0, 9, 1, 1, 1, 1])}, "kept must be between"),
        ({3: torch.tensor([1.0] * 7)}, "kept must be int64"),
    ],
    ids=["dtype", "width", "starts", "kept", "kept dtype"],
)
def test_refusals(change: dict[int, Tensor], message: str) -> None:
    left, right, starts, kept = (change.get(i, x) for i, x in enumerate(stacks("ragged")))
    with pytest.raises((TypeError, ValueError), match=message):
        similarity(left, right, starts, kept)
    with pytest.raises(ValueError, match="split=7"):
        similarity(*stacks("ragged"), split=7)
