"""Adapters as data: records without verbs, which formats make and the engine computes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


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
class BaseInfo:
    """What an adapter says about the model it belongs to; carried through every operation."""

    model: str | None = None
    revision: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    layer_replication: tuple[tuple[int, int], ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"


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
        return tuple(self.vector.shape)

    @property
    def scales(self) -> str:
        """What is scaled, in words."""
        return "inputs" if self.feedforward else "outputs and bias"
