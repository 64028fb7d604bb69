"""In-memory pools by property, beside the dense updates that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from builders import gaussian
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.factors import Factor
from fastlora.core.updates import Update
from fastlora.engine.materialise import materialise

Part = tuple[Tensor, Tensor, float]
"""``(B [n, r], A [r, m], scaling)``."""

MODULE = "model.layers.0.q_proj"
N, M = 40, 28


def update(left: Tensor, right: Tensor, scaling: float = 1.0) -> Update:
    return Update(Factor.of("B", left), Factor.of("A", right), scaling)


def make_adapter(name: str, parts: Mapping[str, Part]) -> Adapter:
    """An adapter of some modules."""
    dtype = next(iter(parts.values()))[0].dtype if parts else torch.float32
    return Adapter(name, {module: update(*part) for module, part in parts.items()}, dtype=dtype)


def make_pool(parts: Sequence[Part], module: str = MODULE) -> Pool:
    """A pool of adapters ``a0, a1, …`` with one module each."""
    return Pool(make_adapter(f"a{i}", {module: part}) for i, part in enumerate(parts))


def dense(part: Part) -> Tensor:
    """``s·B·A`` in float64."""
    left, right, scaling = part
    return scaling * (left.double() @ right.double())


def exact(update: Update) -> Tensor:
    """``ΔW`` of an update in float64, nothing rounded to a stored dtype."""
    left, right = materialise([update], torch.float64)[0]
    return update.scaling * (left @ right)


def cast(parts: Sequence[Part], dtype: torch.dtype) -> list[Part]:
    return [(b.to(dtype), a.to(dtype), s) for b, a, s in parts]


def transposed(parts: Sequence[Part]) -> list[Part]:
    """The updates ``ΔWᵀ``: what was planted in column spaces is now in row spaces."""
    return [(a.mT.contiguous(), b.mT.contiguous(), s) for b, a, s in parts]


def orthonormal(n: int, r: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(n, r, seed=seed, dtype=torch.float64)).Q


def mixing(r: int, seed: int, condition: float = 4.0) -> Tensor:
    """An invertible ``[r, r]`` of the given condition number."""
    spread = torch.logspace(0, -1, r, base=condition, dtype=torch.float64)
    return (orthonormal(r, r, seed) * spread) @ orthonormal(r, r, seed + 1)


def split(frame: Tensor, m: int, seed: int, condition: float = 30.0, scaling: float = 2.0) -> Part:
    """An update with the column space of ``frame`` and this condition number; neither factor is orthogonal."""
    r = frame.shape[1]
    sigma = torch.logspace(0, -1, r, base=condition, dtype=torch.float64)[torch.randperm(r, generator=_generator(seed))]
    x = mixing(r, seed + 10)
    left = frame @ orthonormal(r, r, seed + 20) * sigma.sqrt()
    right = sigma.sqrt()[:, None] * orthonormal(m, r, seed + 30).mT
    return left @ x, torch.linalg.inv(x) @ right, scaling


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(
    k: int, *, shared: int = 2, own: int = 4, noise: float = 0.06, seed: int = 0, condition: float = 30.0
) -> list[Part]:
    """Column spaces with ``shared`` directions that nearly agree and ``own`` random ones."""
    common = gaussian(N, shared, seed=seed + 1, dtype=torch.float64)
    parts = []
    for i in range(k):
        own_seed = seed + 1000 * (i + 1)
        near = common + noise * (1 + i) ** 0.5 * gaussian(N, shared, seed=own_seed, dtype=torch.float64)
        frame = torch.linalg.qr(torch.cat([near, gaussian(N, own, seed=own_seed + 1, dtype=torch.float64)], 1)).Q
        parts.append(split(frame, M, own_seed + 2, condition))
    return parts


def crowded(k: int) -> list[Part]:
    """Random column spaces of half the dimension: product chains have complex eigenvalues."""
    return [split(orthonormal(N, 20, 77 + 100 * i), M, 78 + 100 * i) for i in range(k)]


def identical(k: int) -> list[Part]:
    return planted(1) * k


def orthogonal(k: int) -> list[Part]:
    frame = orthonormal(N, 4 * k, 3)
    return [split(frame[:, 4 * i : 4 * i + 4], M, 50 + i) for i in range(k)]


def deficient_left(k: int) -> list[Part]:
    """The last two columns of ``B`` are combinations of the first ones."""
    parts = []
    for i, (left, right, s) in enumerate(planted(k)):
        left = left.clone()
        left[:, 4:] = left[:, :4] @ gaussian(4, 2, seed=200 + i, dtype=torch.float64)
        parts.append((left, right, s))
    return parts


def deficient_right(k: int) -> list[Part]:
    """``A`` has repeated rows, so ``B`` has a larger column space than ``ΔW``."""
    parts = []
    for left, right, s in planted(k):
        right = right.clone()
        right[4:] = right[:2]
        parts.append((left, right, s))
    return parts


def with_zero(k: int) -> list[Part]:
    """The second adapter is as PEFT initialises it."""
    return [(left * (i != 1), right, s) for i, (left, right, s) in enumerate(planted(k))]


def wide(k: int) -> list[Part]:
    """More columns than rows, ``r > n``, in a module of 12 rows and updates of rank 7."""
    parts = []
    for i in range(k):
        left = gaussian(12, 7, seed=300 + i, dtype=torch.float64) @ gaussian(7, 16, seed=400 + i, dtype=torch.float64)
        parts.append((left, gaussian(16, 20, seed=500 + i, dtype=torch.float64), 0.5))
    return parts


def ragged(k: int) -> list[Part]:
    return [planted(k, own=1 + 3 * i % 7)[i] for i in range(k)]


def duplicates(k: int) -> list[Part]:
    """The last adapter is the first one."""
    parts = planted(k)
    return [*parts[:-1], parts[0]]


def scalings(k: int) -> list[Part]:
    return [(b, a, (0.25, -3.0, 16.0)[i % 3]) for i, (b, a, _) in enumerate(planted(k))]


POOLS: dict[str, Callable[[int], list[Part]]] = {
    f.__name__: f
    for f in (
        planted, crowded, identical, orthogonal, deficient_left, deficient_right, with_zero, wide, ragged,
        duplicates, scalings,
    )
}  # fmt: skip


def thresholds(values: Tensor, most: int = 3) -> list[tuple[float, float]]:
    """``(τ, gap)`` in the middle of the widest gaps between eigenvalues in ``(0, 1)``: never undecidable."""
    inside = sorted({0.02, 0.98, *(float(v) for v in values.real if 0.02 < v < 0.98)})
    gaps = sorted(((high - low, (high + low) / 2) for low, high in pairwise(inside)), reverse=True)
    return [(tau, width / 2) for width, tau in gaps[:most]]
