"""Gram blocks of the factors of modules, in one pass over the matrices that they are made of.

Every pass goes through the :mod:`cache <fastlora.engine.gram_cache>` in use, so that what it has is not read again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlora.core.factors import Factor, device_of, source_key
from fastlora.core.float64 import of_float64
from fastlora.engine.belonging import require_length, require_one_length, require_room
from fastlora.engine.gram_cache import entered, run_through_cache
from fastlora.ops.dispatch import Launches, prepared, run_pass, shortcut
from fastlora.ops.passes import BlockPlace, GramJob

Pairs = Sequence[tuple[int, int]]

# Of the squared norm that a column would have if nothing cancelled: below it all digits are those of rounding, as in
# what is unique of an adapter that shares everything.
ROUNDING = 1e-14

Pieces = tuple[tuple[tuple[int, float], ...], ...]
"""Columns (B sides) or rows (A sides) and scale of the stored matrices side by side that each factor is."""


def read_gram(modules: Sequence[Sequence[Factor]], r: int, pairs: Pairs) -> Tensor:
    """A pass of its own for :meth:`GramPass.blocks`; it looks the blocks up in the Gram cache in use."""
    grams = GramPass()
    blocks = grams.blocks(modules, r, pairs)
    grams.run()
    return blocks


class GramPass:
    """Gram jobs of lists of factors, put together and then run at once.

    :meth:`blocks` and :meth:`diagonal` ask; what they return is filled by :meth:`run`, or by the launches of
    :meth:`prepared` as often as they run.
    """

    def __init__(self) -> None:
        self._asked: list[tuple[Sequence[Sequence[Factor]], Tensor, int, Sequence[BlockPlace]]] = []
        self._jobs: list[GramJob] = []
        self._finish: list[Callable[[], None]] = []

    @property
    def jobs(self) -> list[GramJob]:
        """Of all that was asked for; their memory is cleared."""
        asked, self._asked = self._asked, []
        for modules, out, r, block_places in asked:
            if out.is_cpu:
                out.zero_()
            self._ask(modules, out, r, block_places)
        return self._jobs

    def blocks(self, modules: Sequence[Sequence[Factor]], r: int, pairs: Pairs) -> Tensor:
        """Gram blocks of the ``k`` factors of each module, all of one side.

        Returns float64 ``[len(modules), k, k, r, r]``, zero-padded to ``r``, with the blocks of ``pairs`` filled.
        """
        k = len(modules[0])
        out = _room(len(modules), k, k, r, r, device=device_of(modules))
        self._asked.append((modules, out, r, [(i, j, (i * k + j) * r * r) for i, j in pairs]))
        return out

    def diagonal(self, modules: Sequence[Sequence[Factor]], r: int) -> Tensor:
        """The diagonal blocks of :meth:`blocks` alone: ``[len(modules), k, r, r]``."""
        k = len(modules[0])
        out = _room(len(modules), k, r, r, device=device_of(modules))
        self._asked.append((modules, out, r, [(i, i, i * r * r) for i in range(k)]))
        return out

    def products(self, modules: Sequence[Sequence[Factor]], others: Sequence[Sequence[Factor]], r: int) -> Tensor:
        """Blocks of each of the ``n`` factors of a module with each of ``p`` others, all of one side.

        Returns float64 ``[len(modules), n, p, r, r]``, zero-padded to ``r``.
        """
        n, p = len(modules[0]), len(others[0])
        out = _room(len(modules), n, p, r, r, device=device_of(modules))
        places = [(i, n + j, (i * p + j) * r * r) for i in range(n) for j in range(p)]
        self._asked.append(([[*own, *more] for own, more in zip(modules, others, strict=True)], out, r, places))
        return out

    def run(self) -> None:
        """Reads the factors, except for blocks that the Gram cache in use has.

        Raises :class:`InputError` for factors that do not belong together.
        """
        if self._asked and not self._jobs and not entered():
            if shortcut("gram_factors", device_of(self._asked[0][0]).type, self._asked):
                return
        run_through_cache(self.jobs, functools.partial(run_pass, "gram_pass"))
        for finish in self._finish:
            finish()

    def prepared(self) -> Launches:
        """The pass ready to run many times, every time on what the factors hold by then and past any cache.

        For factors that are stored matrices as they are: what others need afterwards is not prepared.
        """
        jobs = self.jobs
        if self._finish:
            raise ValueError("a Gram pass over sums of matrices cannot be prepared")
        return prepared("gram_pass", jobs)

    def _ask(
        self, modules: Sequence[Sequence[Factor]], out: Tensor, r: int, block_places: Sequence[BlockPlace]
    ) -> None:
        """Blocks ``(i, j)`` of every module into ``out``, rows of ``r``, at their offsets in the module's part."""
        size = out[0].numel()
        axis = 0 if modules[0][0].side == "A" else 1
        # Modules whose factors are made alike, by what their terms look like: there are few kinds.
        kinds: dict[object, tuple[Sequence[BlockPlace], Pieces, list[int]]] = {}
        for m, factors in enumerate(modules):
            stored = [x for f in factors if (x := f.stored) is not None]
            if len(stored) == len(factors):  # as those of adapters that were loaded
                shapes = (None, *[x.shape for x in stored])
                if shapes not in kinds:
                    for factor, source in zip(factors, stored, strict=True):
                        require_length(factor, source)
                    require_one_length(factors)
                    kinds[shapes] = block_places, (), []
                self._jobs.append(GramJob(stored, block_places, axis == 0, out, r, m * size))
                continue
            if any([f.joined is None for f in factors]):
                job, coefficients = _source_gram(factors, axis == 0)
                self._jobs.append(job)
                self._finish.append(functools.partial(_put_products, job.out, coefficients, out[m], r, block_places))
                continue
            terms = [t for f in factors for t in f.terms]
            sources = [t.source for t in terms]
            if any([f.length != factors[0].length for f in factors]):
                require_one_length(factors)
            looks = (*[len(f.terms) for f in factors], *[x.shape for x in sources], *[t.scale for t in terms])
            kind = kinds.get(looks)
            if kind is None:
                for factor in factors:
                    for source in (t.source for t in factor.terms):
                        require_length(factor, source)
                pieces = tuple(tuple((t.source.shape[axis], t.scale) for t in f.terms) for f in factors)
                # Places of factors are places of stored matrices only where each is one: one may be empty, one a sum.
                plain = all(len(f.terms) == 1 for f in factors)
                blocks = block_places if plain else _pieces_of(pieces, r, block_places)
                kind = kinds[looks] = blocks, pieces, []
            self._jobs.append(GramJob(sources, kind[0], axis == 0, out, r, m * size))
            kind[2].append(m)
        for blocks, pieces, owners in kinds.values():
            if blocks is not block_places or any(scale != 1.0 for factor in pieces for _, scale in factor):
                whole = out.view(len(modules), size)
                self._finish.append(functools.partial(_finish_joined, pieces, owners, whole, r, block_places))


