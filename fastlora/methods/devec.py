"""DeVec: shared and unique components of a pool (arXiv 2512.22511), MATH section 3.

Everything is computed on Gram blocks and kept as coefficients of the loaded factors; results are adapters whose tall
factors are formed when they are saved or looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlora import ops
from fastlora.adapter import Adapter, BaseInfo, Factor, Term, Update, add
from fastlora.engine import (
    CHUNK_BYTES,
    check_diagonal,
    chunks,
    sources,
    widest,
    with_rank_zero,
)
from fastlora.gramblocks import GramPass
from fastlora.interpreter import paused_collector
from fastlora.memory import is_bounded, release
from fastlora.methods.arithmetic import common_base
from fastlora.methods.spectrum import check_size, default_rtol, factor, raise_for_info, sides, unscaled_floor
from fastlora.ops.gram import blocks_of
from fastlora.pool import Pool
from fastlora.progress import track
from fastlora.stream import PoolPart
from fastlora.stream import current as streaming
from fastlora.stream import parts as stream_parts

# Matrices r×r that are in memory for one pair of one module: its Gram blocks, what is made of them, and copies.
BLOCKS_OF_PAIR = 32


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


class Group(NamedTuple):
    """Modules that are computed in one launch: same adapters, ranks and noise floor."""

    members: tuple[int, ...]
    ranks: tuple[int, ...]
    rtols: tuple[float, ...]

    @property
    def rtol(self) -> float:
        """One noise floor for a chain: that of the coarsest member."""
        return max(self.rtols)


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


def group_modules(pool: Pool, modules: Sequence[str], rtol: float | None) -> dict[Group, list[str]]:
    """Modules with at least two adapters, by :class:`Group`."""
    groups: dict[Group, list[str]] = {}
    for module in modules:
        members = tuple(pool.present(module))
        if len(members) < 2:
            continue
        updates = [pool.adapters[i].updates[module] for i in members]
        ranks = tuple(u.rank for u in updates)
        cuts = tuple(default_rtol([u]) if rtol is None else rtol for u in updates)
        groups.setdefault(Group(members, ranks, cuts), []).append(module)
    return groups


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Gram blocks of some modules of one group: ``projected [g, k, k, r, r]``, ``other [g, k, r, r]``.

    In blocks of pairs a module is there once for every pair; ``names`` are the adapters of each row.
    """

    modules: list[str]
    names: list[tuple[str, ...]]
    updates: list[list[Update]]
    projected: Tensor
    other: Tensor
    floor: Tensor  # [g, k], in units of the unscaled products
    group: Group


def read_blocks(pool: Pool | PoolPart, group: Group, modules: list[str], side: str, kind: str) -> Blocks:
    """One pass over both sides' factors of some modules of a group."""
    projected_side, other_side = sides(side)
    names = tuple(pool.names[i] for i in group.members)
    updates = [[pool.adapters[i].updates[m] for i in group.members] for m in modules]
    k, r = len(names), max(1, *group.ranks)
    grams = GramPass()
    projected = grams.blocks([[factor(u, projected_side) for u in row] for row in updates], r, blocks_of(kind, k))
    other = grams.diagonal([[factor(u, other_side) for u in row] for row in updates], r)
    grams.run()
    check_diagonal(names, modules, projected, projected_side)
    check_diagonal(names, modules, other, other_side)
    release(sources(u for row in updates for u in row))
    floor = torch.tensor([[unscaled_floor(u) for u in row] for row in updates], dtype=torch.float64)
    floor = floor.to(projected.device)
    return Blocks(modules, [names] * len(modules), updates, projected, other, floor, group)


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


