"""A LoRA adapter from a task vector: the truncated singular value decomposition of every weight's change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastlora.adapters.cuts import Cut, Job, computed
from fastlora.adapters.differences import DenseChange, ParameterChange
from fastlora.adapters.lora import Adapter
from fastlora.adapters.peft_parts import MOST_BEYOND, fused, saved_modules, selection, with_later_names
from fastlora.core.architectures import (
    BIAS,
    DEPTHWISE,
    EXPERT_MODULES,
    EXPERT_NUMBER,
    FUSED_NAMES,
    LOOKS_LIKE_CONV1D,
    OFFSET_EMBEDDING,
    WEIGHT,
    is_embedding,
    is_head,
)
from fastlora.core.data import BaseInfo, DeltaData, Extra
from fastlora.core.dtypes import parse_dtype
from fastlora.core.factors import Factor
from fastlora.core.model_facts import ModelFacts
from fastlora.core.updates import EMBEDDING, LINEAR, Layout, Update
from fastlora.engine.low_rank import LowRank, low_rank
from fastlora.engine.tile_source import TileSource
from fastlora.errors import InputError, NonFiniteError
from fastlora.files.shards import listed


@dataclass(frozen=True, slots=True, eq=False)
class ModelChange:
    """The changes of a model's parameters: see :class:`fastlora.core.data.DeltaData`."""

    name: str
    deltas: Mapping[str, ParameterChange]
    values: Mapping[str, Tensor]
    facts: ModelFacts
    notes: tuple[str, ...]
    provenance: Mapping[str, object]

    @classmethod
    def of(cls, vector: DeltaData) -> ModelChange:
        """That of a task vector, whose changes are in memory."""
        deltas = {p: DenseChange(d) for p, d in vector.deltas.items()}
        return cls(vector.name, deltas, vector.values, vector.facts, tuple(vector.notes), vector.provenance)


def cut_change(
    vector: ModelChange,
    rank: int | None = None,
    *,
    energy: float | None = None,
    embeddings: Sequence[str] | None = None,
    fan_in_fan_out: bool | None = None,
    biases: bool = False,
    base_model: str | None = None,
    exact: bool = False,
    seed: int = 0,
) -> Adapter:
    """The best approximation ``B A`` of the change of every weight matrix, at most of ``rank`` or with at least the
    share ``energy`` of ``Σσ²`` (Eckart–Young); ``B = U√Σ``, ``A = √ΣVᵀ``.

    embeddings: ends of the paths of modules that are embeddings, whose weight is ``[vocabulary, dim]``; by default the
        usual names.
    fan_in_fan_out: whether weights are ``[in, out]`` (``Conv1D``); by default what the models say, module by module.
    biases: keep the changes of the biases of these modules (``lora_bias`` of PEFT).
    base_model: what the adapter names as its base model.

    exact, seed: as :func:`fastlora.engine.low_rank.low_rank` takes them.

    Only ``<module>.weight`` of two dimensions or more (convolutions) and fused experts can be approximated; a note says
    what was left out, and ``provenance`` what share of ``‖τ‖²`` is kept. Costs a decomposition of every weight.
    """
    check_cut(rank, energy)
    vector = replace(vector, deltas=fused(vector.name, vector.deltas, vector.facts))
    cutter = _Cutter(vector, rank, energy, embeddings, fan_in_fan_out, exact, seed)
    if biases:
        cutter.require_biases()
    cutter.compute()
    for parameter, delta in vector.deltas.items():
        cutter.add(parameter, delta)
    extras: dict[str, Extra] = {}
    for parameter, delta in vector.deltas.items():
        module = parameter.removesuffix(BIAS)
        if biases and module in cutter.updates and len(delta.shape) == 1 and module != parameter:
            extras[parameter] = Extra("delta", delta.dense())
            cutter.kept += cutter.lost_sizes.pop(parameter)
            del cutter.lost[parameter]
    extras |= {name: Extra("value", value) for name, value in vector.values.items()}
    if not cutter.updates:
        whole = "" if not vector.values else "; PEFT needs one: keep fewer parameters whole"
        raise InputError(
            f"extract: task vector {vector.name!r} changes no weight matrix{_reasons(cutter.lost)}; there is nothing "
            f"to extract{whole}"
        )
    cutter.add_still_experts()
    updates = with_later_names(cutter.updates)
    return Adapter(
        vector.name,
        updates,
        extras=extras,
        base=BaseInfo(
            model=base_model,
            task_type=vector.facts.task_type,
            fan_in_fan_out=cutter.flipped,
            modules_to_save=saved_modules(vector.values, vector.facts.task_type),
            selection=selection(updates, cutter.others()),
        ),
        dtype=parse_dtype(None, torch.float32),
        provenance={
            "extract": vector.provenance,
            "rank": rank,
            "energy": energy,
            "retained_energy": None if vector.facts.unknown else cutter.share(),
        },
        notes=(*vector.notes, *cutter.notes(biases)),
    )


