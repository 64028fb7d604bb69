"""DeVec: shared and unique components of a pool (arXiv 2512.22511), MATH section 3.

Everything is computed on Gram blocks and kept as coefficients of the loaded factors; results are adapters whose tall
factors are formed when they are saved or looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastlora import ops
from fastlora.engine.blocks import Blocks
from fastlora.engine.checks import check_size, raise_for_info
from fastlora.engine.stream import current as streaming


@dataclass(frozen=True, slots=True)
class Settings:
    """The parameters of one decomposition; names and meaning as in :func:`fastlora.decompose`."""

    threshold: float
    chain: str
    side: str
    rank: int | None
    energy: float | None
    rtol: float | None

    def run(self, left: Tensor, right: Tensor, floor: Tensor, rtol: float) -> ops.Chain:
        """The chain of these settings on Gram blocks."""
        return ops.chain(
            left,
            right,
            threshold=self.threshold,
            kind=self.chain,
            rtol=rtol,
            rank=self.rank or 0,
            energy=1.0 if self.energy is None else self.energy,
            floor=floor,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Coefficients:
    """Coefficients of many results in few tensors: all pairs of a large pool have hundreds of thousands.

    ``sigma [b, k, r]``: singular values of ``ΔW_i``, scaling included, descending. ``values [b, w]``: eigenvalues, real
    where all are. ``basis [b, movers, r, c]`` and ``H [b, k, c, r]``, with as many
    columns ``c`` as some result of the batch shares.
    """

    sigma: np.ndarray[tuple[int, int, int], np.dtype[np.float64]]
    values: Tensor
    basis: Tensor
    H: Tensor

    def removals(self, rows: Sequence[int], i: int, ranks: Sequence[int]) -> list[list[Tensor]]:
        """``-basis_j H_i [r_j, r_i]`` for some rows and every mover ``j``: what the unique part of ``i`` adds on
        ``X_j``."""
        all_rows = list(rows) == list(range(len(self.H)))
        basis, H = (self.basis, self.H[:, i]) if all_rows else (self.basis[rows], self.H[rows, i])
        products = -basis @ H[:, None]
        movers = products.shape[1]
        each = list(products.flatten(0, 1).unbind())
        if any(rank < H.shape[-1] for rank in ranks):
            each = [c[: ranks[j % movers], : ranks[i]] for j, c in enumerate(each)]
        return [each[row : row + movers] for row in range(0, len(each), movers)]

    def weighted(self, rows: Sequence[int], members: Sequence[int], weights: Sequence[Sequence[float]]) -> list[Tensor]:
        """``w_i H_i [members, c, r]`` for some rows, with weights ``[rows][members]``."""
        H = self.H[rows] if len(members) == self.H.shape[1] else self.H[rows][:, members]
        factors = torch.tensor(weights, dtype=torch.float64).to(H.device)
        return list((H * factors[:, :, None, None]).unbind())


@dataclass(slots=True, eq=False)
class ModuleResult:
    """One module of a decomposition: coefficients of the results on the loaded factors, and what was measured.

    ``Z = Σ_j X_j basis_j`` for the projected factors ``X_j`` (``B_j`` on the left side, ``A_jᵀ`` on the right), and
    ``H_i = ZᵀX_i``; see MATH (7) and (8).
    """

    module: str
    shape: tuple[int, int]
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    kept: tuple[int, ...]
    count: int  # directions shared
    norms: tuple[float, ...]  # ‖ΔW_i‖
    shared_norms: tuple[float, ...]  # ‖ΔW_i^shared‖, MATH (9)
    rtol: float
    coefficients: Coefficients
    row: int  # of the coefficients

    @property
    def sigma(self) -> tuple[tuple[float, ...], ...]:
        """Singular values of every ``ΔW_i``, scaling included, descending."""
        own = self.coefficients.sigma[self.row].tolist()
        return tuple(tuple(x[:r]) for x, r in zip(own, self.ranks, strict=True))

    @property
    def values(self) -> Tensor:
        """Eigenvalues, descending by real part."""
        length = self.kept[0] if self.coefficients.basis.shape[1] == 1 else sum(self.kept)
        values = self.coefficients.values[self.row, :length]
        return values if values.is_complex() and bool(values.imag.any()) else values.real

    @property
    def basis(self) -> tuple[Tensor | None, ...]:
        """``[r_j, count]``, None where zero."""
        own = self.coefficients.basis[self.row]
        return tuple(own[j, :r, : self.count] if j < len(own) else None for j, r in enumerate(self.ranks))

    @property
    def H(self) -> tuple[Tensor, ...]:
        """``[count, r_i]``; none where nothing is shared."""
        own = self.coefficients.H[self.row]
        return tuple(own[i, : self.count, :r] for i, r in enumerate(self.ranks)) if self.count else ()

    @property
    def weights(self) -> tuple[float, ...]:
        """ω_i of MATH (10); zeros where nothing is shared."""
        total = sum(self.shared_norms)
        return tuple(s / total if total > 0 else 0.0 for s in self.shared_norms)


def shared_directions(blocks: Blocks, settings: Settings) -> list[ModuleResult]:
    """Chain and threshold for every module of the blocks, then MATH (7)–(10) in coefficients."""
    found = settings.run(blocks.projected, blocks.other.contiguous(), blocks.floor, blocks.group.rtol)

    raise_for_info(blocks.modules, found.info)
    k = len(blocks.group.members)
    movers = range(k if settings.chain == "mean" else 1)
    # H_i = Zᵀ X_i = Σ_j basis_jᵀ G_ji  [g, k, w, r]
    H = found.basis[:, 0, None].mT @ blocks.projected[:, 0]
    for j in movers[1:]:
        row = [blocks.projected[:, i, j].mT if i < j else blocks.projected[:, j, i] for i in range(k)]
        H += found.basis[:, j, None].mT @ torch.stack(row, 1)
    diagonal = blocks.projected.diagonal(dim1=1, dim2=2).movedim(-1, 1)
    norms = (diagonal * blocks.other).sum((-1, -2)).clamp(min=0).sqrt()  # [g, k]
    shared = ((H.mT @ H) * blocks.other).sum((-1, -2)).clamp(min=0).sqrt()  # MATH (9)
    scalings = _scalings(blocks)
    return module_results(blocks, found, len(movers), H, norms * scalings, shared * scalings)


def _scalings(blocks: Blocks) -> Tensor:
    """``|s_i|``: ``[g, k]``."""
    values = [[abs(u.scaling) for u in row] for row in blocks.updates]
    return torch.tensor(values, dtype=torch.float64).to(blocks.projected.device)


def module_results(
    blocks: Blocks, found: ops.Chain, movers: int, H: Tensor, norms: Tensor, shared: Tensor
) -> list[ModuleResult]:
    """The results of a chain, from ``H_i [g, k, w, r]`` and the norms of the updates and their shared parts
    ``[g, k]``."""
    sigma = (found.sigma * _scalings(blocks)[..., None]).cpu()
    check_size(blocks.names, blocks.modules, sigma)
    # Plain numbers in bulk: taking them out of tensors one by one would cost more than all of the above.
    numbers = [x.tolist() for x in (found.shared, found.kept, norms, shared)]
    most = max(numbers[0], default=0)
    coefficients = Coefficients(
        sigma.numpy(),
        (found.values if bool(found.values.imag.any()) else found.values.real.clone()).cpu(),
        _home(found.basis[:, :movers, :, :most]),
        _home(H[:, :, :most]),
    )
    results = []
    for g, module in enumerate(blocks.modules):
        count, kept, own_norms, own_shared = (x[g] for x in numbers)
        ranks = blocks.group.ranks
        results.append(
            ModuleResult(
                module=module,
                shape=blocks.updates[g][0].shape,
                names=blocks.names[g],
                ranks=ranks,
                kept=tuple(kept),
                count=count,
                norms=tuple(own_norms),
                shared_norms=tuple(own_shared),
                rtol=blocks.group.rtol,
                coefficients=coefficients,
                row=g,
            )
        )
    return results


def _home(small: Tensor) -> Tensor:
    """A coefficient beside the factors that it belongs to: those that are streamed are on the host."""
    return small.clone() if streaming() is None else small.cpu().clone()
