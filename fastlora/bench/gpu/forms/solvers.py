"""Forms of the kernels for small matrices: eigh, svd, chain and coefficients, at the edges of what each takes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import fastlora as fl
from fastlora.bench.gpu.forms.form import Form, Found, gaussian, largest, worst
from fastlora.ops.coefficients import PartCoefficients
from fastlora.ops.dispatch import prepared
from fastlora.reference import chain as chain_formula
from fastlora.reference import coefficients as coefficients_formula

DTYPES = (torch.float32, torch.float64)
BATCH, FEWEST = 5, 3  # matrices, the second of low rank and the third of NaN
# A warp a matrix, divided there and in a block of two widths, whole in a block and in place; the smallest of each.
EIGH = (5, 20, 33, 120, 150, 240)
EIGH_TINY = {torch.float32: (5, 17, 33, 65, 129, 237), torch.float64: (5, 17, 33, 65, 129, 166)}
IN_PLACE = {torch.float32: (4096, 16), torch.float64: (4096, 8)}  # beyond shared memory, of the fewest columns
# Rotations of n columns: each rounds, and they are as many as sweeps times n; above that what a wrong one would do.
ROUNDINGS = 100
# Of projectors and eigenvalues of a chain, whose Gram blocks square the condition of factors of random columns.
CHAIN = 1e-8


def _allowed(n: int, dtype: torch.dtype) -> float:
    return max(ROUNDINGS, n) * torch.finfo(dtype).eps


def eigh(n: int, dtype: torch.dtype, batch: int, device: str) -> Found:
    """``VΛVᵀ = A``, ``VᵀV = I`` and ``Λ``; one matrix of the batch is zero, one has NaN and spoils no other."""
    x = gaussian(batch, n, 2 * n, seed=n)
    a = ((x @ x.mT) / (2 * n)).to(dtype)
    a[1] = 0
    a[2] = torch.nan
    values, vectors, info = (t.cpu() for t in fl.ops.eigh_ex(a.to(device)))
    good = _require_one_bad(info)
    a, values, vectors = (t[good].double() for t in (a, values, vectors))
    wanted = torch.linalg.eigvalsh(a)
    size = float(wanted.abs().max())
    errors = (
        largest(vectors * values[:, None] @ vectors.mT - a, size),
        largest(vectors.mT @ vectors - torch.eye(n, dtype=torch.float64)),
        largest(values.sort().values - wanted, size),
    )
    return worst(*(Found(error, _allowed(n, dtype)) for error in errors))


def svd(p: int, q: int, dtype: torch.dtype, batch: int, device: str) -> Found:
    """``UΣVᵀ = A``, orthonormal ``U`` and ``V``, and ``Σ``; one matrix is of rank 1, one has NaN."""
    a = gaussian(batch, p, q, seed=p + q).to(dtype)
    a[1] = a[1, :, :1] * a[1, :1]
    a[2] = torch.nan
    U, S, Vh, info = (t.cpu() for t in fl.ops.svd_ex(a.to(device)))
    good = _require_one_bad(info)
    a, U, S, Vh = (t[good].double() for t in (a, U, S, Vh))
    wanted = torch.linalg.svdvals(a)
    size, one = float(wanted.max()), torch.eye(min(p, q), dtype=torch.float64)
    errors = (
        largest(U * S[:, None] @ Vh - a, size),
        largest(U.mT @ U - one),
        largest(Vh @ Vh.mT - one),
        largest(S - wanted, size),
    )
    return worst(*(Found(error, _allowed(max(p, q), dtype)) for error in errors))


def _require_one_bad(info: Tensor) -> list[int]:
    """The places of the others."""
    wanted = [int(i == 2) for i in range(len(info))]
    if info.tolist() != wanted:
        raise AssertionError(f"info is {info.tolist()}, not {wanted}")
    return [i for i, bad in enumerate(wanted) if not bad]


def _gram_blocks(g: int, k: int, r: int) -> tuple[Tensor, Tensor]:
    """Of factors that have two directions in common: ``[g, k, k, r, r]`` and ``[g, k, r, r]``."""
    B, A = gaussian(g, k, 3 * k * r, r, seed=r), gaussian(g, k, 3 * k * r, r, seed=r + 1)
    B[..., :2] = B[:, :1, :, :2] + 0.05 * B[..., :2]
    return torch.einsum("gina,gjnc->gijac", B, B).contiguous(), A.mT @ A


def chain(kind: str, k: int, r: int, device: str) -> Found:
    """Counts, eigenvalues, singular values and the projector ``basis basisᵀ`` against the formula in float64."""
    left, right = _gram_blocks(2, k, r)
    found = fl.ops.chain(left.to(device), right.to(device), threshold=0.5, kind=kind)
    basis, values, shared, kept, sigma, info = (t.cpu() for t in found)
    wanted = fl.ops.Chain(*chain_formula.chain(left, right, None, 0.5, kind, 1e-6, 0, 1.0))
    for name, got, expected in (("shared", shared, wanted.shared), ("kept", kept, wanted.kept), ("info", info, None)):
        if got.tolist() != (torch.zeros_like(got) if expected is None else expected).tolist():
            raise AssertionError(f"{name} is {got.tolist()}, not {None if expected is None else expected.tolist()}")
    projectors = [b.reshape(2, k * r, -1) @ b.reshape(2, k * r, -1).mT for b in (basis, wanted.basis)]
    errors = (
        largest(projectors[0] - projectors[1], float(projectors[1].abs().max())),
        largest(values[:, :2] - wanted.values[:, :2]),
        largest(sigma - wanted.sigma, float(wanted.sigma.max())),
    )
    return worst(*(Found(error, CHAIN) for error in errors))


def coefficients(k: int, r: int, device: str) -> Found:
    """Everything that a plan makes of a basis, against the formula in float64."""
    g, movers, w = 3, k, r
    left, right = _gram_blocks(g, k, r)
    basis, scaling, strength = gaussian(g, k, r, w, seed=3), gaussian(g, k, seed=4), gaussian(g, k, seed=5)
    wanted = coefficients_formula.coefficients(left, right, basis, scaling, strength, movers)
    out = PartCoefficients(*(torch.full_like(t, torch.nan).contiguous().to(device) for t in wanted))
    given = (t.contiguous().to(device) for t in (left, right, basis, scaling, strength))
    prepared("coefficients", *given, out).run()
    errors = [largest(got.cpu() - t, float(t.abs().max())) for got, t in zip(out, wanted, strict=True)]
    return Found(max(errors), 1e-12)  # sums of a hundred terms in float64


def forms(tiny: bool) -> list[Form]:
    """From those that others rest on to those with the most that can go wrong."""
    batch = FEWEST if tiny else BATCH
    found = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        orders = EIGH_TINY[dtype] if tiny else EIGH
        found += [Form(f"eigh {n} {name}", partial(eigh, n, dtype, batch)) for n in orders]
        in_place = IN_PLACE[dtype] if tiny else (240, 240)
        shapes = ((12, 12), (30, 30), (70, 70), (123, 64), (1520, 8), in_place, (8, 1524))
        found += [Form(f"svd {p}x{q} {name}", partial(svd, p, q, dtype, batch)) for p, q in shapes]
    for r in (16, 72):
        found += [Form(f"chain {kind} r={r}", partial(chain, kind, 3, r)) for kind in ("product", "palindrome", "mean")]
    return found + [Form(f"coefficients r={r}", partial(coefficients, 4, r)) for r in (5, 16)]
