"""The singular value form of updates in factor space, MATH (3): what ranks, norms, cuts and overlaps come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora import ops
from fastlora.adapter import Factor, Side, Update
from fastlora.engine import WIDTHS, check_diagonal, chunks
from fastlora.errors import InputError, NonFiniteError
from fastlora.gramblocks import GramPass
from fastlora.progress import track

# The least relative size of a singular value that is a direction and not rounding; MATH section 2.
MIN_RTOL = 1e-6

EPSILON = {dtype: torch.finfo(dtype).eps for dtype in WIDTHS}

LARGEST = 1e150
"""Of singular values: sums of a few squares stay finite."""


def default_rtol(updates: Sequence[Update]) -> float:
    """The relative rounding of the coarsest dtype among the stored factors, 1e-6 at the least.

    Rounding a factor with relative error ε moves singular values by at most about ε·σ_max, whatever its size, so what
    lies below is not known from the file: float32 1e-6, float16 9.8e-4, bfloat16 7.8e-3.
    """
    return max([MIN_RTOL, *[EPSILON[t.source.dtype] for u in updates for f in (u.B, u.A) for t in f.terms]])


def sides(side: str) -> tuple[Side, Side]:
    """(projected factor, other factor) of a decomposition side."""
    if side == "left":
        return "B", "A"
    if side == "right":
        return "A", "B"
    raise InputError(f"side={side!r} does not exist: use 'left' (column spaces, the paper) or 'right' (row spaces)")


def factor(update: Update, side: Side) -> Factor:
    return update.B if side == "B" else update.A


def unscaled_floor(update: Update) -> float:
    """The noise floor in units of the singular values of ``BA``; above all of them for a scaling of 0."""
    return update.floor / abs(update.scaling) if update.scaling else math.inf


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
    rtol: float | None = None,
) -> dict[str, SingularForm]:
    """The singular value form of every module of an adapter, cut by noise floor, rank or energy.

    Modules of one rank are computed together; costs one read of the factors and about 20·r³ operations a module.
    """
    forms: dict[str, SingularForm] = {}
    groups: dict[tuple[int, float], list[str]] = {}
    for module, update in updates.items():
        groups.setdefault((update.rank, default_rtol([update]) if rtol is None else rtol), []).append(module)
    for (r, cut), members in groups.items():
        if r == 0:
            empty = torch.zeros(0, dtype=torch.float64)
            forms |= {m: SingularForm(empty, empty.reshape(0, 0), empty.reshape(0, 0), 0, 0.0, 1.0) for m in members}
            continue
        for part in track(list(chunks(len(members), 6 * 8 * r * r)), f"singular values of {name}"):
            names = [members[i] for i in part]
            forms |= _one_chunk(name, names, [updates[m] for m in names], r, cut, rank, energy)
    return {m: forms[m] for m in updates}


def _one_chunk(
    name: str, modules: list[str], updates: list[Update], r: int, rtol: float, rank: int | None, energy: float | None
) -> dict[str, SingularForm]:
    grams = GramPass()
    left = grams.blocks([[u.B] for u in updates], r, [(0, 0)])  # [g, 1, 1, r, r]
    right = grams.blocks([[u.A] for u in updates], r, [(0, 0)])
    grams.run()
    check_diagonal([name], modules, left, "B")
    check_diagonal([name], modules, right, "A")
    floor = torch.tensor([[unscaled_floor(u)] for u in updates], dtype=torch.float64).to(left.device)
    chain = ops.chain(
        left,
        right[:, 0],
        threshold=0.0,
        rtol=rtol,
        rank=rank or 0,
        energy=1.0 if energy is None else energy,
        floor=floor,
    )
    raise_for_info(modules, chain.info)
    most = int(chain.kept.max())
    T = chain.basis[:, 0, :, :most].contiguous()  # [g, r, most]
    D = T.mT @ left[:, 0, 0]  # [g, most, r]
    scalings = torch.tensor([abs(u.scaling) for u in updates], dtype=torch.float64)
    kept, sigma = chain.kept.cpu(), chain.sigma[:, 0].cpu() * scalings[:, None]
    check_size([[name]] * len(modules), modules, sigma[:, None])
    energies = torch.nn.functional.pad(sigma.square().cumsum(1), (1, 0))  # [g, r + 1]
    # Plain numbers in bulk: taking them out of tensors one by one would cost more than all of the above.
    counts = kept[:, 0].tolist()
    totals = energies[:, -1].tolist()
    kept_energies = energies.gather(1, kept).flatten().tolist()
    forms = {}
    rows = zip(modules, counts, totals, kept_energies, sigma.unbind(), T.unbind(), D.unbind(), strict=True)
    for module, count, total, part, own_sigma, own_T, own_D in rows:
        if count < most:
            own_T, own_D = own_T[:, :count], own_D[:count]
        retained = part / total if total > 0 else 1.0
        forms[module] = SingularForm(own_sigma, own_T, own_D, count, math.sqrt(total), retained)
    return forms


def check_size(names: Sequence[Sequence[str]], modules: Sequence[str], sigma: Tensor) -> None:
    """Raises for singular values whose squares overflow: ``sigma [len(modules), k, r]``, scaling included, of the
    adapters ``names[module]``."""
    if not sigma.numel() or float(sigma.max()) <= LARGEST:  # not so with NaN, either
        return
    bad = (~(sigma <= LARGEST)).any(-1).nonzero().tolist()
    if bad:
        module, adapter = bad[0]
        size = float(sigma[module, adapter].max())
        raise NonFiniteError(
            f"adapter {names[module][adapter]!r}: its update of {modules[module]} has a singular value of {size:.3g}, "
            "whose square overflows. No weight is that large: correct 'lora_alpha', 'alpha_pattern' or 'r' in its "
            "configuration, or the weight that it is multiplied by"
        )


def raise_for_info(modules: Sequence[str], info: Tensor) -> None:
    """A decomposition that did not converge is an error with the module's name, never a wrong result."""
    bad = info.nonzero().flatten().tolist()
    if bad:
        what = (
            "its Gram matrix is not finite" if int(info[bad[0]]) == 1 else "the eigenvalue iteration did not converge"
        )
        raise InputError(
            f"{modules[bad[0]]}: {what}; check the adapters with `fastlora inspect`, or leave the module out"
        )
