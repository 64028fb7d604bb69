"""Gram blocks on a device that has float32 alone: sums of exact products, as good as float64 for what is stored."""

from __future__ import annotations

import pytest
import torch
from builders import gaussian

import fastlora as fl
from fastlora.backends import torch_products
from fastlora.backends.torch_products import CHUNK, sliced

LEFT_OUT = 2.0**-52  # of n·max|x|·max|y|: what is beyond seven slices of eight bits, and rounding in float64


@pytest.mark.parametrize("size", [1.0, 1e12, 1e-12])
@pytest.mark.parametrize("n", [1, CHUNK - 1, 3 * CHUNK + 5])
def test_products_of_slices(n: int, size: float) -> None:
    x, y = size * gaussian(2, 5, n, seed=1), gaussian(2, 3, n, seed=2)
    y[:, 1] = 0
    for a, b in ((x, y), (x, x), (x, x.to(torch.bfloat16).float())):
        exact = a.double() @ b.double().mT
        bound = n * a.double().abs().amax() * b.double().abs().amax()
        assert float((sliced(a, b) - exact).abs().max()) <= LEFT_OUT * float(bound)


def test_gram_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(2, 3, 300, 4, seed=3)
    exact = fl.ops.gram(x)
    monkeypatch.setattr(torch_products, "has_float64", lambda device: False)
    with fl.use_backend("torch"):
        found = fl.ops.gram(x)
    assert found.dtype == torch.float64 and torch.equal(
        found.diagonal(dim1=1, dim2=2), found.mT.diagonal(dim1=1, dim2=2)
    )
    assert float((found - exact).abs().max()) <= LEFT_OUT * 300 * float(x.abs().max()) ** 2
