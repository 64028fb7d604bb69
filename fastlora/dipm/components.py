"""Components: the rank-one terms ``sσ_j u_j v_jᵀ`` of the singular value form, MATH (3), by order of ``σ``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fastlora import ops
from fastlora.core.factors import Factor, add, concatenate
from fastlora.core.updates import Update, exact_rtol, unscaled
from fastlora.dipm.module import ModulatedModule, dense
from fastlora.engine.blocks import PairBlocks
from fastlora.engine.checks import raise_for_info
from fastlora.engine.stream import current

# Singular values at a smaller relative distance are equal to rounding: any rotation of their components is as good.
EQUAL = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class SingularComponents:
    """Of every member: ``u = B T [n, kept]``, ``v = σ⁻¹ D A [kept, m]``, magnitudes ``|s|σ [kept]``.

    ``left``, ``right`` ``[k, k, P]``: cosines of ``u`` and of ``v`` at equal places, zero where one has fewer
    components; ``magnitude [k, P]``. The sign of ``s`` is in ``v``, and ``sign [k, P]`` makes the largest entry of
    every ``u_j`` positive (1 everywhere where signs do not matter).
    """

    T: list[Tensor]
    D: list[Tensor]  # of unit rows
    magnitude: Tensor
    left: Tensor
    right: Tensor
    sign: Tensor


def forms(blocks: PairBlocks) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """``(T, D, σ)`` of every member of every module, ``D`` with unit rows ``D A``, ``σ`` of ``B A``: by ``[g][k]``.

    Stored factors are taken as exact, whatever their dtype: only what is below 1e-6 of the largest ``σ``, or below 1e-7
    of that of what a part was computed from, is left out (2⁻¹² for half-precision factors on a GPU). The root of the
    rounding of a Gram matrix is lower.
    """
    forms_by_module: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in blocks.modules]
    for i in range(len(blocks.members)):
        left, right = blocks.left[:, i, i, None, None].contiguous(), blocks.right[:, i, i, None].contiguous()
        floor = torch.tensor([[unscaled(row[i].noise.rounding, row[i])] for row in blocks.updates], dtype=torch.float64)
        rtol = max(exact_rtol([row[i]], on_gpu=current() is not None) for row in blocks.updates)
        chain = ops.chain(left, right, threshold=0.0, rtol=rtol, floor=floor)
        raise_for_info(blocks.modules, chain.info)
        for g, kept in enumerate(chain.kept[:, 0].tolist()):
            rank = blocks.updates[g][i].rank
            T = chain.basis[g, 0, :rank, :kept]
            sigma = chain.sigma[g, 0, :kept]
            D = (T.mT @ blocks.left[g, i, i, :rank, :rank]) / sigma[:, None]
            forms_by_module[g].append((T.contiguous(), D, sigma))
    return forms_by_module


def of_module(
    member_forms: Sequence[tuple[Tensor, Tensor, Tensor]], module: ModulatedModule, on: str
) -> SingularComponents:
    """The components of one module's members, with cosines at equal places."""
    k, P = len(member_forms), max(1, *(len(sigma) for _, _, sigma in member_forms))
    T, D = [t for t, _, _ in member_forms], [d for _, d, _ in member_forms]
    left, right = torch.zeros(2, k, k, P, dtype=torch.float64)
    magnitude, sign = torch.zeros(k, P, dtype=torch.float64), torch.ones(k, P, dtype=torch.float64)
    scalings = module.scalings
    for i in range(k):
        magnitude[i, : len(member_forms[i][2])] = member_forms[i][2] * scalings[i].abs()
        if on != "product" and k > 1:
            sign[i, : T[i].shape[1]] = _signs(dense(module.present[i].B.times(T[i]))).cpu()
        for j in range(i, k):
            n = min(T[i].shape[1], T[j].shape[1])
            (r, s) = (len(T[i]), len(T[j]))
            across = module.left[i, j, :r, :s], module.right[i, j, :r, :s]
            left[i, j, :n] = left[j, i, :n] = ((T[i].mT @ across[0])[:n] * T[j].mT[:n]).sum(1)
            right[i, j, :n] = right[j, i, :n] = ((D[i] @ across[1])[:n] * D[j][:n]).sum(1)
    turn = torch.where(scalings < 0, -1.0, 1.0)
    return SingularComponents(T, [d * t for d, t in zip(D, turn, strict=True)], magnitude, left,
                      right * (turn[:, None] * turn)[..., None], sign)  # fmt: skip


def _signs(u: Tensor) -> Tensor:
    """1 or −1 for every column: the sign of its largest entry, the first of those that are equal to rounding."""
    size = u.abs()
    first = (size >= (1 - 1e-6) * size.amax(0)).int().argmax(0)
    return torch.where(u.gather(0, first[None])[0] < 0, -1.0, 1.0)


def gram(parts: SingularComponents, on: str) -> Tensor:
    """Inner products of ``sσ u vᵀ`` (product), ``sσ u`` (``on="B"``) or ``sσ v`` (``on="A"``): ``[k, k, P]``."""
    if on == "product":
        cosines = parts.left * parts.right
    else:
        cosines = (parts.left if on == "B" else parts.right) * parts.sign[:, None] * parts.sign
    k = len(parts.T)
    for i in range(k):  # unit by construction
        cosines[i, i] = (parts.magnitude[i] > 0).double()
    return cosines * parts.magnitude[:, None] * parts.magnitude


def is_ambiguous(parts: SingularComponents) -> bool:
    """Whether some singular values of a member are equal, so that its components are not unique."""
    return any(a - b <= EQUAL * row[0] for row in parts.magnitude.tolist() for a, b in pairwise(row) if b > 0)


def update(module: ModulatedModule, parts: SingularComponents, weights: Tensor, on: str) -> Update:
    """The update with the components ``Σ_k weights_k x_k``, ``weights [K, P]``."""
    index_of = {member: i for i, member in enumerate(module.members)}
    used = [
        (index_of[m], u, weights[m]) for m, u in enumerate(module.updates) if u is not None and bool(weights[m].any())
    ]
    if on == "product":
        left, right = [], []
        for i, u, w in used:
            chosen = w[: parts.T[i].shape[1]].nonzero().flatten()
            amount = (w * parts.magnitude[i])[chosen]
            left.append(u.B.times(parts.T[i][:, chosen]))
            right.append(u.A.times((parts.D[i][chosen] * amount[:, None]).mT))
        return Update(concatenate(left), concatenate(right), 1.0, used[0][1].layout)
    kept = parts.T[0].shape[1]  # the own ones, whose other half stays
    own_update = module.own
    terms: list[Factor] = []
    for i, u, w in used:
        n = min(kept, parts.T[i].shape[1])
        amount = (w * parts.magnitude[i] * parts.sign[i])[:n]
        small = parts.T[i][:, :n] * amount if on == "B" else (parts.D[i][:n] * amount[:, None]).mT
        small = torch.nn.functional.pad(small, (0, kept - n))
        terms.append((u.B if on == "B" else u.A).times(small))
    if on == "B":
        return replace(
            own_update, B=add(terms), A=own_update.A.times((parts.D[0] * parts.sign[0, :kept, None]).mT), scaling=1.0
        )
    return replace(own_update, B=own_update.B.times(parts.T[0] * parts.sign[0, :kept]), A=add(terms), scaling=1.0)