def check_cut(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise InputError("extract: give rank=N or energy=X (the share of Σσ² to keep), one of the two")
    if rank is not None and rank < 1:
        raise InputError(f"extract: rank={rank} must be at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise InputError(f"extract: energy={energy} must be above 0 and at most 1")


@dataclass(slots=True, eq=False)
class _Cutter:
    """Cuts one change after the other, and keeps the books: what is kept, and what is lost for which reason."""

    vector: ModelChange
    rank: int | None
    energy: float | None
    embeddings: Sequence[str] | None
    fan_in_fan_out: bool | None
    exact: bool
    seed: int
    cuts: dict[str, Cut] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)
    updates: dict[str, Update] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)
    lost_sizes: dict[str, float] = field(default_factory=dict)
    kept: float = 0.0
    total: float = 0.0
    flipped: bool = False
    assumed: list[str] = field(default_factory=list)

    def require_biases(self) -> None:
        """Refuses biases beside embeddings and experts, which PEFT has in no adapter together."""
        changed = [p for p, d in self.vector.deltas.items() if p.endswith(BIAS) and len(d.shape) == 1]
        cut = [p for p, d in self.vector.deltas.items() if self._has_no_bias(p, d)]
        if cut and any(p.removesuffix(BIAS) + WEIGHT in self.vector.deltas for p in changed):
            raise InputError(
                f"extract: task vector {self.vector.name!r} changes biases ({changed[0]}) and {cut[0]}, and PEFT has "
                "no adapter with changes of biases (lora_bias) and of embeddings or experts; leave biases out "
                "(biases=False, without --biases), or keep the other whole (whole=, --whole)"
            )

    def _has_no_bias(self, parameter: str, delta: ParameterChange) -> bool:
        """Whether a parameter becomes an embedding or an expert of an adapter."""
        if _is_experts(parameter, delta):
            return True
        module = parameter.removesuffix(WEIGHT)
        is_cut = module != parameter and 2 <= len(delta.shape) <= 5 and self._unsuited(module, delta) is None
        return is_cut and self._layout(module, delta).kind in ("embedding", "expert")

    def compute(self) -> None:
        """Cuts and measures every change, for :meth:`add`."""
        jobs = [job for parameter, delta in self.vector.deltas.items() for job in self._jobs(parameter, delta)]
        self.cuts, self.squares = computed(jobs, self._cut, self.rank, exact=self.exact)

    def _jobs(self, parameter: str, delta: ParameterChange) -> list[Job]:
        if _is_experts(parameter, delta):
            return [Job(f"{parameter}[{expert}]", delta, expert) for expert in range(delta.shape[0])]
        return [Job(parameter, delta, cut=self._why_lost(parameter, delta) is None)]

    def _why_lost(self, parameter: str, delta: ParameterChange) -> str | None:
        """Why a change has no place in an adapter, if so."""
        module = parameter.removesuffix(WEIGHT)
        if module == parameter:
            return "no weight matrix"
        return self._unsuited(module, delta) or (None if 2 <= len(delta.shape) <= 5 else "no weight matrix")

    def add(self, parameter: str, delta: ParameterChange) -> None:
        """Cuts the change of a parameter, and of those that are tied to it."""
        tied = [p for p, source in self.vector.facts.ties.items() if source == parameter]
        module = parameter.removesuffix(WEIGHT)
        if _is_experts(parameter, delta):
            self._add_experts(parameter, delta)
            return
        reason = self._why_lost(parameter, delta)
        if reason is not None:
            self.lost[parameter] = reason
            size = self.squares[parameter]
            if not math.isfinite(size):
                raise self._not_finite(parameter)
            self.lost_sizes[parameter] = size
            self.total += (1 + len(tied)) * size
            return
        layout = self._layout(module, delta)
        found = self.cuts[parameter]
        self.total += (1 + len(tied)) * found.total
        turned = layout == EMBEDDING or self._is_flipped(module, layout)
        left, right, *_ = found.turned if turned else found
        self._put(f"{layout.container}[0]" if layout.container else module, left, right, layout)
        self.kept += (1 + len(tied)) * found.kept
        self.done.add(parameter)
        for other in (p.removesuffix(WEIGHT) for p in tied):
            # ΔW of a head is that of the embedding: [vocabulary, dim] for [dim, vocabulary].
            other_layout = self._layout(other, delta)
            same = other_layout == layout
            self._put(other, *((left, right) if same else (right.mT, left.mT)), other_layout)

    def _put(self, module: str, left: Tensor, right: Tensor, layout: Layout) -> None:
        b, a = left.contiguous(), right.contiguous()
        self.updates[module] = Update(Factor.of("B", b), Factor.of("A", a), 1.0, layout)

    def _add_experts(self, parameter: str, delta: ParameterChange) -> None:
        """Fused experts ``[experts, out, in]``, as PEFT 0.19 and later takes them."""
        for expert in range(delta.shape[0]):
            found = self.cuts[f"{parameter}[{expert}]"]
            left, right, *_ = found.turned if self.vector.facts.in_out_experts else found
            self.total += found.total
            self.kept += found.kept
            layout = Layout("expert", container=parameter, expert=expert, experts=delta.shape[0])
            self._put(f"{parameter}[{expert}]", left, right, layout)
        self.done.add(parameter)

    def _layout(self, module: str, delta: ParameterChange) -> Layout:
        if len(delta.shape) > 2:
            return Layout("conv", kernel=tuple(delta.shape[2:]))
        if module in self.vector.facts.by_parameter:
            return Layout("expert", container=module + WEIGHT)
        if self.embeddings is None:
            return EMBEDDING if is_embedding(module) else LINEAR
        return EMBEDDING if module.endswith(tuple(self.embeddings)) and self.embeddings else LINEAR

    def _is_flipped(self, module: str, layout: Layout) -> bool:
        """Whether a weight is ``[in, out]``; heads of models that have such weights are ``[out, in]``."""
        if layout != LINEAR:
            return False
        if self.fan_in_fan_out is None:
            flipped = module in self.vector.facts.in_out
            self.assumed += [module] if module in self.vector.facts.assumed else []
        elif any(LOOKS_LIKE_CONV1D.fullmatch(p.removesuffix(WEIGHT)) for p in self.vector.deltas):
            flipped = self.fan_in_fan_out and LOOKS_LIKE_CONV1D.fullmatch(module) is not None
        else:
            flipped = self.fan_in_fan_out and not is_head(module)
        self.flipped |= flipped
        return flipped

    def _cut(self, matrix: TileSource, key: str) -> LowRank:
        """``B`` and ``A`` in float64; what is far below ``σ_max`` is rounding."""
        key = f"{self.seed}:{key}"
        try:
            return low_rank(matrix, self.rank, self.energy, key=key, exact=self.exact)
        except NonFiniteError:
            raise self._not_finite(key.partition(":")[2]) from None

    def _not_finite(self, parameter: str) -> NonFiniteError:
        return NonFiniteError(
            f"task vector {self.vector.name!r}: the change of {parameter} holds NaN or Inf, or numbers whose "
            "squares are beyond float64; save the models again"
        )

    def _unsuited(self, module: str, delta: ParameterChange) -> str | None:
        """Why PEFT cannot adapt a weight of such a module."""
        if module in self.vector.facts.unsuited:
            return "PEFT adapts no such module of this architecture; keep it whole (whole=, --whole)"
        if OFFSET_EMBEDDING.fullmatch(module) and len(delta.shape) == 2:
            return "PEFT adapts no embedding of such a class; keep it whole (whole=, --whole)"
        if len(delta.shape) > 2 and delta.shape[1] == 1 and DEPTHWISE.fullmatch(module):
            return "PEFT has no low-rank update of a convolution in groups; keep it whole (whole=, --whole)"
        if len(delta.shape) == 3 and module.rpartition(".")[2] in EXPERT_MODULES:
            return "experts in one tensor, whose name differs between versions of transformers"
        return None

    def others(self) -> list[str]:
        """Modules with weights that are not adapted."""
        lost = (p.removesuffix(WEIGHT) for p in self.lost if p.endswith(WEIGHT))
        whole = (p.rpartition(".")[0] for p in self.vector.values)
        return [m for m in (*self.vector.facts.still, *lost, *whole) if m not in self.updates]

    def add_still_experts(self) -> None:
        """Updates of rank 0 for experts that did not change: readers that stack experts need all of them."""
        containers = {m[1] for m in map(EXPERT_NUMBER.fullmatch, self.updates) if m is not None}
        for module, shape in self.vector.facts.still.items():
            match = EXPERT_NUMBER.fullmatch(module)
            if match is not None and match[1] in containers and module not in self.updates:
                if max(shape) > MOST_BEYOND * max(max(u.shape) for u in self.updates.values()):
                    raise InputError(
                        f"task vector {self.vector.name!r}: {module} {list(shape)} is far larger than what changed; "
                        "make the task vector again from both models"
                    )
                self._put(module, torch.zeros(shape[0], 0), torch.zeros(0, shape[1]), LINEAR)

    def share(self) -> float:
        """The share of ``‖τ‖²`` that is kept."""
        everything = self.total + self.vector.facts.excluded
        return min(self.kept / everything, 1.0) if everything else 1.0

    def notes(self, biases: bool) -> list[str]:
        """What was assumed and what is lost."""
        found = []
        if self.assumed:
            found.append(
                f"extract: no config.json says how the weights of {listed(self.assumed)} lie, so they were taken for "
                "[out, in]; give fan_in_fan_out=True (--fan-in-fan-out) for [in, out] (Conv1D)"
            )
        if self.lost:
            everything = self.total + self.vector.facts.excluded
            size = sum(self.lost_sizes.values()) / everything if everything else 0.0
            way = "" if biases else "; biases=True keeps biases"
            found.append(
                f"extract: the changes of {len(self.lost)} parameters that are no weight matrices "
                f"({next(iter(self.lost))}, …) are left out, {100 * size:.2g} % of ‖τ‖²{way}; whole= keeps more"
            )
            for reason in dict.fromkeys(r for r in self.lost.values() if r != "no weight matrix"):
                members = [p for p, r in self.lost.items() if r == reason]
                found.append(f"extract: {listed(members)}: {reason}")
        return found


def _is_experts(parameter: str, delta: ParameterChange) -> bool:
    """Whether a tensor is experts in one, and no convolution."""
    return len(delta.shape) == 3 and parameter.rpartition(".")[2] in FUSED_NAMES


def _reasons(lost: Mapping[str, str]) -> str:
    told: Iterable[str] = dict.fromkeys(r for r in lost.values() if r != "no weight matrix")
    return "".join(f" ({reason})" for reason in told)
