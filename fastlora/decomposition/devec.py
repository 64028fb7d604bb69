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
from fastlora.analysis.chance import chance_edge
from fastlora.core.updates import Noise, Update, joint_noise
from fastlora.decomposition.weighted_chain import weighted_chain
from fastlora.engine.blocks import ChainBlocks, require_finite_blocks
from fastlora.engine.checks import check_size, raise_for_info
from fastlora.engine.stream import current as streaming
from fastlora.reference import coefficients

Scalings = np.ndarray[tuple[int, int], np.dtype[np.float64]]

SOFT = "soft"
"""The threshold that takes directions by how far they are above chance."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The parameters of one decomposition; names and meaning as in :func:`fastlora.decompose`."""

    threshold: float | str
    chain: str
    side: str
    rank: int | None
    energy: float | None
    rtol: float | None
    weighting: str | None = None
    rho: float | None = None

    @property
    def is_soft(self) -> bool:
        """Whether directions are taken by how far they are above chance."""
        return self.threshold == SOFT

    @property
    def is_plain(self) -> bool:
        """Whether the op ``chain`` looks at the blocks as they are, and tells of those that are not finite."""
        return not self.is_soft and not self.weighting

    @property
    def blocks_kind(self) -> str:
        """Which Gram blocks of the projected side the chain needs."""
        return "pairs" if self.chain == "mean" else "chain"

    def taken(self, blocks: ChainBlocks, chain: ops.Chain) -> Tensor | None:
        """Of every direction of a soft threshold, ``(λ − edge)/(1 − edge)`` where it is above 0: ``[g, w]``. The
        ``edge`` is what chance alone gives in that module."""
        if not self.is_soft:
            return None
        axis = 0 if self.side == "left" else 1
        lengths = [updates[0].shape[axis] for updates in blocks.updates]
        kept = [tuple(row) for row in chain.kept.tolist()]
        edges = [chance_edge(n, dimensions, self.chain) for n, dimensions in zip(lengths, kept, strict=True)]
        edge = torch.tensor(edges, dtype=torch.float64, device=chain.values.device)[:, None]
        return torch.where(edge < 1.0, (chain.values.real - edge) / (1.0 - edge), 0.0).clamp(0.0, 1.0)

    def movers(self, k: int) -> int:
        """How many of ``k`` projected factors the shared directions are made of: the first ones."""
        return k if self.chain == "mean" else 1

    def cuts(self, rtol: float) -> tuple[float, str, float, int, float]:
        """What the op ``chain`` takes behind its tensors; ``rtol``: of a group."""
        threshold = 0.0 if isinstance(self.threshold, str) else self.threshold
        return threshold, self.chain, rtol, self.rank or 0, 1.0 if self.energy is None else self.energy

    def run(self, blocks: ChainBlocks) -> ops.Chain:
        """The chain of these settings on Gram blocks."""
        threshold, kind, rtol, rank, energy = self.cuts(blocks.group.rtol)
        if not self.is_plain:
            return weighted_chain(blocks, kind, threshold, self.rho or 0.0, (rank, energy))
        return ops.chain(
            blocks.projected,
            blocks.other,
            threshold=threshold,
            kind=kind,
            rtol=rtol,
            rank=rank,
            energy=energy,
            floor=blocks.floor,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ResultBatch:
    """Results of many modules in few tensors: all pairs of a large pool have hundreds of thousands.

    ``sigma [b, k, r]``: singular values of ``ΔW_i``, scaling included, descending. ``values [b, w]``: eigenvalues, real
    where all are. ``basis [b, movers, r, c]`` and ``H [b, k, c, r]``, with as many columns ``c`` as some result of the
    batch shares.
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
    ``H_i = ZᵀX_i``, whose rows are times ``taken``; see MATH (7) and (8).
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
    batch: ResultBatch
    row: int  # of the batch
    taken: tuple[float, ...] | None = None  # of every shared direction, where not all of it
    unique_norms: tuple[float, ...] | None = None  # ‖ΔW_i^unique‖, where the parts are not orthogonal

    @property
    def sigma(self) -> tuple[tuple[float, ...], ...]:
        """Singular values of every ``ΔW_i``, scaling included, descending."""
        padded = self.batch.sigma[self.row].tolist()
        return tuple(tuple(values[:r]) for values, r in zip(padded, self.ranks, strict=True))

    @property
    def values(self) -> Tensor:
        """Eigenvalues, descending by real part."""
        values = self.batch.values[self.row, : self._length]
        return values if values.is_complex() and bool(values.imag.any()) else values.real

    @property
    def real_values(self) -> list[float]:
        """The real parts of :attr:`values`."""
        numbers: list[float] = self.batch.values.numpy()[self.row, : self._length].real.tolist()
        return numbers

    @property
    def _length(self) -> int:
        return self.kept[0] if self.batch.basis.shape[1] == 1 else sum(self.kept)

    @property
    def basis(self) -> tuple[Tensor | None, ...]:
        """``[r_j, count]``, None where zero."""
        padded = self.batch.basis[self.row]
        return tuple(padded[j, :r, : self.count] if j < len(padded) else None for j, r in enumerate(self.ranks))

    @property
    def H(self) -> tuple[Tensor, ...]:
        """``[count, r_i]``; none where nothing is shared."""
        padded = self.batch.H[self.row]
        return tuple(padded[i, : self.count, :r] for i, r in enumerate(self.ranks)) if self.count else ()

    @property
    def weights(self) -> tuple[float, ...]:
        """ω_i of MATH (10); zeros where nothing is shared."""
        total = sum(self.shared_norms)
        return tuple(s / total if total > 0 else 0.0 for s in self.shared_norms)

    def unique_noise(self, i: int, update: Update) -> Noise:
        """That of the unique part of adapter ``i``, from its ``update``: what was taken from it is known to the
        rounding of the whole."""
        if not self.count:
            return update.noise
        largest = float(self.batch.sigma[self.row, i, 0])
        return joint_noise([update.noise, Noise(self.rtol * largest, largest)])


def shared_directions(blocks: ChainBlocks, settings: Settings) -> list[ModuleResult]:
    """Chain and threshold for every module of the blocks, then MATH (7)–(10) in coefficients."""
    chain = settings.run(blocks)
    if any(chain.info.tolist()):
        require_finite_blocks(blocks, settings.side)
        raise_for_info(blocks.modules, chain.info)
    movers = settings.movers(len(blocks.group.members))
    if settings.is_plain and not any(chain.shared.tolist()):  # as mostly in adapters of different tasks
        return unshared_results(blocks, chain, movers)
    scalings = _scalings(blocks)
    scaling = torch.from_numpy(scalings).to(blocks.projected.device)
    taken = settings.taken(blocks, chain)
    if taken is None:
        shares = coefficients.shares(blocks.projected, blocks.other, chain.basis, scaling, movers)
        return module_results(blocks, chain, movers, *shares, scalings)
    chain = chain._replace(shared=(taken > 0.0).sum(1), basis=chain.basis * (taken > 0.0)[:, None, None])
    H, norms, inside = coefficients.shares(blocks.projected, blocks.other, chain.basis, scaling, movers)
    soft = taken[:, None, :, None] * H
    shared, rest = (coefficients.lengths(x, blocks.other, scaling) for x in (soft, H - soft))
    unique = (norms.square() - inside.square()).clamp(min=0.0) + rest.square()
    results = module_results(blocks, chain, movers, soft, norms, shared)
    for result, fractions, left in zip(results, taken.tolist(), unique.sqrt().tolist(), strict=True):
        result.taken, result.unique_norms = tuple(fractions[: result.count]), tuple(left)
    return results


def unshared_results(blocks: ChainBlocks, chain: ops.Chain, movers: int) -> list[ModuleResult]:
    """:func:`module_results` where no module shares anything: nothing is left to compute but the norms."""
    scalings = _scalings(blocks)
    g, k = scalings.shape
    if blocks.projected.is_cpu:  # small steps take NumPy a third of torch's time; the sums are torch's, to the last bit
        with np.errstate(all="ignore"):
            diagonal = blocks.projected.numpy().diagonal(axis1=1, axis2=2).transpose(0, 3, 1, 2)
            squares = torch.from_numpy(diagonal * blocks.other.numpy()).sum((-1, -2)).numpy()
            norms = torch.from_numpy(np.sqrt(np.maximum(squares, 0.0)) * np.abs(scalings))
    else:
        scaling = torch.from_numpy(scalings).to(blocks.projected.device)
        norms = coefficients.whole_lengths(blocks.projected, blocks.other, scaling)
    nothing = torch.from_numpy(np.zeros((g, k)))
    return module_results(blocks, chain, movers, nothing[:, :, None, None], norms, nothing, scalings)


def _scalings(blocks: ChainBlocks) -> Scalings:
    """The ``s_i``: ``[g, k]``."""
    return np.array([[u.scaling for u in row] for row in blocks.updates], dtype=np.float64)


def module_results(
    blocks: ChainBlocks,
    chain: ops.Chain,
    movers: int,
    H: Tensor,
    norms: Tensor,
    shared: Tensor,
    scalings: Scalings | None = None,
) -> list[ModuleResult]:
    """The results of a chain, from ``H_i [g, k, w, r]`` and the norms of the updates and their shared parts
    ``[g, k]``. ``scalings``: the ``s_i``, where they are known."""
    # Small steps take NumPy a third of torch's time.
    scalings = _scalings(blocks) if scalings is None else scalings
    with np.errstate(all="ignore"):
        sigma = chain.sigma.cpu().numpy() * np.abs(scalings)[..., None]
    check_size(blocks.names, blocks.modules, sigma)
    values = chain.values.cpu()
    numbers = values.numpy()
    if not numbers.imag.any():
        values = torch.from_numpy(numbers.real.copy())
    # Plain numbers in bulk: taking them out of tensors one by one would cost more than all of the above.
    counts, kept, all_norms, shared_norms = (x.tolist() for x in (chain.shared, chain.kept, norms, shared))
    most = max(counts, default=0)
    if most:
        basis, H = _beside_factors(chain.basis[:, :movers, :, :most]), _beside_factors(H[:, :, :most])
    else:
        g, k, r = sigma.shape
        basis, H = (torch.from_numpy(np.empty(shape)) for shape in ((g, movers, r, 0), (g, k, 0, r)))
        if not chain.basis.is_cpu and streaming() is None:
            basis, H = basis.to(chain.basis.device), H.to(chain.basis.device)
    batch = ResultBatch(sigma, values, basis, H)
    ranks, rtol = blocks.group.ranks, blocks.group.rtol
    each = zip(blocks.modules, blocks.updates, blocks.names, kept, counts, all_norms, shared_norms, strict=True)
    return [
        ModuleResult(
            module, own[0].shape, names, ranks, tuple(dims), count, tuple(norms), tuple(lengths), rtol, batch, row
        )
        for row, (module, own, names, dims, count, norms, lengths) in enumerate(each)
    ]


def _beside_factors(small: Tensor) -> Tensor:
    """A copy of a coefficient where the factors are that it belongs to: those that are streamed are on the host."""
    return small.clone() if streaming() is None else small.cpu().clone()
