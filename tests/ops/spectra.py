"""Matrices by property, and LAPACK-style error ratios in float64.

The ratios are those of LAPACK's xDRVST / xDRVBD testers: errors in units of the unit roundoff, the size of
the matrix and its norm. A sound solver stays below 30 for every input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

RATIO_LIMIT = 30.0
SIZES = [*range(1, 71), 96, 128, 256]
DTYPES = [torch.float32, torch.float64]


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _orthogonal(seed: int, batch: int, p: int, q: int) -> Tensor:
    return torch.linalg.qr(_randn(seed, batch, p, q))[0]


def spectra(n: int, batch: int) -> dict[str, Tensor]:
    """Spectra [batch, n] in [0, 1], largest first."""
    t = torch.linspace(0, 1, n, dtype=torch.float64)
    head = torch.arange(n) < max(1, n // 2)
    noise = _randn(7, batch, n)
    small = torch.full((n,), 1e-6, dtype=torch.float64)
    named = {
        "arith": 1 - t * (1 - 1e-6),
        "geo": 10 ** (-6 * t),
        "cluster0": torch.cat([torch.ones(1, dtype=torch.float64), small[1:]]),
        "cluster1": torch.cat([torch.ones(n - 1, dtype=torch.float64), small[:1]]),
        "graded": 10 ** (-12 * t),
    }
    named = {name: w.expand(batch, n) for name, w in named.items()}
    named["zero-one"] = head + 1e-7 * noise
    named["equal"] = 1 + 0 * noise
    return named


def symmetric(n: int, dtype: torch.dtype, batch: int = 9) -> Iterator[tuple[str, Tensor]]:
    """Named batches [batch, n, n] of symmetric matrices."""
    q = _orthogonal(1, batch, n, n)
    x = _randn(2, batch, n, n)
    gram = x @ x.mT
    mixed_sign = (q * _randn(3, batch, 1, n)) @ q.mT
    grade = 10 ** (-5 * torch.linspace(0, 1, n, dtype=torch.float64))
    graded = grade[:, None] * (gram / n) * grade
    thin = _randn(4, batch, n, max(1, n // 4))
    eye = torch.eye(n, dtype=torch.float64).expand(batch, n, n)
    off = torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
    wilkinson = torch.diag((torch.arange(n, dtype=torch.float64) - (n - 1) / 2).abs()) + off + off.mT
    scales = 10.0 ** (torch.arange(batch) % 7 * 8 - 24.0)
    keep = torch.arange(batch) % 3 != 0

    cases = {"random": x + x.mT, "gram": gram, "mixed sign": mixed_sign}
    cases |= {name: (q * w[:, None, :]) @ q.mT for name, w in spectra(n, batch).items()}
    cases |= {
        "DAD": graded,
        "DAD reversed": graded.flip(-1, -2),
        "rank-deficient": thin @ thin.mT,
        "zero": 0 * eye,
        "identity": eye,
        "diagonal": torch.diag_embed(_randn(5, batch, n)),
        "wilkinson": wilkinson.expand(batch, n, n),
        "duplicate": torch.ones(batch, n, n, dtype=torch.float64),
        "arrow": torch.diag_embed(_randn(6, batch, n)) + _first_row_and_column(n),
        "huge": mixed_sign * 1e30,
        "tiny": mixed_sign * 1e-30,
        "mixed scales": mixed_sign * (scales * keep)[:, None, None],
    }
    for name, a in cases.items():
        a = a.to(dtype)
        yield name, ((a + a.mT) / 2).contiguous()


def _first_row_and_column(n: int) -> Tensor:
    a = torch.zeros(n, n, dtype=torch.float64)
    a[0, 1:] = a[1:, 0] = 1
    return a


def rectangular(p: int, q: int, dtype: torch.dtype, batch: int = 9) -> Iterator[tuple[str, Tensor]]:
    """Named batches [batch, p, q]."""
    m = min(p, q)
    u, v = _orthogonal(11, batch, p, m), _orthogonal(12, batch, q, m)
    x = _randn(13, batch, p, q)
    rows = 10 ** (-5 * torch.linspace(0, 1, p, dtype=torch.float64))[:, None]
    columns = 10 ** (-5 * torch.linspace(0, 1, q, dtype=torch.float64))
    rank = max(1, m // 4)
    eye = torch.eye(p, q, dtype=torch.float64).expand(batch, p, q)
    scales = 10.0 ** (torch.arange(batch) % 7 * 8 - 24.0)
    keep = torch.arange(batch) % 3 != 0

    cases = {"random": x}
    cases |= {name: (u * w[:, None, :]) @ v.mT for name, w in spectra(m, batch).items()}
    cases |= {
        "graded columns": x * columns,
        "graded columns reversed": x * columns.flip(0),
        "graded rows": x * rows,
        "DAD": rows * x * columns,
        "DAD reversed": (rows * x * columns).flip(-1, -2),
        "steep": x * columns**6,
        "rank-deficient": x[:, :, :rank] @ _randn(14, batch, rank, q),
        "zero column": x * (torch.arange(q) % 3 != 0),
        "zero": 0 * x,
        "identity": eye,
        "diagonal": eye * _randn(15, batch, 1, q),
        "bidiagonal": eye + eye.roll(1, -1),
        "duplicate": x[:, :, :1].expand(batch, p, q),
        "huge": x * 1e30,
        "tiny": x * 1e-30,
        "mixed scales": x * (scales * keep)[:, None, None],
    }
    for name, a in cases.items():
        yield name, a.to(dtype).contiguous()


def _norm1(a: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(a, 1)


def _nonzero(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, norm, torch.ones_like(norm))


def _orthonormality(v: Tensor, size: int, eps: float) -> Tensor:
    eye = torch.eye(v.shape[-1], dtype=torch.float64)
    return _norm1(eye - v.mT @ v) / (size * eps)


def eigh_ratios(a: Tensor, values: Tensor, vectors: Tensor) -> dict[str, float]:
    """Worst ratios of A = V diag(w) Vᵀ over a batch."""
    n, eps = a.shape[-1], torch.finfo(a.dtype).eps / 2
    a, w, v = a.double(), values.double(), vectors.double()
    norm = _nonzero(_norm1(a))
    reference = torch.linalg.eigvalsh(a)
    return {
        "residual": (_norm1(a - (v * w[:, None, :]) @ v.mT) / (n * norm * eps)).max().item(),
        "orthonormality": _orthonormality(v, n, eps).max().item(),
        "values": ((w - reference).abs().amax(-1) / (n * norm * eps)).max().item(),
    }


def svd_ratios(a: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> dict[str, float]:
    """Worst ratios of A = U diag(s) Vᵀ over a batch."""
    size, eps = max(a.shape[-2:]), torch.finfo(a.dtype).eps / 2
    a, u, s, v = a.double(), u.double(), s.double(), vh.double().mT
    norm = _nonzero(_norm1(a))
    reference = torch.linalg.svdvals(a)
    largest = _nonzero(reference[:, 0])
    return {
        "residual": (_norm1(a - (u * s[:, None, :]) @ v.mT) / (size * norm * eps)).max().item(),
        "left": _orthonormality(u, size, eps).max().item(),
        "right": _orthonormality(v, size, eps).max().item(),
        "values": ((s - reference).abs().amax(-1) / (size * largest * eps)).max().item(),
    }


def call_variants(op: Callable[[Tensor], tuple[Tensor, ...]], a: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Other ways to compute ``op(a)`` that must give the same bits."""
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(0))
    yield "again", op(a)
    yield "permuted", tuple(x[order.argsort()] for x in op(a[order]))
    for size in (1, 3):
        parts = [op(part) for part in a.split(size)]
        yield f"in batches of {size}", tuple(torch.cat(results) for results in zip(*parts, strict=True))
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            result = op(a)
        finally:
            torch.set_num_threads(before)
        yield f"{threads} threads", result
