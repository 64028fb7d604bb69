"""Adapters as data: records without verbs, which formats make and the engine computes on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastlora.core.deferred import Deferred
from fastlora.core.file_form import FileForm
from fastlora.core.model_facts import ModelFacts
from fastlora.core.updates import Update


@dataclass(frozen=True, slots=True, eq=False)
class Extra:
    """A parameter of an adapter that is no ``[out, in]`` update.

    ``delta``: it is added to the base model's parameter (``lora_bias``), so it takes part in arithmetic.
    ``value``: it replaces the base model's parameter (``modules_to_save``, trained biases), whose change is unknown
    without the base model, so it can be kept but not combined.
    """

    kind: Literal["delta", "value"]
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Selection:
    """How configurations chose the modules of adapters. A result keeps it where it still chooses what the result has.

    ``modules``, ``parameters``: ends of paths. What equals one of them, or ends with one after a dot, was chosen.
    ``verbatim``: the fields of a configuration that chooses in another way (by a pattern, by layers, with exclusions),
    as JSON; it is of use only as a whole.
    """

    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    verbatim: str = ""


def joined_selection(selections: Sequence[Selection]) -> Selection:
    """What chooses the modules of all: one selection where they agree, else the ends of paths of every one."""
    first = selections[0]
    if all(s == first for s in selections):
        return first
    parameters = tuple(dict.fromkeys(p for s in selections for p in s.parameters))
    if any(s.verbatim for s in selections):
        return Selection(parameters=parameters)
    return Selection(tuple(dict.fromkeys(m for s in selections for m in s.modules)), parameters)


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """What an adapter says about the model it belongs to; carried through every operation.

    ``settled``: names of its modules that were given by hand, and are not compared with others that end alike.
    ``form``: how the single file spelled it that it was read from; ``None`` for what no such file is behind.
    """

    model: str | None = None
    revision: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    layer_replication: tuple[tuple[int, int], ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    selection: Selection = Selection()
    settled: frozenset[str] = frozenset()
    form: FileForm | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """``l`` of one module, as it is stored.

    ``feedforward``: it scales the inputs, ``y = W (l ∘ x) + b``. Otherwise it scales the outputs, the bias with them:
    ``y = l ∘ (W x + b)``. ``vector``: ``[1, in]`` or ``[out, 1]`` for linear modules, ``[1, channels, 1, …]`` for
    convolutions; in the dtype of the file, float64 for results.
    """

    vector: Tensor
    feedforward: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ``vector`` as it is stored."""
        return tuple(self.vector.shape)

    @property
    def scales(self) -> str:
        """What is scaled, in words."""
        return "inputs" if self.feedforward else "outputs and bias"


@dataclass(frozen=True, eq=False)
class AdapterData:
    """What every kind says of itself. Records are frozen: another one is made by :func:`dataclasses.replace`.

    ``provenance``: how it came about, as plain data; it is saved. ``notes``: what a user should know, in sentences.
    ``details``: what was measured while it was made, such as the energy that a compression kept; it is not saved.
    """

    name: str
    _: KW_ONLY
    provenance: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.provenance:
            object.__setattr__(self, "provenance", {"adapter": self.name})
        object.__setattr__(self, "notes", tuple(self.notes))


@dataclass(frozen=True, eq=False)
class ModulesData(AdapterData):
    """A kind that adapts modules of a base model.

    ``extras``: what it holds beside them. ``dtype``: the widest of what it was read from, in which it is saved by
    default.
    """

    _: KW_ONLY
    extras: Mapping[str, Extra] = field(default_factory=dict)
    base: BaseInfo = BaseInfo()
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False)
class LoraData(ModulesData):
    """A low-rank adapter: ``updates {module: Update}``, named by the modules' paths in the base model.

    The updates of an adapter that was read may be made when they are first looked at: a pool of hundreds has thousands
    of tensors, and many who load it want some of them.
    """

    updates: Mapping[str, Update]

    def __getstate__(self) -> dict[str, object]:
        return {"updates": self.updates, **self.__dict__}  # for copies and pickles: all that may still be to make

    @property
    def modules(self) -> list[str]:
        """Module paths, in the order of the file."""
        return list(self.updates)

    @property
    def place(self) -> torch.device | None:
        """Where the matrices are: those of an adapter are together. ``None`` without any, as in what is shared by
        adapters that share nothing: it can be computed with anywhere."""
        for update in self.updates.values():
            for terms in (update.B.terms, update.A.terms):
                if terms:
                    return terms[0].source.device
        return None

    @property
    def device(self) -> torch.device:
        """Where the matrices are; an adapter without matrices is on the CPU."""
        return self.place or torch.device("cpu")

    def __contains__(self, module: object) -> bool:
        return module in self.updates

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)


# Behind the back of the dataclass, which would take it for a default.
LoraData.updates = Deferred("updates")  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Ia3Data(ModulesData):
    """An (IA)³ adapter: ``vectors {module: Scaling}``."""

    vectors: Mapping[str, Scaling]

    @property
    def modules(self) -> list[str]:
        """Module paths, in the order of the file."""
        return list(self.vectors)

    def __contains__(self, module: object) -> bool:
        return module in self.vectors

    def __iter__(self) -> Iterator[str]:
        return iter(self.vectors)


@dataclass(frozen=True, slots=True, eq=False)
class Magnitude:
    """``m`` of one module of a DoRA, as it is stored.

    The module's weight becomes ``m · (W + ΔW) / ‖W + ΔW‖``, with one norm for each output (``axis="out"``, ``m`` has
    ``out`` numbers) or for each input channel (``axis="in"``). What that changes depends on the base weight ``W``.
    """

    vector: Tensor
    axis: Literal["out", "in"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ``vector`` as it is stored."""
        return tuple(self.vector.shape)


@dataclass(frozen=True, eq=False)
class DoraData(ModulesData):
    """A DoRA: ``updates {module: Update}`` as a LoRA has them, and ``magnitudes {module: Magnitude}`` for some of these
    modules, the others being plain. It is no :class:`LoraData`: what it changes is not ``s·B·A``."""

    updates: Mapping[str, Update]
    magnitudes: Mapping[str, Magnitude]

    @property
    def modules(self) -> list[str]:
        """Module paths, in the order of the file."""
        return list(self.updates)

    def __contains__(self, module: object) -> bool:
        return module in self.updates

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)


@dataclass(frozen=True, eq=False)
class DeltaData(AdapterData):
    """The change of every parameter of a model: ``deltas {parameter: change}``. ``values``: parameters that are kept
    whole, as the fine-tune has them. ``facts``: what the models say about all of these."""

    deltas: Mapping[str, Tensor]
    _: KW_ONLY
    values: Mapping[str, Tensor] = field(default_factory=dict)
    facts: ModelFacts = field(default_factory=ModelFacts)

    def __post_init__(self) -> None:
        if not self.provenance:
            object.__setattr__(self, "provenance", {"task_vector": self.name})
        super().__post_init__()

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that change."""
        return list(self.deltas)

    @property
    def norm(self) -> float:
        """``‖τ‖``, over all parameters."""
        return math.sqrt(sum(float(d.double().square().sum()) for d in self.deltas.values()))

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.deltas

    def __iter__(self) -> Iterator[str]:
        return iter(self.deltas)