def _room(*shape: int, device: torch.device) -> Tensor:
    """Float64 zeros for factors on a device; on the CPU memory that the threads clear which compute there."""
    device = of_float64(device)
    if device.type == "cpu":
        return torch.from_numpy(np.empty(shape))
    return torch.zeros(shape, dtype=torch.float64, device=device)


def _pieces_of(pieces: Pieces, r: int, block_places: Sequence[BlockPlace]) -> list[BlockPlace]:
    """Blocks of factors as blocks of the stored matrices that they are made of; of a block on the diagonal the upper
    ones."""
    first = [0, *itertools.accumulate(len(factor) for factor in pieces)]
    starts = [[0, *itertools.accumulate(width for width, _ in factor)] for factor in pieces]
    return [
        (first[i] + a, first[j] + b, offset + starts[i][a] * r + starts[j][b])
        for i, j, offset in block_places
        for a in range(len(pieces[i]))
        for b in range(a if i == j else 0, len(pieces[j]))
    ]


def _finish_joined(
    pieces: Pieces, modules: Sequence[int], out: Tensor, r: int, block_places: Sequence[BlockPlace]
) -> None:
    """Mirrors the blocks on the diagonal of some modules, and applies the scales of stored matrices: ``out [.., size]``
    of all."""
    on_host = out.device.type == "cpu"
    numbers: Any = out.numpy() if on_host else out  # small steps take NumPy a third of torch's time
    chosen = numbers if len(modules) == len(out) else numbers[modules]
    scales: Any = None
    if any(scale != 1.0 for factor in pieces for _, scale in factor):
        ones = [[s for width, s in factor for _ in range(width)] for factor in pieces]
        scales = np.array([x + [1.0] * (r - len(x)) for x in ones])
        scales = scales if on_host else torch.from_numpy(scales).to(out.device)
    for i, j, offset in block_places:
        block = chosen[:, offset : offset + r * r].reshape(-1, r, r)  # a view
        if i == j:
            start = 0
            for width, _ in pieces[i][:-1]:
                end = start + width
                block[:, end:, start:end] = block[:, start:end, end:].swapaxes(1, 2)
                start = end
        if scales is not None:
            block *= scales[i, :, None] * scales[j]
    if chosen is not numbers:
        numbers[modules] = chosen


