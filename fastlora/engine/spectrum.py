"""Singular forms of updates from their Gram blocks, and where to cut them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastlora import ops
from fastlora.core.factors import Factor, Term
from fastlora.core.updates import Update, exact_rtol
from fastlora.engine import shares
from fastlora.engine.blocks import ChainBlocks
from fastlora.engine.chain import ChainCuts, chain_of, read_chain
from fastlora.engine.checks import check_size, raise_for_info
from fastlora.engine.schedule import GroupPart, one_adapter, parts, rtol_or_default
from fastlora.engine.stream import current
from fastlora.errors import InputError
from fastlora.reference.chain import ARITHMETIC, arithmetic_noise

# Directions up to this times the noise of the arithmetic may be lost; and the share of Σσ² from which on it counts.
LARGEST_NOISE, UNKNOWN = 4.0, 1e-9
EPSILON = float(np.finfo(np.float64).eps)

Numbers = npt.NDArray[np.float64]
Found = TypeVar("Found")

MATRICES = 6  # r×r of a module that are in memory: two Gram blocks, and what is made of them


@dataclass(slots=True, eq=False)
class SingularForm:
    """``ΔW = s·(B T) Σ (…)`` of one module: ``U = B T [n, kept]`` orthonormal.

    ``sigma``: all singular values of ``ΔW``, scaling included, descending, as many as the factors' rank.
    ``T [r, kept]`` and ``D [kept, r]``: ``B' = B T``, ``A' = D A`` is the cut update (scaling not included).
    """

    sigma: Tensor
    T: Tensor
    D: Tensor
    kept: int
    norm: float
    """``‖ΔW‖_F``."""
    retained: float
    """``Σσ²`` of the kept directions over that of all; 1 for a zero update."""


_EMPTY = torch.zeros(0, 0, dtype=torch.float64)
_ZERO = SingularForm(_EMPTY.flatten(), _EMPTY, _EMPTY, 0, 0.0, 1.0)
"""That of an update of rank zero."""


def singular_forms(
    name: str,
    updates: Mapping[str, Update],
    *,
    rank: int | None = None,
    energy: float | None = None,
    exact: bool = False,
) -> dict[str, SingularForm]:
    """The singular value form of every module of an adapter, cut by noise floor, rank or energy.

    ``exact``: stored numbers are exact, and only what is rounding of the arithmetic is cut, as best approximations need
    it. Else directions below the rounding of the stored dtype are not significant and are cut too. Modules of one rank
    are computed together; costs one read of the factors (none of what the Gram cache in use has) and about 20·r³
    operations a module.
    """

    def forms_of(part: GroupPart) -> Iterator[SingularForm]:
        cuts = _read_cuts(part, rank, energy, exact)
        return itertools.repeat(_ZERO, len(part.modules)) if cuts is None else cuts.forms()

    return _of_parts(f"singular values of {name}", name, updates, exact, forms_of)


class CutUpdate(NamedTuple):
    """What an update is cut to, its ``‖ΔW‖_F`` before, and the share of its ``Σσ²`` that is kept."""

    update: Update
    norm: float
    retained: float


def cut_updates(
    name: str, updates: Mapping[str, Update], *, rank: int | None, energy: float | None
) -> dict[str, CutUpdate]:
    """The best approximations of the updates of an adapter: :func:`cut` by their exact :func:`singular_forms`.

    Where the modules of one rank are alike, their coefficients are cut out of those of all at once.
    """

    def cut_part(part: GroupPart) -> Iterable[CutUpdate]:
        cuts = _read_cuts(part, rank, energy, exact=True)
        own = [updates[m] for m in part.modules]
        if cuts is None:
            return [CutUpdate(cut(u, _ZERO), _ZERO.norm, _ZERO.retained) for u in own]
        return map(CutUpdate, _cut_alike(own, cuts) or map(cut, own, cuts.forms()), cuts.norms, cuts.retained)

    return _of_parts(f"singular values of {name}", name, updates, True, cut_part)


def _of_parts(
    label: str, name: str, updates: Mapping[str, Update], exact: bool, of_part: Callable[[GroupPart], Iterable[Found]]
) -> dict[str, Found]:
    """What is found of every module of an adapter, by parts of modules of one rank."""
    pool = one_adapter(name, updates)
    stream = current()
    exact_of = functools.partial(_exact_rtol, on_gpu=stream is not None)
    rtol_of = exact_of if exact else rtol_or_default(None)

    def work() -> dict[str, Found]:
        found: dict[str, Found] = {}
        for part in parts(pool, label, rtol_of=rtol_of, matrices=MATRICES, stream=stream, shared=True):
            found |= zip(part.modules, of_part(part), strict=True)
        return found

    found = shares.each(label, work, pool.adapters)
    return {m: found[m] for m in updates}


def _exact_rtol(update: Update, *, on_gpu: bool) -> float:
    return exact_rtol((update,), on_gpu=on_gpu)


@dataclass(frozen=True, slots=True, eq=False)
class Cuts:
    """Where some modules of one rank are cut: what :class:`SingularForm` has of each, side by side.

    ``T [g, r, q]`` and ``D [g, q, r]`` of the largest ``q`` that is kept; the first ``counts[g]`` columns and rows
    belong to a module.
    """

    sigma: Tensor
    T: Tensor
    D: Tensor
    counts: list[int]
    norms: list[float]
    retained: list[float]

    def forms(self) -> Iterator[SingularForm]:
        """That of every module."""
        rows = zip(
            self.sigma.unbind(), self.T.unbind(), self.D.unbind(), self.counts, self.norms, self.retained, strict=True
        )
        most = self.T.shape[2]
        for sigma, T, D, count, norm, retained in rows:
            if count < most:
                T, D = T[:, :count], D[:count]
            yield SingularForm(sigma, T, D, count, norm, retained)


def _read_cuts(part: GroupPart, rank: int | None, energy: float | None, exact: bool) -> Cuts | None:
    """The cuts of some modules of one rank, through the Gram cache in use; ``None``: that rank is zero."""
    if part.group.ranks == (0,):
        return None
    return _cuts(*read_chain(part, "left", "chain", _whitening(part.group.rtol, rank, energy), exact=exact))


def cuts_of(blocks: ChainBlocks, rtol: float, rank: int | None, energy: float | None) -> Cuts:
    """The cuts of updates, one a module, from their blocks ``[g, 1, 1, r, r]`` and ``[g, 1, r, r]``."""
    return _cuts(blocks, chain_of(blocks, _whitening(rtol, rank, energy)))


def _whitening(rtol: float, rank: int | None, energy: float | None) -> ChainCuts:
    """Of a chain of one update each."""
    return 0.0, "product", rtol, rank or 0, 1.0 if energy is None else energy


def _cuts(blocks: ChainBlocks, chain: ops.Chain) -> Cuts:
    modules = blocks.modules
    raise_for_info(modules, chain.info)
    counts = chain.kept[:, 0].tolist()
    most = max(counts)
    T = chain.basis[:, 0, :, :most]  # [g, r, most]
    D = _products(T.mT, blocks.projected[:, 0, 0])  # [g, most, r]
    # Small numbers of the host from here on, in NumPy, whose calls take a third of the time of torch's.
    scalings = np.array([abs(update.scaling) for (update,) in blocks.updates])
    sigma = chain.sigma.cpu().numpy()[:, 0] * scalings[:, None]
    check_size(blocks.names, modules, sigma[:, None])
    energies = np.zeros((len(modules), sigma.shape[1] + 1))
    np.cumsum(np.square(sigma), axis=1, out=energies[:, 1:])
    # Plain numbers in bulk: taking them out of arrays one by one would cost more than all of the above.
    totals = wholes = energies[:, -1].tolist()
    unknown = _unknown(blocks, sigma, energies, scalings)
    if unknown is not None:
        wholes = (energies[:, -1] + unknown).tolist()
    kept_energies = [row[count] for row, count in zip(energies.tolist(), counts, strict=True)]
    retained = [kept / whole if whole > 0 else 1.0 for kept, whole in zip(kept_energies, wholes, strict=True)]
    return Cuts(torch.from_numpy(sigma), T, D, counts, [math.sqrt(total) for total in totals], retained)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of small matrices; on the host in NumPy, which asks no second thread for them."""
    if left.is_cpu:
        return torch.from_numpy(np.matmul(left.numpy(), right.numpy()))
    return torch.bmm(left, right)