class Components:
    """Shared and unique parts of some adapters: the result of one chain, module by module."""

    def __init__(self, pool: Pool, results: Mapping[str, ModuleResult], settings: Settings, label: str) -> None:
        self.pool = pool
        self.results = dict(results)
        self.settings = settings
        self.label = label
        self._pool_updates = {a.name: a.updates for a in pool.adapters}

    @property
    def spectrum(self) -> dict[str, Tensor]:
        """``{module: eigenvalues}``, descending by real part, complex where they are."""
        return {m: r.values for m, r in self.results.items()}

    @property
    @paused_collector()
    def shared(self) -> Adapter:
        """The one adapter that holds what all share, MATH (10); rank 0 in modules that share nothing."""
        found = self._shared_updates(None)
        updates = {m: found.get(m) or with_rank_zero(self._owner(m)) for m in self.pool.modules}
        base = common_base(self.pool.adapters)
        return self._adapter("shared", updates, replace(base, modules_to_save=(), bias="none"), self.pool.names)

    @paused_collector()
    def shared_of(self, name: str) -> Adapter:
        """What of adapter ``name`` lies in the shared directions, MATH (7)."""
        adapter = self.pool[name]
        found = self._shared_updates(name)
        updates = {m: found.get(m) or with_rank_zero(u) for m, u in adapter.updates.items()}
        base = replace(adapter.base, modules_to_save=(), bias="none")
        return self._adapter(f"shared_of({name})", updates, base, [name])

    @paused_collector()
    def unique_of(self, name: str) -> Adapter:
        """Adapter ``name`` without the shared directions, MATH (8); with it stay its biases and replaced modules."""
        adapter = self.pool[name]
        updates = dict(adapter.updates)
        for coefficients, results in self._sharing(name).items():
            i, ranks = results[0].names.index(name), results[0].ranks
            rows = [r.row for r in results]
            norms = coefficients.sigma[rows, i, 0].tolist()
            for result, own, norm in zip(results, coefficients.removals(rows, i, ranks), norms, strict=True):
                updates[result.module] = self._unique_update(result, i, own, norm)
        unique = self._adapter(f"unique_of({name})", updates, adapter.base, [name])
        unique.extras = dict(adapter.extras)
        return unique

    def _adapter(self, name: str, updates: Mapping[str, Update], base: BaseInfo, names: Sequence[str]) -> Adapter:
        own = [self.pool[n] for n in names]
        provenance = {
            "devec": name,
            "mode": self.label,
            "threshold": self.settings.threshold,
            "chain": self.settings.chain,
            "side": self.settings.side,
            "rank": self.settings.rank,
            "energy": self.settings.energy,
            "pool": {n: self.pool[n].provenance for n in self.pool.names},
        }
        return Adapter(name, updates, base=base, dtype=widest(a.dtype for a in own), provenance=provenance)

    def _sharing(self, name: str | None) -> dict[Coefficients, list[ModuleResult]]:
        """The modules in which adapter ``name``, or any, shares something, by the coefficients that they are rows
        of."""
        found: dict[Coefficients, list[ModuleResult]] = {}
        for result in self.results.values():
            if result.count and (name is None or name in result.names):
                found.setdefault(result.coefficients, []).append(result)
        return found

    def _owner(self, module: str) -> Update:
        """The first adapter's update of a module, whose shape and layout the shared part has."""
        return self.pool.adapters[self.pool.present(module)[0]].updates[module]

    def _sides(self, name: str, module: str) -> tuple[Factor, Factor]:
        """(projected factor, other factor) of one adapter in one module."""
        update = self._pool_updates[name][module]
        return (update.B, update.A) if self.settings.side == "left" else (update.A, update.B)

    def _basis(self, result: ModuleResult) -> Factor:
        """``Z`` as a factor: orthonormal, ``count`` columns (rows on the A side)."""
        movers = zip(result.names, result.basis, strict=True)
        return add(self._sides(name, result.module)[0].times(b) for name, b in movers if b is not None)

    def _assemble(self, like: Update, projected: Factor, other: Factor, scaling: float, floor: float) -> Update:
        left, right = (projected, other) if self.settings.side == "left" else (other, projected)
        return Update(left, right, scaling, like.layout, floor)

    def _shared_updates(self, name: str | None) -> dict[str, Update]:
        """``Z · Σ_i w_i s_i H_i A_i`` with the weights of MATH (10), or of adapter ``name`` alone with weight 1, in the
        modules where that is not zero."""
        found: dict[str, Update] = {}
        for coefficients, results in self._sharing(name).items():
            names, ranks = results[0].names, results[0].ranks
            full = coefficients.H.shape[-1]
            members = [names.index(name)] if name is not None else list(range(len(names)))
            weights = [
                [w * self._pool_updates[names[i]][r.module].scaling for i, w in zip(members, own, strict=True)]
                for r in results
                for own in [r.weights if name is None else (1.0,)]
            ]
            weighted = coefficients.weighted([r.row for r in results], members, weights)
            for result, own, small in zip(results, weights, weighted, strict=True):
                terms: list[Term] = []
                for i, weight, h in zip(members, own, small[:, : result.count].unbind(), strict=True):
                    if weight != 0.0:
                        h = h if ranks[i] == full else h[:, : ranks[i]]
                        other = self._sides(names[i], result.module)[1]
                        terms += other.applied(h if other.side == "A" else h.mT).terms
                if terms:
                    basis, like = self._basis(result), self._owner(result.module)
                    other = replace(self._sides(names[0], result.module)[1], rank=result.count, terms=tuple(terms))
                    found[result.module] = self._assemble(like, basis, other, 1.0, 0.0)
        return found

    def _unique_update(self, result: ModuleResult, i: int, removals: Sequence[Tensor], norm: float) -> Update:
        update = self._pool_updates[result.names[i]][result.module]
        left = self.settings.side == "left"
        projected, other = (update.B, update.A) if left else (update.A, update.B)
        terms = list(projected.terms)
        for name, removal in zip(result.names, removals, strict=False):
            mover = self._sides(name, result.module)[0]
            terms += mover.applied(removal if left else removal.mT).terms
        unique = Factor(projected.side, projected.length, projected.rank, tuple(terms))
        floor = max(update.floor, result.rtol * norm)
        return self._assemble(update, unique, other, update.scaling, floor)


