"""``Σ w_i ΔW_i`` of the same updates, written again and again with other weights.

What does not depend on the weights is computed once: which factors are put together, the Gram matrices that a cut is
computed from, and where every factor lies in a file. Sums of adapters as they are stored have the bits of
:meth:`Adapter.save`. Where an update is made of several matrices, small matrices of a cut are rounded in another order,
to 1e-16 of their size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastlora import formats
from fastlora.adapters.lora import Adapter, with_cuts
from fastlora.core.factors import Factor, Term, concatenate
from fastlora.core.updates import NO_NOISE, ROUNDING, Update, exact_rtol
from fastlora.engine.balance import is_narrow
from fastlora.engine.blocks import ChainBlocks, read_chain_blocks
from fastlora.engine.repeated_write import RepeatedWrite
from fastlora.engine.schedule import PART_BYTES, one_adapter, parts
from fastlora.engine.spectrum import MATRICES, Cuts, cut, cuts_of
from fastlora.engine.write import outline
from fastlora.formats.peft.writing import AdapterFile
from fastlora.runtime.cpython import paused_collector

Numbers = npt.NDArray[np.float64]


class RepeatedSum:
    """The sum of some adapters of the same modules, cut to ``rank`` where some module is above.

    One result after the other, and not for two threads at once: :meth:`write` writes what the last :meth:`at` found.
    """

    def __init__(
        self, mix: Adapter, places: Mapping[str, _Weighed], rank: int | None, uniform_rank: int | bool | None
    ) -> None:
        self._rank, self._uniform_rank = rank, uniform_rank
        self._parts: list[_Part] = []
        self._file: AdapterFile | None = None
        self._writes: RepeatedWrite | None = None
        plain = {m: _with_scales(u, [own for own, _, _ in places[m].terms]) for m, u in mix.updates.items()}
        # Of the outermost sum; no scale is 1, or a matrix would be taken for one that is written as it is.
        self._uncut = {m: _with_scales(u, [2.0] * len(u.B.terms)) for m, u in mix.updates.items()}
        self._updates: Mapping[str, Update] | None = self._uncut if rank is None else None
        if rank is not None:
            for part in parts(
                one_adapter(mix.name, plain), "inner products", rtol_of=lambda u: exact_rtol([u]), matrices=MATRICES
            ):
                blocks = read_chain_blocks(part, "left", "chain", exact=True)
                self._parts.append(_Part.of(blocks, part.group.rtol, places))
        one = 1.0, 1.0, len(next(iter(places.values())).scalings)  # a term whose weight is in its coefficients
        weighed = {m: place.terms for m, place in places.items()}
        for products in (part.products for part in self._parts):
            weighed |= {m: [one] * len(B) for m, (B, _) in zip(products.modules, products.sources, strict=True)}
        terms = list(itertools.chain.from_iterable(weighed.values()))
        own, scalings, owners = zip(*terms, strict=True)
        self._own, self._scalings, self._owners = np.array(own), np.array(scalings), np.array(owners)

    @classmethod
    def of(
        cls,
        mix: Adapter,
        terms: Sequence[tuple[float, Adapter]],
        most_rank: int | None = None,
        uniform_rank: int | bool | None = None,
    ) -> RepeatedSum | None:
        """What can write sums of some adapters again and again, where ``mix`` is the one of ``terms``, with weights;
        ``None`` where that is not possible, or takes too much memory: modules that only some have, experts in one
        tensor, biases, other formats, float16, whose range depends on the numbers.

        ``most_rank``: the rank that modules are cut to. ``uniform_rank``: as in :meth:`Adapter.save`.

        Cost: one read of the factors where modules are cut, else none.
        """
        if mix.extras or mix.base.form is not None or mix.dtype == torch.float16 or mix.device.type != "cpu":
            return None
        places: dict[str, _Weighed] = {}
        for module, update in mix.updates.items():
            place = _Weighed.of(update, [(w, a.updates.get(module)) for w, a in terms])
            if place is None:
                return None
            places[module] = place
        ranks = [u.rank for u in mix.updates.values()]
        is_cut = most_rank is not None and max(ranks, default=0) > most_rank
        if not places or (is_cut and MATRICES * 8 * sum(r * r for r in ranks) > PART_BYTES):  # 224 modules of rank 158
            return None
        return cls(mix, places, most_rank if is_cut else None, uniform_rank)

    @property
    def nbytes(self) -> int:
        """Of what is kept, about."""
        return sum(part.nbytes for part in self._parts) + 8192 * len(self._uncut)

    @paused_collector()
    def at(self, mix: Adapter, weights: Sequence[float]) -> Adapter | None:
        """The sum with other ``weights``, none of them 0, as :meth:`write` takes it: ``mix`` in all but its updates,
        which say shapes alone. ``None`` where it is made in another way: it has other ranks than the first, or a weight
        is so large or small that numbers may leave their range.

        Raises :class:`InputError` for numbers that overflow.
        """
        if is_narrow(mix.dtype, self._scales(weights)):
            return None
        if self._rank is None:
            return replace(mix, updates=self._uncut)
        found = [part.cut(np.array(weights), self._rank) for part in self._parts]
        if any(cuts is None for cuts in found):
            return None
        sizes: dict[str, tuple[float, float]] = {}
        for part, cuts in zip(self._parts, found, strict=True):
            assert cuts is not None
            sizes |= zip(part.blocks.modules, zip(cuts.norms, cuts.retained, strict=True), strict=True)
        if self._updates is None:
            made = {m: u for part in self._parts for m, u in part.updates(self._uncut)}
            self._updates = {m: made[m] for m in self._uncut}
        return with_cuts(mix, self._updates, {m: sizes[m] for m in self._updates}, self._rank, None)

    @paused_collector()
    def write(self, result: Adapter, weights: Sequence[float], directory: Path) -> list[str]:
        """Writes what :meth:`at` returned for ``weights`` into a directory that is being staged, as
        :func:`fastlora.formats.write_adapter` does; returns what is worth telling.

        Raises :class:`OutputError` as :meth:`Adapter.save` does.
        """
        ready = formats.ready(result, self._uniform_rank)
        if self._file is None or self._writes is None:
            outlines = {m: outline(u, result.dtype) for m, u in ready.updates.items()}
            file = AdapterFile(directory, ready, outlines, result.dtype)
            self._writes = RepeatedWrite(file, ready)
            self._file = file
        else:
            file = self._file.again(directory, ready)
        self._writes.write(file, self._scales(weights))
        file.close()
        self._file = file
        return [note for note in ready.notes if note not in result.notes]

    def _scales(self, weights: Sequence[float]) -> list[float]:
        """Of every term of every ``B`` that is written."""
        scales: list[float] = (self._own * (self._scalings * np.array([*weights, 1.0])[self._owners])).tolist()
        return scales


class _Weighed(NamedTuple):
    """Where the weights are in an update ``Σ w_i s_i B_i A_i``: whose each term of ``B`` is, with its own scale and the
    ``s_i``; the ranks of all ``i``, their ``s_i`` and the origin of their noise."""

    terms: list[tuple[float, float, int]]
    ranks: list[int]
    scalings: list[float]
    origins: list[float]

    @staticmethod
    def of(update: Update, terms: Sequence[tuple[float, Update | None]]) -> _Weighed | None:
        """``None`` where the update is not just those of the terms side by side."""
        own = [(w, u) for w, u in terms if u is not None and w != 0.0]
        if len(own) < len(terms) or not own or update.scaling != 1.0 or not update.rank:
            return None
        if update.layout.kind == "expert":
            return None
        left = concatenate([u.B.scaled(u.scaling * w) for w, u in own]).terms
        right = concatenate([u.A for _, u in own]).terms
        pairs = [*itertools.zip_longest(left, update.B.terms), *itertools.zip_longest(right, update.A.terms)]
        if not all(a is not None and b is not None and _same(a, b) for a, b in pairs):
            return None
        places = [(t.scale, u.scaling, i) for i, (_, u) in enumerate(own) for t in u.B.terms]
        updates = [u for _, u in own]
        return _Weighed(
            places, [u.rank for u in updates], [u.scaling for u in updates], [u.noise.origin for u in updates]
        )


def _same(one: Term, other: Term) -> bool:
    alike = one.source is other.source and one.coefficient is other.coefficient
    return alike and one.at == other.at and one.scale == other.scale


def _with_scales(update: Update, scales: Sequence[float]) -> Update:
    """The update with other scales of the terms of ``B``, taken for exact."""
    terms = tuple(replace(t, scale=s) for t, s in zip(update.B.terms, scales, strict=True))
    return replace(update, B=replace(update.B, terms=terms), noise=NO_NOISE)


@dataclass(slots=True, eq=False)
class _Products:
    """What ``T`` and ``D`` become in modules whose factors are sums of products: coefficients of their stored matrices.

    ``B = Σ X_j M_j`` and ``A = Σ N_jᵀ Y_j`` before the cut, ``Σ X_j (M_j T)`` and ``Σ (D N_jᵀ) Y_j`` after it:
    ``M [g, Σr, rank]`` and ``N`` are all ``j`` one below the other, with zeros below, at the ``rows`` of a part.
    """

    modules: list[str]
    rows: list[int]
    sources: list[tuple[list[Tensor], list[Tensor]]]
    M: Numbers
    N: Numbers
    left: Tensor | None = None
    right: Tensor | None = None

    @staticmethod
    def of(blocks: ChainBlocks) -> _Products:
        """Those of a part."""
        updates = [update for (update,) in blocks.updates]
        rows = [g for g, u in enumerate(updates) if u.B.joined is None or u.A.joined is None]
        made = [(updates[g].B.coefficients(), updates[g].A.coefficients()) for g in rows]
        sources = [([x for x, _ in B], [x for x, _ in A]) for B, A in made]
        M, N = (_one_below_the_other([pair[side] for pair in made], blocks.group.rank) for side in (0, 1))
        return _Products([blocks.modules[g] for g in rows], rows, sources, M, N)

    def put(self, cuts: Cuts, scales: Numbers) -> None:
        """The coefficients for the columns of ``B`` times ``scales [g, rank]``."""
        if not self.rows:
            return
        left = torch.from_numpy(self.M @ (scales[self.rows, :, None] * cuts.T.numpy()[self.rows]))
        right = torch.from_numpy(cuts.D.numpy()[self.rows] @ self.N.swapaxes(1, 2))
        if self.left is None or self.right is None:
            self.left, self.right = left, right
        else:
            self.left.copy_(left)
            self.right.copy_(right)

    def update(self, row: int, before: Update, count: int) -> Update:
        """The cut update of a module."""
        i = self.rows.index(row)
        assert self.left is not None and self.right is not None
        lefts, rights = self.sources[i]
        terms = [
            Term(x, self.left[i, at : at + x.shape[1], :count])
            for x, at in zip(lefts, _starts(x.shape[1] for x in lefts), strict=False)
        ]
        others = [
            Term(x, self.right[i, :count, at : at + x.shape[0]])
            for x, at in zip(rights, _starts(x.shape[0] for x in rights), strict=False)
        ]
        B, A = Factor("B", before.B.length, count, tuple(terms)), Factor("A", before.A.length, count, tuple(others))
        return Update(B, A, 1.0, before.layout, before.noise)


def _starts(sizes: Iterable[int]) -> list[int]:
    return [0, *itertools.accumulate(sizes)]


def _one_below_the_other(pieces: Sequence[Sequence[tuple[Tensor, Tensor]]], rank: int) -> Numbers:
    """The coefficients of every module, ``[g, Σr, rank]``."""
    most = max((sum(len(C) for _, C in some) for some in pieces), default=0)
    whole = np.zeros((len(pieces), most, rank))
    for row, some in zip(whole, pieces, strict=True):
        joined = torch.cat([C for _, C in some])
        row[: len(joined)] = joined.numpy()
    return whole


@dataclass(slots=True, eq=False)
class _Part:
    """Modules of one rank: ``blocks`` of their factors, without weights; whose each column is, and the scaling there:
    ``owners``, ``scalings``: ``[g, r]``. ``origins [g, k]``: of the noise. ``scaled``: memory for the blocks with some
    weights.

    ``cuts``: those of the first weights. Their ``T`` and ``D`` and the ``products`` with them are the coefficients that
    are written with, and hold the numbers of the last weights.
    """

    blocks: ChainBlocks
    rtol: float
    owners: npt.NDArray[np.intp]
    scalings: Numbers
    origins: Numbers
    scaled: Numbers
    products: _Products
    cuts: Cuts | None = None

    @staticmethod
    def of(blocks: ChainBlocks, rtol: float, places: Mapping[str, _Weighed]) -> _Part:
        """The modules of ``blocks``."""
        own = [places[m] for m in blocks.modules]
        owners = np.array([np.repeat(np.arange(len(p.ranks)), p.ranks) for p in own])
        scalings = np.take_along_axis(np.array([p.scalings for p in own]), owners, axis=1)
        scaled = np.empty(blocks.projected.shape)
        origins = np.array([p.origins for p in own])
        return _Part(blocks, rtol, owners, scalings, origins, scaled, _Products.of(blocks))

    @property
    def nbytes(self) -> int:
        """Of the small matrices."""
        small = 0 if self.cuts is None else 2 * (self.cuts.T.nbytes + self.cuts.D.nbytes)
        return 3 * self.scaled.nbytes + self.products.M.nbytes + self.products.N.nbytes + small

    def cut(self, weights: Numbers, rank: int) -> Cuts | None:
        """The cuts for some weights; ``None`` where they have other ranks than the first."""
        # In NumPy, which wakes no threads, and in memory that is there: after a pause that takes longer than products.
        scales = self.scalings * weights[self.owners]
        np.multiply(scales[:, None, None, :, None], scales[:, None, None, None, :], out=self.scaled)
        np.multiply(self.blocks.projected.numpy(), self.scaled, out=self.scaled)
        floor = ROUNDING * (self.origins * np.abs(weights)).max(axis=1, keepdims=True)
        blocks = replace(self.blocks, projected=torch.from_numpy(self.scaled), floor=torch.from_numpy(floor))
        cuts = cuts_of(blocks, self.rtol, rank, None)
        if self.cuts is None:
            if not all(cuts.counts):
                return None
            self.cuts = cuts
        elif cuts.counts != self.cuts.counts:
            return None
        else:
            np.copyto(self.cuts.T.numpy(), cuts.T.numpy())
            np.copyto(self.cuts.D.numpy(), cuts.D.numpy())
        self.products.put(cuts, scales)
        return cuts

    def updates(self, uncut: Mapping[str, Update]) -> Iterator[tuple[str, Update]]:
        """Of every module, on the coefficients that are written with."""
        assert self.cuts is not None
        for g, (module, form) in enumerate(zip(self.blocks.modules, self.cuts.forms(), strict=True)):
            before = uncut[module]
            made = module in self.products.modules
            yield module, self.products.update(g, before, form.kept) if made else cut(before, form)