class _Coefficients(NamedTuple):
    """A factor on stored matrices: ``C [len(rows), rank]`` belongs to the ``rows`` of their Gram matrix. The others are
    left out and not multiplied by zero, so that NaN or Inf in one adapter is not found in another. ``size``: sums of
    absolute values where ``C`` has sums; ``None`` where nothing can cancel."""

    rows: Tensor
    C: Tensor
    size: Tensor | None

    @staticmethod
    def of(factor: Factor, first_rows: Mapping[object, int], device: torch.device) -> _Coefficients:
        """``first_rows``: where stored matrices start in the Gram matrix, by their identity."""
        sums: dict[object, Tensor] = {}
        sizes: dict[object, Tensor] = {}
        for term in factor.terms:
            key, C = source_key(term.source), term.matrix(factor.side, factor.rank)
            sums[key] = sums[key] + C if key in sums else C
            if len(factor.terms) > 1:
                sizes[key] = sizes[key] + C.abs() if key in sizes else C.abs()
        if not sums:
            none = torch.zeros(0, factor.rank, dtype=torch.float64, device=device)
            return _Coefficients(torch.zeros(0, dtype=torch.int64, device=device), none, None)
        rows = [torch.arange(C.shape[0], device=device) + first_rows[key] for key, C in sums.items()]
        size = torch.cat(list(sizes.values())) if sizes else None
        return _Coefficients(torch.cat(rows), torch.cat(list(sums.values())), size)

    def known(self, gram: Tensor, own: Tensor) -> Tensor | None:
        """Which columns are more than the rounding of what they are sums of, given the whole Gram matrix and the
        factor's ``own`` block of it; ``None``: all."""
        if self.size is None:
            return None
        norms = gram.diagonal()[self.rows].sqrt() @ self.size  # that columns would have if nothing cancelled
        return ~(own.diagonal() <= ROUNDING * norms.square())  # what is NaN stays


def _put_products(
    gram: Tensor, coefficients: Sequence[_Coefficients], out: Tensor, r: int, block_places: Sequence[BlockPlace]
) -> None:
    """Blocks of factors from the upper triangle of the Gram matrix of what they are made of: ``C_iᵀ G C_j``, with zeros
    for columns of which nothing but rounding is left."""
    full = gram.triu() + gram.triu(1).mT
    known: dict[int, Tensor | None] = {}
    products = []
    for i, j, offset in block_places:
        at, to, left, right = coefficients[i].rows, coefficients[j].rows, coefficients[i].C, coefficients[j].C
        products.append((i, j, offset, left.mT @ full[at][:, to] @ right))
        if i == j:
            known[i] = coefficients[i].known(full, products[-1][3])
    for i, j, offset, product in products:
        rows, columns = known.get(i), known.get(j)
        product = product if rows is None else product * rows[:, None]
        product = product if columns is None else product * columns
        out.view(-1)[offset:].as_strided(product.shape, (r, 1)).copy_(product)


def _source_gram(factors: Sequence[Factor], rows: bool) -> tuple[GramJob, list[_Coefficients]]:
    """The Gram matrix of the distinct stored matrices behind some factors, and each factor's coefficients on them."""
    first_rows: dict[object, int] = {}
    sources: list[Tensor] = []
    total = 0
    require_one_length(factors)
    for factor in factors:
        for term in factor.terms:
            require_length(factor, term.source)
            require_room(factor, term)
            if source_key(term.source) not in first_rows:
                first_rows[source_key(term.source)] = total
                sources.append(term.source)
                total += term.source.shape[0 if rows else 1]
    device = of_float64(sources[0].device) if sources else torch.device("cpu")
    coefficients = [_Coefficients.of(factor, first_rows, device) for factor in factors]
    starts = [first_rows[source_key(s)] for s in sources]
    blocks = [(i, j, starts[i] * total + starts[j]) for i in range(len(sources)) for j in range(i, len(sources))]
    gram = torch.zeros(total, total, dtype=torch.float64, device=device)
    return GramJob(sources, blocks, rows, gram, total), coefficients
