"""Results in a dtype of a narrow range: the size of an update is shared out between its two factors.

``ΔW = (B 2ᵏ)(2⁻ᵏ A)`` for every column of ``B`` and row of ``A``, so nothing but the place of the binary point changes.
A factor whose entries lie well inside the range stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastlora.core.data import LoraData
from fastlora.core.factors import SIDES, Factor
from fastlora.core.updates import Update, factor, sources
from fastlora.engine.combine_jobs import stored_as
from fastlora.engine.gram import GramPass
from fastlora.engine.schedule import GroupPart, parts
from fastlora.engine.stream import PoolPart
from fastlora.runtime.memory import release

Key = TypeVar("Key")

# A dtype with the exponents of float32 holds whatever scales between these leave of a stored matrix.
ORDINARY = 2.0**-40, 2.0**40
# How far inside the range the root mean square of a column has to be: of the smallest normal number's fourfold, most
# entries have all their digits; at 2¹¹ of 2¹⁶, entries may be thirty times as large.
INSIDE = 2.0**2, 2.0**-5
# A column that is smaller than this beside the largest of its module loses its digits to the rounding of that one.
COUNTS = 2.0**-24
# A loss that is told, relative to ΔW: twice the rounding of a float16 number.
TOLD = 2.0**-10
# Places of a long factor that are looked at first, so many side by side. Where they show that next to nothing can be
# lost, the rest is not read.
SAMPLES, SIDE_BY_SIDE = 256, 16


class Range(NamedTuple):
    """Root mean squares of columns whose entries have all their digits in a dtype, and the step below its range."""

    least: float
    most: float
    step: float

    @staticmethod
    def of(dtype: torch.dtype) -> Range:
        """That of a floating-point dtype."""
        info = torch.finfo(dtype)
        return Range(info.tiny * INSIDE[0], info.max * INSIDE[1], info.tiny * info.eps)

    def holds(self, sizes: Tensor) -> Tensor:
        """Whether columns of these root mean squares have all their digits."""
        return (sizes >= self.least) & (sizes <= self.most)

    def holds_update(self, least: Tensor, most: Tensor, other: Tensor) -> Tensor:
        """Whether a factor whose columns have root mean squares between ``least`` and ``most`` keeps all digits that
        count in its update; ``other``: those of the other factor. ``[…, rank]`` each, the answer ``[…]``."""
        sizes = most * other
        counts = (sizes > 0) & (sizes >= COUNTS * sizes.amax(-1, keepdim=True))
        return ((most <= self.most) & ((least >= self.least) | ~counts)).all(-1)

    def error(self, sizes: Tensor) -> Tensor:
        """The relative error of columns that lie below the range: a step is rounded with a mean square of 1/12."""
        below = (sizes > 0) & (sizes < self.least)
        return torch.where(below, (12**-0.5 * self.step / sizes).clamp(max=1.0), 0.0)


@dataclass(frozen=True, slots=True)
class Loss:
    """What a dtype takes from the modules of an adapter although their factors share the size of the update:
    ``share``, the largest relative error of a ``ΔW``, that of ``module``, and how many modules have one to tell."""

    share: float
    module: str
    modules: int

    def told(self, name: str, dtype: torch.dtype) -> str:
        """It in a sentence, for the adapter ``name``."""
        others = f" (one of {self.modules} such modules)" if self.modules > 1 else ""
        return (
            f"{name}: {self.module}{others} is too small for {str(dtype)[6:]}, whose smallest numbers change its ΔW "
            f"by {100 * min(self.share, 1.0):.2g} %; save with dtype=float32 or bfloat16 (--dtype)"
        )


def is_narrow(dtype: torch.dtype, scales: Iterable[float]) -> bool:
    """Whether sums of stored matrices with these scales may leave the range of the dtype."""
    return dtype == torch.float16 or not all(ORDINARY[0] <= abs(scale) <= ORDINARY[1] for scale in scales)


def balanced(
    adapters: Mapping[Key, LoraData], dtypes: Mapping[Key, torch.dtype]
) -> tuple[dict[Key, LoraData], dict[Key, Loss]]:
    """The adapters as they are to be written in these dtypes, and what is lost all the same.

    Where the dtype is float16, a few rows of every factor that has to be computed are looked at. Where these do not
    show that it lies inside the range, the factors of the module are read once. Else it costs nothing, unless a weight
    or a scaling is extreme.
    """
    result, losses = dict(adapters), {}
    for dtype in dict.fromkeys(dtypes.values()):
        modules = {key: _at_risk(a, dtype) for key, a in adapters.items() if dtypes[key] == dtype}
        keys = [key for key, some in modules.items() if some]
        if not keys:
            continue
        found = _of_dtype([{m: adapters[key].updates[m].baked() for m in modules[key]} for key in keys], dtype)
        for key, (updates, loss) in zip(keys, found, strict=True):
            if updates:
                result[key] = replace(adapters[key], updates={**adapters[key].updates, **updates})
            if loss is not None:
                losses[key] = loss
    return result, losses


def _at_risk(adapter: LoraData, dtype: torch.dtype) -> list[str]:
    """The modules with a factor that has to be computed and may leave the range of the dtype."""
    at_risk = [m for m, u in adapter.updates.items() if u.rank and is_narrow(dtype, _scales(u))]
    return [m for m in at_risk if _may_leave_range(adapter.updates[m].baked(), dtype)]


def _scales(update: Update) -> Iterator[float]:
    """Of all terms, the scaling inside ``B``."""
    yield from (t.scale * update.scaling for t in update.B.terms)
    yield from (t.scale for t in update.A.terms)


def _may_leave_range(update: Update, dtype: torch.dtype) -> bool:
    computed = [f for f in (update.B, update.A) if stored_as(f, dtype) is None and not _is_copied(f, dtype)]
    if not is_narrow(dtype, (t.scale for f in computed for t in f.terms)):
        return False
    return bool(computed) and not _surely_inside(update, dtype)


def _is_copied(factor: Factor, dtype: torch.dtype) -> bool:
    """Whether a factor is stored matrices of this dtype side by side, as they are."""
    return all(t.scale == 1.0 and t.source.dtype == dtype for t in factor.joined or ()) and bool(factor.joined)


def _surely_inside(update: Update, dtype: torch.dtype) -> bool:
    """Whether a sample of the factors shows that a quarter of what is told is lost at most.

    The squares in a sample are a part of those in a column, so they bound its root mean square from below.
    """
    limits = Range.of(dtype)
    sampled = [_sampled_squares(f) for f in (update.B, update.A)]
    rms = [sums.div(samples).sqrt() for sums, samples in sampled]
    least = [sums.div(length).sqrt() for (sums, _), length in zip(sampled, update.shape, strict=True)]
    sizes = rms[0] * rms[1]
    if not bool((sizes > 0).all()) or not bool(sizes.isfinite().all()):
        return False
    errors = torch.zeros_like(sizes)
    for factor_of, size, bound in zip((update.B, update.A), rms, least, strict=True):
        if stored_as(factor_of, dtype) is None:
            errors += limits.error(bound)
            if bool((size > limits.most).any()):
                return False
    return float((sizes * errors).norm()) <= TOLD / 4 * float(sizes.norm())


def _sampled_squares(factor: Factor) -> tuple[Tensor, int]:
    """Sums of squares over some rows of ``B``, or columns of ``A``, in float64, ``[rank]``, and how many they are; over
    all of a short factor."""
    axis, length = (0 if factor.side == "B" else 1), factor.length
    chunks = SAMPLES // SIDE_BY_SIDE if length > 2 * SAMPLES else 1
    step = length // chunks
    side = SIDE_BY_SIDE if chunks > 1 else length
    joined = factor.joined
    if joined:  # matrices side by side: each has columns of its own
        sums = [_squares_of_chunks(t.source, axis, chunks, step, side) * t.scale**2 for t in joined]
        return torch.cat(sums).cpu(), chunks * side
    places = ((torch.arange(chunks) * step)[:, None] + torch.arange(side)).flatten()
    return _sample(factor, axis, places).square().sum(0).cpu(), len(places)


def _squares_of_chunks(source: Tensor, axis: int, chunks: int, step: int, side: int) -> Tensor:
    """Sums of squares of a stored matrix over ``side`` rows (axis 0) or columns in each of ``chunks`` places."""
    across, along = source.stride(1 - axis), source.stride(axis)
    shape, strides = (source.shape[1 - axis], chunks, side), (across, step * along, along)
    return source.as_strided(shape, strides, source.storage_offset()).double().square().sum((1, 2))


def _sample(factor: Factor, axis: int, places: Tensor) -> Tensor:
    """The rows of ``B``, or columns of ``A``, at some places, in float64: ``[places, rank]``."""
    sample: Tensor | None = None
    for term in factor.terms:
        own = term.source.index_select(axis, places.to(term.source.device)).double()
        own = term.scale * (own if axis == 0 else own.mT)
        if term.coefficient is not None:
            own = own @ (term.coefficient if axis == 0 else term.coefficient.mT)
        if sample is None:
            sample = own.new_zeros(len(own), factor.rank)
        sample[:, term.at : term.at + own.shape[1]] += own
    return torch.zeros(1, factor.rank, dtype=torch.float64) if sample is None else sample


def _of_dtype(
    adapters: Sequence[Mapping[str, Update]], dtype: torch.dtype
) -> list[tuple[dict[str, Update], Loss | None]]:
    """What changes in each adapter, and what it loses; the updates of a module are read together."""
    names = [str(i) for i in range(len(adapters))]
    modules = list(dict.fromkeys(m for updates in adapters for m in updates))
    pool = PoolPart(names, [LoraData(n, u) for n, u in zip(names, adapters, strict=True)], modules)
    changed: list[dict[str, Update]] = [{} for _ in adapters]
    shares: list[dict[str, float]] = [{} for _ in adapters]
    for part in parts(pool, f"sizes for {str(dtype)[6:]}"):
        rows = part.updates()
        powers, lost = _powers(part, rows, dtype)
        for g, module in enumerate(part.modules):
            for i, member in enumerate(part.group.members):
                own = powers[g, i, : rows[g][i].rank]
                if bool((own != 1.0).any()):
                    update = rows[g][i]
                    changed[member][module] = replace(update, B=update.B.stretched(own), A=update.A.stretched(1 / own))
                if float(lost[g, i]) > TOLD:
                    shares[member][module] = float(lost[g, i])
        release(sources(u for row in rows for u in row))
    return [(some, _worst(share)) for some, share in zip(changed, shares, strict=True)]


def _worst(shares: Mapping[str, float]) -> Loss | None:
    if not shares:
        return None
    module = max(shares, key=shares.__getitem__)
    return Loss(shares[module], module, len(shares))


def _powers(part: GroupPart, rows: Sequence[Sequence[Update]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The powers of two for the columns of ``B``, ``[g, k, r]``, and the loss that is left of every update, ``[g, k]``.

    Where one power serves all columns of an update that count, they have it in common: such a factor is made of its
    stored matrices as before.
    """
    grams = GramPass()
    squares = [grams.diagonal([[factor(u, side) for u in row] for row in rows], part.group.rank) for side in SIDES]
    grams.run()
    shape = rows[0][0].shape
    B, A = (s.diagonal(dim1=2, dim2=3).cpu().clamp(min=0) / n for s, n in zip(squares, shape, strict=True))
    B, A = B.sqrt(), A.sqrt()
    computed_B, computed_A = (
        torch.tensor([[stored_as(factor(u, side), dtype) is None for u in row] for row in rows])[..., None]
        for side in SIDES
    )
    limits = Range.of(dtype)
    there = (B > 0) & (A > 0) & B.isfinite() & A.isfinite()
    sizes = torch.where(there, B * A, 0.0)
    counts = there & (sizes >= COUNTS * sizes.amax(-1, keepdim=True))

    def fit(power: Tensor | float) -> Tensor:
        """Where a power of two leaves both factors all their digits; what is stored has them in any case."""
        moved = torch.as_tensor(power != 1.0)
        fits_B, fits_A = limits.holds(B * power), limits.holds(A / power)
        return (fits_B | ~(computed_B | moved)) & (fits_A | ~(computed_A | moved))

    wrong = there & ~fit(1.0)
    even = torch.where(wrong, (A / B).log2().mul(0.5).round().exp2(), 1.0)
    some = torch.where(wrong & counts, even, torch.nan).nanmedian(-1, keepdim=True).values.nan_to_num(1.0)
    power = torch.where((fit(some) | ~counts).all(-1, keepdim=True), some, even)
    left = torch.where(computed_B | (power != 1.0), limits.error(B * power), 0.0)
    right = torch.where(computed_A | (power != 1.0), limits.error(A / power), 0.0)
    whole = sizes.square().sum(-1).sqrt()
    lost = (sizes * (left + right)).square().sum(-1).sqrt()
    return power, torch.where(whole > 0, lost / whole, 0.0)
