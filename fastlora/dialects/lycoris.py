"""Modules of LyCORIS as low-rank updates: LoHa, LoKr, cores of convolutions, and whole differences.

All of them are sums of products of their stored numbers, so factors exist that give the same ``ΔW``, often of a high
rank. Up to :data:`MOST_EXACT` they are made. Beyond, or at a ``rank`` that is asked for, the nearest update of lower
rank is made, and what it lacks is measured. What counts is LyCORIS' forward pass, which was trained; its merge applies
alpha twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastlora.core.factors import Factor
from fastlora.core.updates import LINEAR, Layout, Update
from fastlora.dialects.suffixes import Stored
from fastlora.dialects.weights import MOST_ABOVE_SIDES, Place, check_tensor
from fastlora.errors import NonFiniteError

MOST_EXACT = 256
"""The rank up to which factors are made that are exact: they are at most what a large LoRA has."""
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

Pair = tuple[Tensor, Tensor]
"""``(B [out, r], A [r, in·Πk])`` in float64."""


@dataclass(frozen=True, slots=True, eq=False)
class Converted:
    """One module as a low-rank update. ``kind``: what it was. ``exact``: the rank at which its update is exact.
    ``energy``: ``Σσ²`` of all of ``ΔW`` (scaling aside), and ``kept``, the share that the update has; ``None`` where
    the update is exact."""

    update: Update
    kind: str
    exact: int
    energy: float = 0.0
    kept: float | None = None


class TooLarge(Exception):
    """Factors that would be exact have a rank above :data:`MOST_EXACT`, and none was asked for."""

    def __init__(self, kind: str, rank: int) -> None:
        super().__init__(kind, rank)
        self.kind, self.rank = kind, rank


def kind_of(parts: Mapping[str, Tensor]) -> str | None:
    """What the tensors of a module are: ``LoRA``, ``LoCon with a core``, ``LoHa``, ``LoKr``, ``diff``; ``None`` where
    none of them is a change of the weight."""
    kinds = [
        *["LoCon with a core" if "mid" in parts else "LoRA"] * bool({"down", "up", "mid"} & parts.keys()),
        *["LoHa"] * any(name.startswith("hada_") for name in parts),
        *["LoKr"] * any(name.startswith("lokr_") for name in parts),
        *["diff"] * ("diff" in parts),
    ]
    return " and ".join(kinds) or None


def dimension(parts: Mapping[str, Tensor]) -> int | None:
    """What alpha is divided by; ``None`` where alpha has no meaning (whole matrices, and factors that are none)."""
    names = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    factor = next((parts[name] for name in names if name in parts), None)
    return None if factor is None or not factor.numel() or not factor.dim() else factor.shape[0]


def converted(stored: Stored, scaling: float, rank: int | None, file: Path) -> Converted:
    """A module of LyCORIS as ``scaling · B · A``, of rank ``rank`` at most where one is asked for.

    Factors are float32 where the stored tensors are of half precision, else float64. Raises :class:`InputError` for
    tensors that do not fit each other, :class:`NonFiniteError` for NaN and Inf, and :class:`TooLarge`.
    """
    kind = kind_of(stored.parts)
    assert kind is not None
    for name, tensor in stored.parts.items():
        if name not in ("alpha", "scalar", "scale"):
            check_tensor(stored.keys[name], tensor, file)
    where = Place(file, stored.stem)
    doubles = {name: t.double() for name, t in stored.parts.items() if name in _NUMBERS}
    if not all(bool(t.isfinite().all()) for t in doubles.values()):
        raise NonFiniteError(f"{file}: module {stored.stem!r} holds NaN or Inf; save or train it again")
    product = _PRODUCTS.get(kind, _several)(doubles, where)
    half = all(stored.parts[name].element_size() <= 2 for name in doubles)
    return _Cut(kind, product, scaling, rank, torch.float32 if half else torch.float64).converted()


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """``ΔW`` in factors that are exact: one pair ``(B, A)``, or the Kronecker product of two; or ``ΔW`` itself where
    that is smaller than its factors."""

    pairs: tuple[Pair, ...] = ()
    dense: Tensor | None = None
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """Of the exact factors."""
        return min(self.dense.shape) if self.dense is not None else math.prod(B.shape[1] for B, _ in self.pairs)

    def factors(self) -> Pair:
        """The exact factors."""
        if self.dense is not None:
            return whole(self.dense)
        first, *others = self.pairs
        return (kronecker(first[0], others[0][0]), kronecker(first[1], others[0][1])) if others else first

    def nearest(self, rank: int) -> tuple[Pair, float, float]:
        """The nearest factors of a lower rank, ``Σσ²`` of all, and of what is kept."""
        if self.dense is not None:
            u, s, v = singular_dense(self.dense, rank)
            return (u * s, v), float(self.dense.square().sum()), float(s.square().sum())
        (u1, s1, v1), *others = [singular(pair) for pair in self.pairs]
        if not others:
            return (u1[:, :rank] * s1[:rank], v1[:rank]), float(s1.square().sum()), float(s1[:rank].square().sum())
        # Singular values of a Kronecker product are products of singular values, and so are its vectors.
        u2, s2, v2 = others[0]
        products = torch.outer(s1, s2).flatten()
        top = products.argsort(descending=True)[:rank]
        i, j = top // len(s2), top % len(s2)
        u = (u1[:, None, i] * u2[None, :, j]).flatten(0, 1)
        v = (v1[i][:, :, None] * v2[j][:, None, :]).flatten(1)
        return (u * products[top], v), float(products.square().sum()), float(products[top].square().sum())


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """What becomes of a product: its factors, or the nearest of a lower rank."""

    kind: str
    product: Product
    scaling: float
    rank: int | None
    dtype: torch.dtype

    def converted(self) -> Converted:
        exact = self.product.rank
        if self.rank is None and exact > MOST_EXACT:
            raise TooLarge(self.kind, exact)
        if self.rank is None or exact <= self.rank:
            return Converted(self._update(self.product.factors()), self.kind, exact)
        pair, energy, kept = self.product.nearest(self.rank)
        share = kept / energy if energy > 0 else 1.0
        return Converted(self._update(pair), self.kind, exact, energy * self.scaling**2, min(share, 1.0))

    def _update(self, pair: Pair) -> Update:
        B, A = (x.to(self.dtype).contiguous() for x in pair)
        layout = Layout("conv", kernel=self.product.kernel) if self.product.kernel else LINEAR
        return Update(Factor.of("B", B), Factor.of("A", A), self.scaling, layout)


def kronecker(left: Tensor, right: Tensor) -> Tensor:
    """``left ⊗ right`` of two matrices; torch's own fails on some views, those with sizes of 1 among them."""
    return (left[:, None, :, None] * right[None, :, None, :]).flatten(0, 1).flatten(1)


