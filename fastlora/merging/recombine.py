"""DoRAs of one base model as one: directions are added as LoRAs are, magnitudes as far as they differ from norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastlora.adapters.base_weights import BaseWeights, square_norms
from fastlora.adapters.dora import DoRA
from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.data import DoraData, Magnitude
from fastlora.core.updates import Update
from fastlora.engine import shares
from fastlora.engine.materialise import materialise
from fastlora.errors import InputError, NonFiniteError
from fastlora.files.checkpoint import ModelSource
from fastlora.merging.merge import full_weights, merge
from fastlora.runtime import memory, ranks
from fastlora.runtime.progress import track

RESCALED = ("linear", "conv", "embedding")
"""Layouts whose weights a magnitude can rescale; there is none for experts in one parameter."""


def recombine(
    adapters: Sequence[DoRA | Adapter],
    weights: Mapping[str, float] | None = None,
    *,
    base: ModelSource,
    rank: int | None = None,
    energy: float | None = None,
) -> DoRA:
    """One DoRA of several on the same base model: a definition of this project, not of a paper.

        V = W + Σ_i w_i s_i B_i A_i,   m = m_0 + Σ_i w_i (m_i − m_0),   m_0 = ‖W‖,   W' = m V / ‖V‖

    Norms are of rows, or of input channels where magnitudes are. A LoRA is the DoRA of the same weights, with
    ``m_i = ‖W + s_i B_i A_i‖``, so that plain adapters, and plain modules of a DoRA, can take part. One adapter with
    the weight 1 gives itself, no adapter the base model. This is not the sum of what the adapters change: that is
    :func:`fastlora.to_lora` of each and :func:`fastlora.merge`.

    Args:
        adapters: DoRA and LoRA adapters with names of their own. Their modules are aligned as :class:`Pool` does it.
        weights: ``{name: w_i}``, finite numbers; ``None`` gives every adapter the weight 1.
        base: their base model: a state dict, a file of tensors or a model's directory.
        rank, energy: cut the sum of the directions, as ``fl.merge(method="svd")`` does; by default it is exact, and of
            rank ``Σ_i r_i``. Magnitudes do not depend on it.

    Returns:
        :class:`DoRA`. Modules that no adapter has a magnitude for stay plain sums; where all magnitudes are of outputs,
        they get that of the plain sum, ``‖V‖``, since a PEFT directory has one for every module.

    Raises:
        InputError: what :func:`fastlora.merge` refuses; adapters without any magnitude; a module whose magnitudes are
            of rows in one adapter and of columns in another, or whose weights are fused in one only; a base model that
            cannot be read or is another one.
        NonFiniteError: NaN or Inf in the base model or an adapter.

    Cost: one pass over every rescaled weight of the base model, one more for every plain adapter of it, and
    the sum of the directions.
    """
    given = list(adapters)
    if not any(isinstance(a, DoRA) and a.magnitudes for a in given):
        raise InputError(
            "recombine: no adapter has magnitudes, so this is a sum of LoRAs; use `fl.merge` or `fastlora merge`"
        )
    pool = directions(given)
    counted, notes = full_weights(pool, weights)
    cut = rank is not None or energy is not None
    merged = merge(pool, counted, method="svd" if cut else "cat", rank=rank, energy=energy)
    updates = merged.updates
    found = [_magnitudes(a, p) for a, p in zip(given, pool.adapters, strict=True)]
    forms = _forms(pool, found)
    model = BaseWeights(DoraData(merged.name, updates, {}, base=merged.base), forms, base)

    def work() -> dict[str, Tensor]:
        sizes = [updates[m].shape[0] * updates[m].shape[1] for m in forms]
        return {m: combined(m) for m in track(ranks.own(list(forms), sizes), "magnitudes")}

    def combined(module: str) -> Tensor:
        weight = model.weight(module)
        form = forms[module]
        if form.is_plain:
            vector = form.norms(weight, updates[module], module)
        else:
            own = form.norms(weight, None, module)
            vector = own.clone()
            for adapter, magnitudes in zip(pool.adapters, found, strict=True):
                if module not in adapter:
                    continue
                stored = magnitudes.get(module)
                if stored is not None:
                    theirs = stored.vector.double().flatten()
                else:
                    theirs = form.norms(weight, adapter.updates[module], module)
                vector += counted[adapter.name] * (theirs - own)
        memory.release([weight])
        return vector

    vectors = shares.each("magnitudes", work, (), repr([(m, u.shape) for m, u in updates.items()]))
    negative = sum(int((v <= 0).sum()) for v in vectors.values())
    if negative:
        total = sum(v.numel() for v in vectors.values())
        notes.append(
            f"{negative} of {total} magnitudes are 0 or negative, which turns outputs round; lower the weights"
        )
    return DoRA(
        merged.name,
        updates,
        {m: Magnitude(vectors[m].view(forms[m].shape), forms[m].axis) for m in updates if m in forms},
        extras=merged.extras,
        base=merged.base,
        dtype=merged.dtype,
        provenance={
            "recombine": [{"weight": counted[a.name], "of": a.provenance} for a in given],
            "parameters": {"rank": rank, "energy": energy},
        },
        notes=tuple(dict.fromkeys([*pool.told, *merged.notes, *model.notes, *notes])),
    )


def directions(adapters: Sequence[DoRA | Adapter]) -> Pool:
    """The updates ``s_i B_i A_i`` of all as a pool: DoRAs without their magnitudes."""
    return Pool(a if isinstance(a, Adapter) else _direction(a) for a in adapters)


def _direction(dora: DoRA) -> Adapter:
    return Adapter(
        dora.name,
        dora.updates,
        extras=dora.extras,
        base=dora.base,
        dtype=dora.dtype,
        provenance=dora.provenance,
        notes=dora.notes,
    )


@dataclass(frozen=True, slots=True)
class _Form:
    """What the magnitudes of a module are of, rows or columns, and their shape in files. ``is_plain``: no adapter has
    any."""

    axis: Literal["out", "in"]
    shape: tuple[int, ...]
    is_plain: bool

    def norms(self, weight: Tensor, update: Update | None, module: str) -> Tensor:
        """``‖W + s B A‖``, or ``‖W‖``."""
        n, m = weight.shape
        left, right = torch.zeros(n, 0), torch.zeros(0, m)
        if update is not None:
            left, right = materialise([update.baked()], torch.float32)[0]
        squares = square_norms(weight, self.axis, math.prod(self.shape), left.double(), right.double())
        if not bool(squares.isfinite().all()):
            raise NonFiniteError(f"{module} holds NaN or Inf in the base model or in an adapter; save both again")
        return squares.sqrt()


def _magnitudes(adapter: DoRA | Adapter, pooled: Adapter) -> dict[str, Magnitude]:
    """The magnitudes of an adapter under the names that its modules have in the pool."""
    if isinstance(adapter, Adapter):
        return {}
    names = {id(update): module for module, update in pooled.updates.items()}
    found = {}
    for module, magnitude in adapter.magnitudes.items():
        name = names.get(id(adapter.updates[module]))
        if name is None:  # the pool has made other updates of it
            raise InputError(
                f"recombine: {module} of DoRA adapter {adapter.name!r} is stored in another form than in the other "
                "adapters (fused, or in parts), and so are its magnitudes; make LoRAs of them first, with "
                "`fl.to_lora(adapter, BASE)` or `--dora nearest`"
            )
        found[name] = magnitude
    return found


def _forms(pool: Pool, found: Sequence[Mapping[str, Magnitude]]) -> dict[str, _Form]:
    """The modules of the result that have magnitudes."""
    forms: dict[str, _Form] = {}
    every = all(m.axis == "out" for magnitudes in found for m in magnitudes.values())
    for module in pool.modules:
        owners = [(n, magnitudes[module]) for n, magnitudes in zip(pool, found, strict=True) if module in magnitudes]
        if not owners:
            update = pool.adapters[pool.present(module)[0]].updates[module]
            if every and update.layout.kind in RESCALED:
                forms[module] = _Form("out", (update.shape[0],), is_plain=True)
            continue
        name, first = owners[0]
        for other, magnitude in owners[1:]:
            if (magnitude.axis, magnitude.vector.numel()) != (first.axis, first.vector.numel()):
                raise InputError(
                    f"recombine: {module} has {first.vector.numel()} magnitudes of its {_AXES[first.axis]} in "
                    f"{name!r}, and {magnitude.vector.numel()} of its {_AXES[magnitude.axis]} in {other!r}; make LoRAs "
                    "of them first, with `fl.to_lora(adapter, BASE)` or `--dora nearest`"
                )
        forms[module] = _Form(first.axis, first.shape, is_plain=False)
    return forms


_AXES = {"out": "outputs", "in": "inputs"}