def decompose_pool(pool: Pool, settings: Settings) -> Components:
    """One decomposition of all adapters."""
    results: dict[str, ModuleResult] = {}
    kind = "pairs" if settings.chain == "mean" else "chain"
    for own, group, part in module_parts(pool, settings.rtol, "decomposing"):
        for result in shared_directions(read_blocks(own, group, part, settings.side, kind), settings):
            results[result.module] = result
    return Components(pool, {m: results[m] for m in pool.modules if m in results}, settings, "pool")


def decompose_pairs(pool: Pool, settings: Settings) -> dict[tuple[str, str], Components]:
    """A decomposition of every pair, from one read of the factors."""
    results: dict[tuple[str, str], dict[str, ModuleResult]] = {
        (a, b): {} for i, a in enumerate(pool.names) for b in pool.names[i + 1 :]
    }
    for source, group, part in module_parts(pool, settings.rtol, "decomposing pairs"):
        blocks = read_blocks(source, group, part, settings.side, "pairs")
        for pairs in _pairs(blocks):
            for result in shared_directions(pairs, settings):
                results[result.names[0], result.names[1]][result.module] = result
    return {
        pair: Components(pool.subset(list(pair)), {m: own[m] for m in pool.modules if m in own}, settings, "pairs")
        for pair, own in results.items()
    }


def _pairs(blocks: Blocks) -> Iterator[Blocks]:
    """The blocks of every two of the adapters, many pairs at once: those of the same ranks and noise floors, at their
    own padded size, so that results do not depend on the rest of the pool."""
    group, k = blocks.group, len(blocks.group.members)
    alike: dict[Group, list[tuple[int, int]]] = {}
    for i in range(k):
        for j in range(i + 1, k):
            of_two = Group((0, 1), (group.ranks[i], group.ranks[j]), (group.rtols[i], group.rtols[j]))
            alike.setdefault(of_two, []).append((i, j))
    for of_two, pairs in alike.items():
        r = max(1, *of_two.ranks)
        for part in chunks(len(pairs), BLOCKS_OF_PAIR * 8 * r * r * len(blocks.modules)):
            some = [pairs[p] for p in part]
            index = torch.tensor(some, device=blocks.projected.device)  # [p, 2]
            rows = [(g, pair) for g in range(len(blocks.modules)) for pair in some]
            yield Blocks(
                [blocks.modules[g] for g, _ in rows],
                [(blocks.names[g][i], blocks.names[g][j]) for g, (i, j) in rows],
                [[blocks.updates[g][i], blocks.updates[g][j]] for g, (i, j) in rows],
                blocks.projected[:, index[:, :, None], index[:, None]][..., :r, :r].flatten(0, 1).contiguous(),
                blocks.other[:, index][..., :r, :r].flatten(0, 1).contiguous(),
                blocks.floor[:, index].flatten(0, 1).contiguous(),
                of_two,
            )


def decompose_iteratively(pool: Pool, settings: Settings, target: str, order: Sequence[str]) -> list[Components]:
    """The target against each other adapter in turn, every time keeping the unique part: one step a list entry.

    The unique part of a first adapter stays in its own column space, ``B_t → B_t (I − basis H)``, so the loop runs on
    small matrices; the pool of step ``i`` holds the target as step ``i − 1`` left it.
    """
    steps: list[Components] = []
    current = pool[target]
    for other in order:
        pair = Pool([current, pool[other]], align=False)
        found = decompose_pool(pair, settings)
        steps.append(Components(pair, found.results, settings, "iterative"))
        unique = steps[-1].unique_of(target)
        unique.name = target
        current = unique
    return steps


def module_parts(pool: Pool, rtol: float | None, label: str) -> Iterator[tuple[Pool | PoolPart, Group, list[str]]]:
    """Modules that are computed together, and where their factors are: in the pool, or on the device of a stream."""
    work: list[tuple[Group, list[str]]] = []
    stream = streaming()
    for group, members in group_modules(pool, pool.modules, rtol).items():
        k, r = len(group.members), max(1, *group.ranks)
        size = 8 * 4 * k * k * r * r
        if is_bounded() or stream is not None:
            updates = (pool.adapters[i].updates[m] for m in members for i in group.members)
            size += sum(s.nbytes for s in sources(updates)) // len(members)
        for part in chunks(len(members), size, CHUNK_BYTES if stream is None else stream.group):
            work.append((group, [members[i] for i in part]))
    if stream is None:
        return ((pool, group, part) for group, part in track(work, label))
    moving = stream_parts(pool.names, pool.adapters, [part for _, part in work])
    return ((own, group, part) for (group, part), own in zip(track(work, label), moving, strict=True))
