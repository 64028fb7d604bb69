"""``Σ w_i ΔW_i`` of the same adapters, written again and again with other weights.

What does not depend on the weights is computed once: which factors are put together, the Gram matrices that a cut is
computed from, and where every factor lies in a file. Results have the bits of :meth:`Adapter.save`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fastlora import formats
from fastlora.adapters.lora import Adapter, with_cuts
from fastlora.core.factors import Factor, Term
from fastlora.core.updates import NO_NOISE, Update, exact_rtol
from fastlora.engine.balance import is_narrow
from fastlora.engine.blocks import ChainBlocks, read_chain_blocks, require_finite_blocks
from fastlora.engine.repeated_write import RepeatedWrite
from fastlora.engine.schedule import PART_BYTES, one_adapter, parts
from fastlora.engine.spectrum import MATRICES, Cuts, SingularForm, cut, cuts_of
from fastlora.engine.write import outline
from fastlora.formats.peft.writing import AdapterFile
from fastlora.runtime.cpython import paused_collector

Numbers = npt.NDArray[np.float64]


class RepeatedSum:
    """The sum of some adapters that are loaded and have the same modules, cut to ``rank`` where some module is above.

    One result after the other, and not for two threads at once: :meth:`write` writes what the last :meth:`at` found.
    """

    def __init__(self, mix: Adapter, scalings: Numbers, rank: int | None, uniform_rank: int | bool | None) -> None:
        self._mix, self._scalings, self._rank, self._uniform_rank = mix, scalings, rank, uniform_rank
        self._updates: Mapping[str, Update] | None = mix.updates if rank is None else None
        self._parts: list[_Part] = []
        self._file: AdapterFile | None = None
        self._writes: RepeatedWrite | None = None
        if rank is not None:
            places = {module: i for i, module in enumerate(mix.updates)}
            plain = one_adapter(mix.name, {m: _unweighted(u) for m, u in mix.updates.items()})
            for part in parts(plain, "inner products", rtol_of=lambda u: exact_rtol([u]), matrices=MATRICES):
                blocks = read_chain_blocks(part, "left", "chain", exact=True)
                self._parts.append(_Part.of(blocks, part.group.rtol, mix, scalings[[places[m] for m in part.modules]]))

    @classmethod
    def of(
        cls,
        mix: Adapter,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        most_rank: int | None = None,
        uniform_rank: int | bool | None = None,
    ) -> RepeatedSum | None:
        """What can write sums of some ``adapters`` again and again, where ``mix`` is the one with ``weights``; ``None``
        where that is not possible, or takes too much memory: modules that only some have, factors that are sums
        themselves, experts in one tensor, biases, other formats, float16, whose range depends on the numbers.

        ``most_rank``: the rank that modules are cut to. ``uniform_rank``: as in :meth:`Adapter.save`.

        Cost: one read of the factors where modules are cut, else none.
        """
        scalings = _scalings(mix, adapters, weights)
        if scalings is None or mix.extras or mix.base.form is not None or mix.dtype == torch.float16:
            return None
        ranks = [u.rank for u in mix.updates.values()]
        is_cut = most_rank is not None and max(ranks) > most_rank
        if is_cut and MATRICES * 8 * sum(r * r for r in ranks) > PART_BYTES:  # 224 modules at a rank above 158
            return None
        return cls(mix, scalings, most_rank if is_cut else None, uniform_rank)

    @property
    def nbytes(self) -> int:
        """Of what is kept, about."""
        return sum(part.nbytes for part in self._parts) + 8192 * len(self._mix.updates)

    @paused_collector()
    def at(self, mix: Adapter, weights: Sequence[float]) -> Adapter | None:
        """The sum with other ``weights``, none of them 0, as :meth:`write` takes it: ``mix`` in all but its updates,
        which say shapes alone. ``None`` where it is made in another way: it has other ranks than the first, or a weight
        is so large or small that numbers may leave their range.

        Raises :class:`NonFiniteError` as :meth:`Adapter.compress` does.
        """
        scales = self._scalings * np.array(weights)
        if is_narrow(mix.dtype, scales.ravel().tolist()):
            return None
        if self._rank is None:
            return replace(mix, updates=self._mix.updates)
        found = [part.cut(np.array(weights), self._rank) for part in self._parts]
        if any(cuts is None for cuts in found):
            return None
        sizes: dict[str, tuple[float, float]] = {}
        for part, cuts in zip(self._parts, found, strict=True):
            assert cuts is not None
            sizes |= zip(part.blocks.modules, zip(cuts.norms, cuts.retained, strict=True), strict=True)
        if self._updates is None:
            forms = {m: f for part in self._parts for m, f in part.forms()}
            self._updates = {m: cut(u, forms[m]) for m, u in self._mix.updates.items()}
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
        self._writes.write(file, (self._scalings * np.array(weights)).tolist())
        file.close()
        self._file = file
        return [note for note in ready.notes if note not in result.notes]


def _scalings(mix: Adapter, adapters: Sequence[Adapter], weights: Sequence[float]) -> Numbers | None:
    """The ``s_i`` of every term ``w_i s_i B_i A_i`` of every module, ``[modules, adapters]``; ``None`` where ``mix`` is
    not the stored factors of all adapters side by side."""
    own: list[dict[tuple[int, int], float]] = []
    for adapter in adapters:
        stored = [(u.B.stored, u.A.stored, u.scaling) for u in adapter.updates.values()]
        own.append({(id(B), id(A)): s for B, A, s in stored if B is not None and A is not None})
    found = []
    for update in mix.updates.values():
        B, A = update.B.joined, update.A.joined
        if B is None or A is None or not len(B) == len(A) == len(own) or update.scaling != 1.0 or not update.rank:
            return None
        row = [of.get((id(b.source), id(a.source))) for of, b, a in zip(own, B, A, strict=True)]
        known = [s for s in row if s is not None]
        if len(known) < len(row) or [s * w for s, w in zip(known, weights, strict=True)] != [b.scale for b in B]:
            return None
        if update.layout.kind == "expert" or update.noise is not NO_NOISE:
            return None
        if any(a.scale != 1.0 or a.source.device.type != "cpu" for a in A):
            return None
        if len({id(b.source) for b in B}) < len(B):
            return None
        found.append(known)
    return np.array(found) if found else None


def _unweighted(update: Update) -> Update:
    """An update whose terms all have the scale 1."""
    terms = tuple(Term(t.source, None, t.at) for t in update.B.terms)
    return replace(update, B=Factor("B", update.B.length, update.B.rank, terms))


@dataclass(slots=True, eq=False)
class _Part:
    """Modules of one rank: ``blocks`` of the stored factors side by side, without scales; whose each column is, and the
    scaling there: ``owners``, ``scalings``: ``[g, r]``. ``scaled``: memory for the blocks with the scales of some weights.

    ``cuts``: those of the first weights. Their ``T`` and ``D`` are the coefficients that are written with, and hold the
    numbers of the last weights.
    """

    blocks: ChainBlocks
    rtol: float
    owners: npt.NDArray[np.intp]
    scalings: Numbers
    scaled: Numbers
    cuts: Cuts | None = None

    @staticmethod
    def of(blocks: ChainBlocks, rtol: float, mix: Adapter, scalings: Numbers) -> _Part:
        """``scalings``: those of the adapters, ``[g, k]``."""
        terms = [mix.updates[m].B.terms for m in blocks.modules]
        owners = np.array([[i for i, t in enumerate(some) for _ in range(t.width("B"))] for some in terms])
        scaled = np.empty(blocks.projected.shape)
        return _Part(blocks, rtol, owners, np.take_along_axis(scalings, owners, axis=1), scaled)

    @property
    def nbytes(self) -> int:
        """Of the small matrices."""
        cuts = [] if self.cuts is None else [self.cuts.T, self.cuts.D]
        return sum(x.nbytes for x in (self.blocks.projected, self.blocks.other, self.scaled, *cuts))

    def cut(self, weights: Numbers, rank: int) -> Cuts | None:
        """The cuts for some weights; ``None`` where they have other ranks than the first."""
        # In NumPy, which wakes no threads, and in memory that is there: after a pause both take longer than the products.
        scales = (self.scalings * weights[self.owners])[:, None, None]
        np.multiply(scales[..., :, None], scales[..., None, :], out=self.scaled)
        np.multiply(self.blocks.projected.numpy(), self.scaled, out=self.scaled)
        blocks = replace(self.blocks, projected=torch.from_numpy(self.scaled))
        require_finite_blocks(blocks, "left")
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
        return cuts

    def forms(self) -> Iterator[tuple[str, SingularForm]]:
        """Of every module, on the coefficients that are written with."""
        assert self.cuts is not None
        return zip(self.blocks.modules, self.cuts.forms(), strict=True)
