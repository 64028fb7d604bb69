"""The decoupler: inner products of what is decoupled, and how an update is put together from combinations of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora.adapters.pool import Pool
from fastlora.core.sums import combine_updates
from fastlora.core.updates import Update, sources, with_rank_zero
from fastlora.dipm import columns, components
from fastlora.dipm.module import ModulatedModule, only_own
from fastlora.engine.blocks import read_pair_blocks
from fastlora.errors import InputError
from fastlora.runtime.memory import release

GRANULARITIES = ("component", "column", "matrix")
SIDES = ("product", "B", "A")


@dataclass(frozen=True, slots=True, eq=False)
class ModuleFrame:
    """One module of ``K`` adapters, the first of which is modulated.

    ``gram [K, K, P]``: inner products of their vectors at the ``P`` places, zero for adapters that lack the module.
    """

    module: ModulatedModule
    gram: Tensor
    parts: components.SingularComponents | None
    events: Counter[str]
    granularity: str
    on: str

    def update(self, weights: Tensor) -> Update | None:
        """The update whose vectors are ``Σ_k weights_k x_k``, ``weights [K, P]``; ``None`` where it is zero and the
        modulated adapter lacks the module."""
        own_update = self.module.updates[0]
        if not bool(weights.any()):
            return None if own_update is None else with_rank_zero(own_update)
        if (factor := only_own(weights, self.gram)) is not None and own_update is not None:
            return replace(own_update, scaling=own_update.scaling * factor, noise=own_update.noise.scaled(factor))
        if self.on != "product" and own_update is None:
            return None
        if self.granularity == "component":
            assert self.parts is not None
            return components.update(self.module, self.parts, weights, self.on)
        if self.granularity == "column":
            return columns.update(self.module, weights, self.on)
        return _matrix_update(self.module, weights[:, 0], self.on)


def frames(pool: Pool, granularity: str, on: str, *, shared: bool = False) -> Iterator[ModuleFrame]:
    """The frame of every module of a pool; costs one pass over the factors (two for signs of components), less what the
    Gram cache in use has. ``shared``: where several ranks work together, of this one's modules only."""
    if granularity not in GRANULARITIES:
        raise InputError(f"granularity={granularity!r} does not exist: use one of {', '.join(GRANULARITIES)}")
    if on not in SIDES:
        raise InputError(f"on={on!r} does not exist: use 'product' (ΔW), 'B' or 'A'")
    k = len(pool)
    for blocks in read_pair_blocks(pool, "decoupling", shared=shared):
        forms = components.forms(blocks) if granularity == "component" else None
        for g, name in enumerate(blocks.modules):
            updates: list[Update | None] = [None] * k
            for i, member in enumerate(blocks.members):
                updates[member] = blocks.updates[g][i]
            module = ModulatedModule(name, tuple(pool.names), updates, blocks.members, blocks.left[g], blocks.right[g])
            parts = None if forms is None else components.of_module(forms[g], module, on)
            events: Counter[str] = Counter()
            if granularity == "component":
                assert parts is not None
                member_gram = components.gram(parts, on)
                if k > 1 and components.is_ambiguous(parts):
                    events["modules with equal singular values, whose components are not unique"] += 1
            elif granularity == "column":
                member_gram = columns.gram(module, on)
            else:
                member_gram = _matrix_gram(module, on)
            index = torch.tensor(blocks.members)
            full = torch.zeros(k, k, member_gram.shape[-1], dtype=torch.float64)
            full[index[:, None], index] = member_gram
            yield ModuleFrame(module, full, parts, events, granularity, on)
            release(sources(module.present))


def _matrix_gram(module: ModulatedModule, on: str) -> Tensor:
    """``⟨X_k, X_l⟩`` of whole matrices: ``[k, k, 1]``."""
    if on == "product":
        products = module.scaled((module.left * module.right).sum((-1, -2)))
        # A norm of that many singular values which are rounding of what a lazy update was computed from is rounding.
        noise = torch.tensor([u.noise.rounding * u.rank**0.5 for u in module.present], dtype=torch.float64)
        real = products.diagonal() > noise.square()
        products = torch.where(real[:, None] & real, products, 0.0)
    elif on == "B":
        module.require_equal_ranks("granularity='matrix', on='B'")
        products = module.scaled(module.left.diagonal(dim1=-2, dim2=-1).sum(-1))
    else:
        module.require_equal_ranks("granularity='matrix', on='A'")
        products = module.right.diagonal(dim1=-2, dim2=-1).sum(-1)
    return products[..., None]


def _matrix_update(module: ModulatedModule, weights: Tensor, on: str) -> Update:
    values: Sequence[float] = weights.tolist()
    if on == "product":
        return combine_updates(
            [(w, u) for w, u in zip(values, module.updates, strict=True) if u is not None], module.name
        )
    return module.factor_sum([w * torch.ones(1, dtype=torch.float64) for w in values], on)