def whole(matrix: Tensor) -> Pair:
    """A matrix beside an identity: exact factors of the smaller of its sizes."""
    n, m = matrix.shape
    eye = torch.eye(min(n, m), dtype=matrix.dtype)
    return (matrix, eye) if m <= n else (eye, matrix)


def singular(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """``U [n, k]``, ``σ`` and ``V [k, m]`` of ``B A``, from small matrices."""
    qb, rb = torch.linalg.qr(pair[0])
    qa, ra = torch.linalg.qr(pair[1].mT)
    u, s, v = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    return qb @ u, s, v @ qa.mT


def singular_dense(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``rank`` of a matrix, from the Gram matrix of its smaller side: values below 1e-8 of the largest are
    not found, which is far below what their factors could hold."""
    n, m = matrix.shape
    if n < m:
        u, s, v = singular_dense(matrix.mT, rank)
        return v.mT, s, u.mT
    vectors = torch.linalg.eigh(matrix.mT @ matrix)[1].flip(1)[:, :rank]  # [m, k]
    lengths = (image := matrix @ vectors).norm(dim=0)
    return image / lengths.clamp(min=torch.finfo(torch.float64).tiny), lengths, vectors.mT


def _tucker(parts: Mapping[str, Tensor], where: Place) -> Product:
    """``Σ up[o,m] mid[m,n,k] down[n,i]``: the core goes into ``A``, and the rank stays that of ``up``."""
    up, mid, down = (parts.get(name) for name in ("up", "mid", "down"))
    if up is None or mid is None or down is None:
        raise where.fail("has lora_mid and no lora_up and lora_down beside it; save or download it again")
    left, right = _matrix(up), _matrix(down)
    if left is None or right is None or mid.dim() < 3 or mid.shape[:2] != (left.shape[1], right.shape[0]):
        raise where.fail(f"has {_sizes(up=up, mid=mid, down=down)}, which do not fit each other; save it again")
    if left.shape[1] != right.shape[0]:
        raise where.fail(f"has a core {list(mid.shape)} that is not square, so its alpha has no one meaning")
    a = torch.einsum("mn...,ni->mi...", mid, right).flatten(1)
    return _smaller((left, a), tuple(mid.shape[2:]))


def _loha(parts: Mapping[str, Tensor], where: Place) -> Product:
    """``(B1 A1) ∘ (B2 A2)``: columns of ``B`` are products of columns, rows of ``A`` products of rows."""
    lacking = next((name for name in HADAMARD if name not in parts), None)
    if lacking is not None or ("hada_t1" in parts) != ("hada_t2" in parts):
        raise where.fail(f"is a LoHa without {lacking or 'one of hada_t1 and hada_t2'}; save or download it again")
    cores = [parts.get(f"hada_t{i}") for i in (1, 2)]
    pairs = [core_pair(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], cores[i - 1]) for i in (1, 2)]
    if any(p is None for p in pairs) or pairs[0][0].shape[0] != pairs[1][0].shape[0] or _differ(pairs, 1):  # type: ignore[index]
        raise where.fail(f"is a LoHa of {_sizes(**parts)}, which do not fit each other; save or download it again")
    (b1, a1), (b2, a2) = pairs  # type: ignore[misc]
    kernel = () if cores[0] is None else tuple(cores[0].shape[2:])
    if b1.shape[1] * b2.shape[1] >= min(b1.shape[0], a1.shape[1]):
        dense = (b1 @ a1) * (b2 @ a2)
        return Product(dense=dense, kernel=kernel)
    left = (b1[:, :, None] * b2[:, None, :]).flatten(1)
    right = (a1[:, None, :] * a2[None, :, :]).flatten(0, 1)
    return Product(((left, right),), kernel=kernel)


def _differ(pairs: Sequence[Pair | None], side: int) -> bool:
    shapes = {p[side].shape[1] for p in pairs if p is not None}
    return len(shapes) > 1


def core_pair(w_a: Tensor, w_b: Tensor, core: Tensor | None) -> Pair | None:
    """One side of LoHa or LoKr as factors: ``w_a [out, r]`` and ``w_b [r, in]``; with a core ``[r, r, *kernel]`` they
    are ``[r, out]`` and ``[r, in]``. ``None`` where the shapes do not fit."""
    right = w_b.flatten(1) if w_b.dim() >= 2 else w_b
    if w_a.dim() != 2 or right.dim() != 2:
        return None
    if core is None:
        return (w_a, right) if w_a.shape[1] == right.shape[0] else None
    if core.dim() < 3 or tuple(core.shape[:2]) != (w_a.shape[0], right.shape[0]):
        return None
    return w_a.mT, torch.einsum("ij...,jr->ir...", core, right).flatten(1)


def _lokr(parts: Mapping[str, Tensor], where: Place) -> Product:
    """``W1 ⊗ W2``, each whole or in factors; a kernel belongs to ``W2``."""
    sides: list[Pair] = []
    kernel: tuple[int, ...] = ()
    for i in (1, 2):
        entire, a, b = (parts.get(f"lokr_w{i}{end}") for end in ("", "_a", "_b"))
        core = parts.get("lokr_t2") if i == 2 else None
        pair: Pair | None = None
        if entire is not None and a is None and b is None and core is None and entire.dim() >= 2:
            kernel = tuple(entire.shape[2:]) if i == 2 else ()
            pair = whole(entire.flatten(1)) if i == 2 or entire.dim() == 2 else None
        elif entire is None and a is not None and b is not None:
            kernel = (tuple(core.shape[2:]) if core is not None else tuple(b.shape[2:])) if i == 2 else ()
            pair = core_pair(a, b, core)
        if pair is None:
            raise where.fail(
                f"is a LoKr of {_sizes(**parts)}; needed are lokr_w{i}, or lokr_w{i}_a and lokr_w{i}_b, that fit each "
                "other: save or download it again"
            )
        sides.append(pair if pair[0].shape[1] <= min(pair[0].shape[0], pair[1].shape[1]) else whole(pair[0] @ pair[1]))
    return Product((sides[0], sides[1]), kernel=kernel)


def _diff(parts: Mapping[str, Tensor], where: Place) -> Product:
    """The change itself."""
    dense = parts["diff"]
    if dense.dim() < 2:
        raise where.fail(f"has a difference {list(dense.shape)} where one of a weight is needed")
    return Product(dense=dense.flatten(1), kernel=tuple(dense.shape[2:]))


def _several(parts: Mapping[str, Tensor], where: Place) -> Product:
    raise where.fail(f"has tensors of several kinds of adapters ({', '.join(parts)}); keep one kind of them")


def _matrix(tensor: Tensor) -> Tensor | None:
    """A factor without the kernel of ones after it."""
    return tensor.flatten(1) if tensor.dim() >= 2 and math.prod(tensor.shape[2:]) == 1 else None


def _smaller(pair: Pair, kernel: tuple[int, ...]) -> Product:
    if pair[0].shape[1] > max(pair[0].shape[0] + pair[1].shape[1], MOST_ABOVE_SIDES):
        return Product(dense=pair[0] @ pair[1], kernel=kernel)
    return Product((pair,), kernel=kernel)


def _sizes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())


_NUMBERS = frozenset(
    ("up", "mid", "down", "diff", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
).union(HADAMARD, ("hada_t1", "hada_t2"))
_PRODUCTS: Mapping[str, Callable[[Mapping[str, Tensor], Place], Product]] = {
    "LoCon with a core": _tucker,
    "LoHa": _loha,
    "LoKr": _lokr,
    "diff": _diff,
}
