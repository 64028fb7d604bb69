"""Singular forms of updates from their Gram blocks, and where to cut them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastlora import ops
from fastlora.core.updates import Update, exact_rtol
from fastlora.engine import shares
from fastlora.engine.blocks import ChainBlocks, read_chain_blocks
from fastlora.engine.checks import check_size, raise_for_info
from fastlora.engine.schedule import GroupPart, one_adapter, parts, rtol_or_default
from fastlora.engine.stream import current
from fastlora.errors import InputError
from fastlora.reference.chain import ARITHMETIC, arithmetic_noise

# Directions up to this times the noise of the arithmetic may be lost; and the share of Σσ² from which on it counts.
LARGEST_NOISE, UNKNOWN = 4.0, 1e-9
EPSILON = float(np.finfo(np.float64).eps)

Numbers = npt.NDArray[np.float64]

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
    pool = one_adapter(name, updates)
    label = f"singular values of {name}"
    stream = current()
    exact_of = functools.partial(_exact_rtol, on_gpu=stream is not None)
    rtol_of = exact_of if exact else rtol_or_default(None)

    def work() -> dict[str, SingularForm]:
        forms: dict[str, SingularForm] = {}
        for part in parts(pool, label, rtol_of=rtol_of, matrices=MATRICES, stream=stream, shared=True):
            if part.group.ranks == (0,):
                empty = torch.zeros(0, dtype=torch.float64)
                zero = SingularForm(empty, empty.reshape(0, 0), empty.reshape(0, 0), 0, 0.0, 1.0)
                forms |= dict.fromkeys(part.modules, zero)
            else:
                forms |= _read_forms(part, rank, energy, exact)
        return forms

    forms = shares.each(label, work, pool.adapters)
    return {m: forms[m] for m in updates}


def _exact_rtol(update: Update, *, on_gpu: bool) -> float:
    return exact_rtol([update], on_gpu=on_gpu)


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


def _read_forms(part: GroupPart, rank: int | None, energy: float | None, exact: bool) -> dict[str, SingularForm]:
    """The forms of some modules of one rank, through the Gram cache in use."""
    cuts = cuts_of(read_chain_blocks(part, "left", "chain", exact=exact), part.group.rtol, rank, energy)
    return dict(zip(part.modules, cuts.forms(), strict=True))


def cuts_of(blocks: ChainBlocks, rtol: float, rank: int | None, energy: float | None) -> Cuts:
    """The cuts of updates, one a module, from their blocks ``[g, 1, 1, r, r]`` and ``[g, 1, r, r]``."""
    modules = blocks.modules
    chain = ops.chain(
        blocks.projected,
        blocks.other,
        threshold=0.0,
        rtol=rtol,
        rank=rank or 0,
        energy=1.0 if energy is None else energy,
        floor=blocks.floor,
    )
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
    totals, wholes = energies[:, -1].tolist(), (energies[:, -1] + _unknown(blocks, sigma, energies, scalings)).tolist()
    kept_energies = energies[np.arange(len(modules)), counts].tolist()
    retained = [kept / whole if whole > 0 else 1.0 for kept, whole in zip(kept_energies, wholes, strict=True)]
    return Cuts(torch.from_numpy(sigma), T, D, counts, [math.sqrt(total) for total in totals], retained)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of small matrices; on the host in NumPy, which asks no second thread for them."""
    if left.is_cpu:
        return torch.from_numpy(np.matmul(left.numpy(), right.numpy()))
    return torch.bmm(left, right)


def _unknown(blocks: ChainBlocks, sigma: Numbers, energies: Numbers, scalings: Numbers) -> Numbers:
    """The ``Σσ²`` that directions may have which the arithmetic cannot tell from zero; 0 of ordinary factors: ``[g]``.

    First a bound of :func:`arithmetic_noise` that costs less, ``½ r √ε Σ_j ‖b_j‖ ‖a_j‖``: it is enough where all
    ``σ`` are above.
    """
    squares_G = blocks.projected.diagonal(dim1=3, dim2=4).cpu().numpy()[:, 0, 0]
    squares_A = blocks.other.diagonal(dim1=2, dim2=3).cpu().numpy()[:, 0]
    lengths = np.sqrt(np.maximum(squares_G * squares_A, 0.0)).sum(1)
    bound = LARGEST_NOISE * ARITHMETIC * sigma.shape[1] * EPSILON**0.5 * lengths * scalings
    if (sigma.min(1) > bound).all():
        return np.zeros(len(sigma))
    noise = LARGEST_NOISE * arithmetic_noise(blocks.projected[:, 0, 0], blocks.other[:, 0]).cpu().numpy() * scalings
    unknown = np.square(noise) * (sigma <= noise[:, None]).sum(1)
    return np.where(unknown > UNKNOWN * energies[:, -1], unknown, 0.0)


def cut(update: Update, form: SingularForm) -> Update:
    """``B' = B T = U``, ``A' = D A = Σ Vᵀ`` (scaling kept apart)."""
    return Update(update.B.times(form.T), update.A.applied(form.D), update.scaling, update.layout, update.noise)


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
