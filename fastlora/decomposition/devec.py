"""DeVec: shared and unique components of a pool (arXiv 2512.22511), MATH section 3.

Everything is computed on Gram blocks and kept as coefficients of the loaded factors; results are adapters whose tall
factors are formed when they are saved or looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlora import ops
from fastlora.analysis.chance import chance_edge
from fastlora.core.updates import NO_NOISE, Noise, Update, joint_noise
from fastlora.decomposition.weighted_chain import weighted_chain
from fastlora.engine.blocks import ChainBlocks, read_chain_blocks
from fastlora.engine.chain import ChainCuts, chain_of, read_chain
from fastlora.engine.checks import check_size, raise_for_info
from fastlora.engine.schedule import GroupPart
from fastlora.engine.stream import current as streaming
from fastlora.reference import coefficients
from fastlora.runtime import ranks
from fastlora.runtime.memory import is_bounded

Table = np.ndarray[tuple[int, int], np.dtype[np.float64]]
"""Float64 ``[g, k]``: a number of every update."""

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

    def cuts(self, rtol: float) -> ChainCuts:
        """What the op ``chain`` takes of them; ``rtol``: of a group."""
        threshold = 0.0 if isinstance(self.threshold, str) else self.threshold
        return threshold, self.chain, rtol, self.rank or 0, 1.0 if self.energy is None else self.energy

    def run(self, blocks: ChainBlocks) -> ops.Chain:
        """The chain of these settings on Gram blocks."""
        cuts = self.cuts(blocks.group.rtol)
        if not self.is_plain:
            threshold, kind, _, rank, energy = cuts
            return weighted_chain(blocks, kind, threshold, self.rho or 0.0, (rank, energy))
        return chain_of(blocks, cuts)

    def read(self, part: GroupPart) -> tuple[ChainBlocks, ops.Chain]:
        """The Gram blocks of a part and their chain."""
        if self.is_plain:
            return read_chain(part, self.side, self.blocks_kind, self.cuts(part.group.rtol))
        blocks = read_chain_blocks(part, self.side, self.blocks_kind)
        return blocks, self.run(blocks)


LATER_BYTES = 2 * 2**20
"""Of Gram blocks that a batch of results may hold."""


class LaterNorms:
    """``‖ΔW_i‖`` of a batch of modules that share nothing, from its Gram blocks when somebody asks, as reports do."""

    __slots__ = ("_blocks", "_values")

    def __init__(self, projected: Tensor, other: Tensor, scalings: Table) -> None:
        self._blocks: tuple[Tensor, Tensor, Table] | None = (projected, other, scalings)
        self._values: list[list[float]] = []

    def values(self) -> list[list[float]]:
        """``[modules][adapters]``; the blocks are given up when they are known."""
        blocks = self._blocks
        if blocks is not None:
            self._values = _norms_alone(*blocks).tolist()
            self._blocks = None
        return self._values


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
    norms: list[list[float]] | LaterNorms

    def bases(self, rows: Sequence[int]) -> Sequence[Tensor]:
        """``basis_j [r, c]`` for some rows and every mover ``j``, one row after the other."""
        return self._chosen(self.basis, rows).flatten(0, 1).unbind()

    def removals(self, rows: Sequence[int], i: int) -> Sequence[Tensor]:
        """``-basis_j H_i [r, r]`` for some rows and every mover ``j``, one row after the other: what the unique part of
        ``i`` adds on ``X_j``."""
        products = -self._chosen(self.basis, rows) @ self._chosen(self.H[:, i], rows)[:, None]
        return products.flatten(0, 1).unbind()

    def weighted(
        self, rows: Sequence[int], members: Sequence[int], weights: Sequence[Sequence[float]]
    ) -> Sequence[Tensor]:
        """``w_i H_i [c, r]`` for some rows, with weights ``[rows][members]``, one row after the other."""
        H = self._chosen(self.H, rows)
        H = H if len(members) == H.shape[1] else H[:, members]
        factors = torch.from_numpy(np.array(weights, dtype=np.float64)).to(H.device)
        return (H * factors[:, :, None, None]).flatten(0, 1).unbind()

    def _chosen(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        """Some rows; nothing is copied where all are wanted, as when every module shares something."""
        return values if list(rows) == list(range(len(values))) else values[rows]


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
    shared_norms: tuple[float, ...]  # ‖ΔW_i^shared‖, MATH (9)
    rtol: float
    batch: ResultBatch
    row: int  # of the batch
    taken: tuple[float, ...] | None = None  # of every shared direction, where not all of it
    unique_norms: tuple[float, ...] | None = None  # ‖ΔW_i^unique‖, where the parts are not orthogonal

    @property
    def norms(self) -> tuple[float, ...]:
        """``‖ΔW_i‖``."""
        norms = self.batch.norms
        return tuple((norms if isinstance(norms, list) else norms.values())[self.row])

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
        return tuple([s / total if total > 0 else 0.0 for s in self.shared_norms])

    def unique_noise(self, i: int, update: Update) -> Noise:
        """That of the unique part of adapter ``i``, from its ``update``."""
        return unique_noise(update, self.rtol, float(self.batch.sigma[self.row, i, 0])) if self.count else update.noise


def unique_noise(update: Update, rtol: float, largest: float) -> Noise:
    """That of the unique part of an update whose largest singular value is ``largest``: what was taken from it is known
    to the rounding of the whole."""
    own = Noise(rtol * largest, largest)
    return own if update.noise is NO_NOISE else joint_noise([update.noise, own])


def shared_directions(blocks: ChainBlocks, settings: Settings, chain: ops.Chain | None = None) -> list[ModuleResult]:
    """Chain and threshold for every module of the blocks, then MATH (7)–(10) in coefficients. ``chain``: of the blocks,
    where there is one."""
    chain = settings.run(blocks) if chain is None else chain
    raise_for_info(blocks.modules, chain.info)
    movers = settings.movers(len(blocks.group.members))
    taken = settings.taken(blocks, chain)
    if taken is None:
        scalings = _scalings(blocks)
        nothing = settings.is_plain and not any(chain.shared.tolist())  # as mostly in adapters of different tasks
        H, norms, shared = _shares(blocks, chain, 0 if nothing else movers, scalings)
        return module_results(blocks, chain, movers, H, norms, shared, scalings)
    chain = chain._replace(shared=(taken > 0.0).sum(1), basis=chain.basis * (taken > 0.0)[:, None, None])
    scaling = torch.from_numpy(_scalings(blocks)).to(blocks.projected.device)
    H, norms, inside = coefficients.shares(blocks.projected, blocks.other, chain.basis, scaling, movers)
    soft = taken[:, None, :, None] * H
    shared, rest = (coefficients.lengths(x, blocks.other, scaling) for x in (soft, H - soft))
    unique = (norms.square() - inside.square()).clamp(min=0.0) + rest.square()
    results = module_results(blocks, chain, movers, soft, norms, shared)
    for result, fractions, left in zip(results, taken.tolist(), unique.sqrt().tolist(), strict=True):
        result.taken, result.unique_norms = tuple(fractions[: result.count]), tuple(left)
    return results


def _shares(
    blocks: ChainBlocks, chain: ops.Chain, movers: int, scalings: Table
) -> tuple[Tensor | None, Tensor | Table | LaterNorms, Tensor | Table]:
    """:func:`coefficients.shares`; without ``H`` where there are no movers, since nothing is shared.

    On the host in NumPy, where small steps take a third of torch's time. What is summed is torch's, to the last bit.
    """
    projected, other = blocks.projected, blocks.other
    H = coefficients.directions(projected, chain.basis, movers) if movers else None
    if not projected.is_cpu:
        scaling = torch.from_numpy(scalings).to(projected.device)
        norms = coefficients.whole_lengths(projected, other, scaling)
        return H, norms, torch.zeros_like(norms) if H is None else coefficients.lengths(H, other, scaling)
    if H is None:
        alone = ranks.current() is None and not is_bounded()
        later = alone and projected.nbytes + other.nbytes <= LATER_BYTES
        make = LaterNorms if later else _norms_alone
        return H, make(projected, other, scalings), np.zeros(scalings.shape)
    with np.errstate(all="ignore"):
        sizes, squares = np.abs(scalings), _sums(_diagonal(projected) * other.numpy())
        # Torch's roots, whose last bit may be another than NumPy's: coefficients are made of the second ones.
        inside = _sums((H.mT @ H).numpy() * other.numpy())
        return H, squares.sqrt_().numpy() * sizes, inside.sqrt_().numpy() * sizes


def _norms_alone(projected: Tensor, other: Tensor, scalings: Table) -> Table:
    """``‖ΔW_i‖`` on the host where nothing is shared: no coefficient is made of them."""
    with np.errstate(all="ignore"):
        norms: Table = np.sqrt(_sums(_diagonal(projected) * other.numpy()).numpy()) * np.abs(scalings)
    return norms


def _diagonal(projected: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The blocks of every factor with itself: a view ``[g, k, r, r]``."""
    g, k, _, r, _ = projected.shape
    return projected.numpy().reshape(g, k * k, r, r)[:, :: k + 1]