def _unknown(blocks: ChainBlocks, sigma: Numbers, energies: Numbers, scalings: Numbers) -> Numbers | None:
    """The ``Σσ²`` that directions may have which the arithmetic cannot tell from zero: ``[g]``, or ``None`` of ordinary
    factors.

    First a bound of :func:`arithmetic_noise` that costs less, ``½ r √ε Σ_j ‖b_j‖ ‖a_j‖``: it is enough where all
    ``σ`` are above.
    """
    g, r = sigma.shape
    squares_G, squares_A = (x.cpu().numpy().reshape(g, r * r)[:, :: r + 1] for x in (blocks.projected, blocks.other))
    lengths = np.sqrt(np.maximum(squares_G * squares_A, 0.0)).sum(1)
    if (sigma.min(1) > LARGEST_NOISE * ARITHMETIC * r * EPSILON**0.5 * lengths * scalings).all():
        return None
    noise = LARGEST_NOISE * arithmetic_noise(blocks.projected[:, 0, 0], blocks.other[:, 0]).cpu().numpy() * scalings
    unknown = np.square(noise) * (sigma <= noise[:, None]).sum(1)
    return np.where(unknown > UNKNOWN * energies[:, -1], unknown, 0.0)


def cut(update: Update, form: SingularForm) -> Update:
    """``B' = B T = U``, ``A' = D A = Σ Vᵀ`` (scaling kept apart)."""
    return Update(update.B.times(form.T), update.A.applied(form.D), update.scaling, update.layout, update.noise)


