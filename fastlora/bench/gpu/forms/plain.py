"""Forms of the ops that have no kernel of their own on a device: plain torch there."""

from __future__ import annotations

from functools import partial

import torch

from fastlora.bench.gpu.forms.form import Form, Found, gaussian, largest, worst
from fastlora.ops.add_products import ProductTask, Segment, add_products
from fastlora.ops.difference_products import Precision, difference_products
from fastlora.ops.tucker import tucker
from fastlora.reference import add_products as products_formula
from fastlora.reference import difference_products as differences_formula
from fastlora.reference import tucker as tucker_formula

# Of the sum of the sizes of the terms: of X at least 16 bits count below float64.
DIFFERENCES: dict[Precision, float] = {"float32": 2.0**-16, "float64": 1e-14}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def differences(dtype: torch.dtype, precision: Precision, device: str) -> Found:
    """Both products of a power step, and the square of the difference, of matrices with gaps between rows."""
    n, m, width = 300, 70, 5
    old, new = (gaussian(n, m + 3, seed=i, dtype=dtype)[:, 1 : m + 1] for i in range(2))
    right, left = gaussian(m, width, seed=2), gaussian(n, width, seed=3)
    found = difference_products(*(x.to(device) for x in (old, new, right, left)), square=True, precision=precision)
    wanted_images, wanted_preimages, square = differences_formula.difference_products(new, old, right, left)
    assert wanted_images is not None and wanted_preimages is not None
    D = (new.double() - old.double()).abs()
    size = D @ right.abs() + left.abs()
    held = ((wanted_images, size), (wanted_preimages, D.mT @ size), (square, square))
    errors = [
        largest(torch.as_tensor(got, dtype=torch.float64).cpu() - wanted, size)
        for got, (wanted, size) in zip(found, held, strict=True)
    ]
    return Found(max(errors), DIFFERENCES[precision])


def products(dtype: torch.dtype, device: str) -> Found:
    """Products onto a stored matrix, of columns with none, one and two: rounded once, of sums in float32."""
    n, m = 130, 90
    W = gaussian(n, m, seed=0, dtype=dtype)
    pairs = [(gaussian(n, r, seed=r, dtype=dtype), gaussian(r, 40, seed=9 + r, dtype=dtype)) for r in (5, 16)]
    columns = [(0, 10, [], []), (10, 40, pairs, [0.5, -1.25]), (50, 40, pairs[:1], [2.0])]
    wanted = products_formula.add_products(W, columns)
    sizes = [(at, w, [(L.abs(), R.abs()) for L, R in own], [abs(s) for s in scales]) for at, w, own, scales in columns]
    there = [Segment(at, w, [(L.to(device), R.to(device)) for L, R in own], s) for at, w, own, s in columns]
    out = W.to(device, copy=True)
    if (problem := add_products(ProductTask((n, m), there, dtype, dtype), out, out)) is not None:
        raise AssertionError(f"it says {problem.what}")
    unit = wanted.abs() * torch.finfo(dtype).eps / 2 * (1 + 2.0**-6)
    unit += 2.0**-20 * products_formula.add_products(W.abs(), sizes)
    return Found(largest(out.cpu().double() - wanted, unit), 1.0)


def subspaces(device: str) -> Found:
    """Three steps of conjugate gradients; later ones amplify rounding."""
    left, right = (gaussian(2, 3, 4, n, seed=n) for n in (50, 30))
    size = (left.mT @ right).square().sum((1, 2, 3)).sqrt()
    left = left / size[:, None, None, None]
    U, V = (torch.linalg.qr(gaussian(2, n, 3, seed=n + 1))[0] for n in (50, 30))
    wanted = tucker_formula.tucker(left, right, U, V, 3, 0.0)
    left, right, U, V = (x.to(device) for x in (left, right, U, V))
    U, V, steps = (x.cpu() for x in tucker(left, right, U, V, iterations=3, tolerance=0.0))
    if steps.tolist() != wanted[2].tolist():
        raise AssertionError(f"steps are {steps.tolist()}, not {wanted[2].tolist()}")
    return worst(*(Found(largest(got - x), 1e-10) for got, x in zip((U, V), wanted[:2], strict=True)))


def forms() -> list[Form]:
    """Of ``extract``, ``apply`` and ``ctm``, for tensors that are on a device."""
    return [
        Form("difference_products bf16", partial(differences, torch.bfloat16, "float32")),
        Form("difference_products fp32", partial(differences, torch.float32, "float64")),
        *(Form(f"add_products {name}", partial(products, dtype)) for name, dtype in DTYPES.items()),
        Form("tucker", subspaces),
    ]