def _sums(products: np.ndarray[Any, np.dtype[np.float64]]) -> Tensor:
    """Of every two Gram blocks ``[g, k, r, r]`` the sum of their products, at least 0."""
    return torch.from_numpy(products).sum((-1, -2)).clamp_(min=0)


def _scalings(blocks: ChainBlocks) -> Table:
    """The ``s_i``: ``[g, k]``."""
    return np.array([[u.scaling for u in row] for row in blocks.updates], dtype=np.float64)


def module_results(
    blocks: ChainBlocks,
    chain: ops.Chain,
    movers: int,
    H: Tensor | None,
    norms: Tensor | Table | LaterNorms,
    shared: Tensor | Table,
    scalings: Table | None = None,
) -> list[ModuleResult]:
    """The results of a chain, from ``H_i [g, k, w, r]`` (``None`` where nothing is shared) and the norms of the updates
    and their shared parts ``[g, k]``. ``scalings``: the ``s_i``, where they are known."""
    scalings = _scalings(blocks) if scalings is None else scalings
    with np.errstate(all="ignore"):
        sigma = chain.sigma.cpu().numpy() * np.abs(scalings)[..., None]
    check_size(blocks.names, blocks.modules, sigma)
    values = chain.values.cpu()
    numbers = values.numpy()
    if not numbers.imag.any():
        values = torch.from_numpy(numbers.real.copy())
    # Plain numbers in bulk: taking them out of tensors one by one would cost more than all of the above.
    counts, kept, shared_norms = (x.tolist() for x in (chain.shared, chain.kept, shared))
    most = max(counts, default=0)
    if most and H is not None:
        basis, H = _beside_factors(chain.basis[:, :movers, :, :most]), _beside_factors(H[:, :, :most])
    else:
        g, k, r = sigma.shape
        basis, H = (torch.from_numpy(np.empty(shape)) for shape in ((g, movers, r, 0), (g, k, 0, r)))
        if not chain.basis.is_cpu and streaming() is None:
            basis, H = basis.to(chain.basis.device), H.to(chain.basis.device)
    batch = ResultBatch(sigma, values, basis, H, norms if isinstance(norms, LaterNorms) else norms.tolist())
    widths, rtol = blocks.group.ranks, blocks.group.rtol
    each = zip(blocks.modules, blocks.updates, blocks.names, kept, counts, shared_norms, strict=True)
    return [
        ModuleResult(module, own[0].shape, names, widths, tuple(dims), count, tuple(lengths), rtol, batch, row)
        for row, (module, own, names, dims, count, lengths) in enumerate(each)
    ]


def _beside_factors(small: Tensor) -> Tensor:
    """A copy of a coefficient where the factors are that it belongs to: those that are streamed are on the host."""
    if small.is_cpu:
        return torch.from_numpy(small.numpy().copy())
    return small.clone() if streaming() is None else small.cpu().clone()