def _cut_alike(updates: Sequence[Update], cuts: Cuts) -> list[Update] | None:
    """:func:`cut` of updates whose factors on the host are stored matrices side by side, of the same widths in all, and
    are cut to one rank; ``None`` for others."""
    most, widths = cuts.T.shape[2], [t.source.shape[1] for t in updates[0].B.terms]
    have_rows = cuts.T.stride(2) == 1 and cuts.D.stride(2) == 1
    if min(cuts.counts) < most or not cuts.T.is_cpu or not have_rows or sum(widths) != updates[0].rank:
        return None
    starts = [end - width for end, width in zip(itertools.accumulate(widths), widths, strict=True)]
    left = zip(*[T.unbind() for T in torch.split_with_sizes(cuts.T, widths, 1)], strict=True)
    right = zip(*[D.unbind() for D in torch.split_with_sizes(cuts.D, widths, 2)], strict=True)
    results = []
    for update, own_left, own_right in zip(updates, left, right, strict=True):
        B, A = update.B, update.A
        if len(B.terms) != len(widths) or len(A.terms) != len(widths):
            return None
        B_terms, A_terms = [], []
        for at, width, b, a, T, D in zip(starts, widths, B.terms, A.terms, own_left, own_right, strict=True):
            x, y = b.source, a.source
            if b.coefficient is not None or a.coefficient is not None or not (x.is_cpu and y.is_cpu):
                return None
            if b.at != at or a.at != at or x.shape[1] != width or y.shape[0] != width:
                return None
            B_terms.append(Term(x, T, 0, b.scale))
            A_terms.append(Term(y, D, 0, a.scale))
        cut_B = Factor.of_terms("B", B.length, most, tuple(B_terms))
        cut_A = Factor.of_terms("A", A.length, most, tuple(A_terms))
        results.append(Update(cut_B, cut_A, update.scaling, update.layout, update.noise))
    return results


def check_cut(rank: int | None, energy: float | None) -> None:
    """Raises unless there is one cut, with a meaning."""
    if rank is None and energy is None:
        raise InputError("compress: give rank=N or energy=X (the share of Σσ² to keep, above 0 and at most 1)")
    if rank is not None and energy is not None:
        raise InputError("compress: give a rank or a share of the energy, not both")
    if rank is not None and rank < 1:
        raise InputError(f"compress: rank={rank} must be at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise InputError(f"compress: energy={energy} must be above 0 and at most 1")
