"""The modulator: operators on directions and magnitudes, as small programs on inner products.

What is decoupled are vectors at *places* (columns, components, or one whole matrix). Every adapter involved has one
vector ``x_k`` a place; a direction is a combination of them, so an operator needs their inner products alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastlora import ops
from fastlora.adapters.dora import DoRA, refused
from fastlora.adapters.lora import Adapter
from fastlora.errors import InputError

# A sum of vectors that is shorter than this, relative to what it is computed from, is rounding and no direction.
FLOOR = 1e-6
# Eigenvalues of the Gram matrix of unit vectors at or below it: the vectors do not differ.
SPAN = 1e-10


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Direction and magnitude at the ``P`` places of one module.

    ``gram [K, K, P]``: ``⟨x_k, x_l⟩``. ``weights [K, P]``: the modulated vector is ``Σ_k weights_k x_k``. ``magnitude
    [P]``: its norm ``μ``; its direction is ``D = Σ_k (weights_k / μ) x_k``. All float64. ``idle [K, P]``: ``D`` at
    places where ``μ`` was scaled to zero. ``events``: what users should know, counted.
    """

    gram: Tensor
    weights: Tensor
    magnitude: Tensor
    idle: Tensor | None = None
    events: Counter[str] = field(default_factory=Counter)

    @property
    def direction(self) -> Tensor:
        """Coefficients of ``D``: ``[K, P]``."""
        direction = _divided(self.weights, self.magnitude)
        return direction if self.idle is None else torch.where(self.magnitude > 0, direction, self.idle)

    def unit(self, index: int) -> Tensor:
        """Coefficients of the direction of adapter ``index`` as it was decoupled: ``[K, P]``."""
        result = torch.zeros_like(self.weights)
        norm = self.gram[index, index].sqrt()
        result[index] = _divided(torch.ones_like(norm), norm)
        return result

    def dot(self, first: Tensor, second: Tensor) -> Tensor:
        """Inner products of two combinations: ``[P]``."""
        return torch.einsum("kp,klp,lp->p", first, self.gram, second)

    def normalised(self, combination: Tensor, terms: Sequence[Tensor]) -> Tensor:
        """The combination at unit length, or zero where nothing but rounding is left of it: relative to the lengths of
        the ``terms`` that it is the sum of, since coefficients of one adapter cancel in it."""
        norm = self.dot(combination, combination).clamp(min=0).sqrt()
        lengths = self.gram.diagonal(dim1=0, dim2=1).mT.sqrt()  # [K, P]
        size = sum((term.abs() * lengths).sum(0) for term in terms)
        return _divided(combination, torch.where(norm > FLOOR * size, norm, 0.0))

    def turned(self, direction: Tensor, magnitude: Tensor) -> State:
        """The state of a new direction and magnitude; a zero direction has no magnitude."""
        magnitude = magnitude * direction.any(0)
        idle = direction * self.direction.any(0)
        return replace(self, weights=direction * magnitude, magnitude=magnitude, idle=idle)

    def scaled(self, sign: float, strength: float) -> State:
        """The state with the direction times ``sign`` and the magnitude times ``strength``."""
        idle = sign * self.direction if strength == 0 else None if self.idle is None else sign * self.idle
        weights, magnitude = sign * strength * self.weights, strength * self.magnitude
        return replace(self, weights=weights, magnitude=magnitude, idle=idle)

    def count(self, what: str, places: Tensor) -> None:
        """Counts places where something happened that users should know."""
        number = int(places.sum())
        if number:
            self.events[what] += number


def _divided(values: Tensor, by: Tensor) -> Tensor:
    return torch.where(by > 0, values / by, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """One operator: its ``name``, its ``strength``, and the ``others``, the adapters that it looks at."""

    name: str
    strength: float
    others: tuple[Adapter, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing, whatever it is applied to: it is then left out, not computed."""
        if self.name == "scale":
            return self.strength == 1.0
        if self.name == "shift" and self.others[0] is self.others[1]:
            return True
        return self.name != "reverse" and self.strength == 0.0

    def run(self, state: State, others: Sequence[int]) -> State:
        """The ``state`` after it; ``others``: places of its adapters in the Gram matrix."""
        return _RUN[self.name](state, self.strength, others)


def reverse(strength: float = 1.0) -> Operator:
    """Turns every direction around, for unlearning: ``D' = −D``, ``μ' = λμ``.

    Args:
        strength: ``λ ≥ 0``.

    Raises:
        InputError: a strength that is negative or not finite.
    """
    return Operator("reverse", _not_negative("reverse", strength))


def scale(strength: float) -> Operator:
    """Scales every magnitude: ``D' = D``, ``μ' = λμ``.

    Args:
        strength: ``λ ≥ 0``; the identity at 1.

    Raises:
        InputError: a strength that is negative or not finite.
    """
    return Operator("scale", _not_negative("scale", strength))


def shift(source: Adapter, target: Adapter, strength: float = 1.0) -> Operator:
    """Moves every direction as two adapters differ, for transfer: ``D' = normalise(D + λ (D_target − D_source))``.

    Magnitudes stay, ``μ' = μ``.

    Args:
        source, target: LoRA adapters of the same base model.
        strength: ``λ``; the identity at 0.

    Raises:
        InputError: something that is no LoRA adapter, a strength that is not finite.
    """
    require_adapters("shift", source, target)
    return Operator("shift", _finite("shift", strength), (source, target))


def interpolate(other: Adapter, t: float) -> Operator:
    """Goes from the adapter to another one: spherically on ``D``, linearly on ``μ``.

    With the angle ``θ`` between two directions, ``D' = (sin((1−t)θ) D + sin(tθ) D_other) / sin θ`` and
    ``μ' = (1−t) μ + t μ_other``. Opposite directions have no shortest way between them: there the nearer end is taken,
    which the result's ``notes`` tell. Where one of the two is zero, the other's direction is kept.

    Args:
        other: a LoRA adapter of the same base model.
        t: in ``[0, 1]``: the adapter itself at 0, ``other`` at 1.

    Raises:
        InputError: something that is no LoRA adapter, a ``t`` out of range.
    """
    require_adapters("interpolate", other)
    t = _finite("interpolate", t)
    if not 0.0 <= t <= 1.0:
        raise InputError(f"interpolate: t={t} must be between 0 and 1")
    return Operator("interpolate", t, (other,))


def remove(others: Adapter | Sequence[Adapter], strength: float = 1.0) -> Operator:
    """Takes other adapters' directions out: ``D' = normalise(D − λ Π D)``, ``μ' = μ``.

    ``Π`` projects onto the span of the others' directions at the same place. Where nothing of a direction is left at
    ``λ = 1``, it becomes zero, which the result's ``notes`` tell.

    Args:
        others: one LoRA adapter of the same base model, or several.
        strength: ``λ``; the identity at 0.

    Raises:
        InputError: no adapters, something that is no LoRA adapter, a strength that is not finite.
    """
    given = (others,) if isinstance(others, Adapter) else tuple(others)
    if not given:
        raise InputError("remove: give at least one adapter whose directions are to be removed")
    require_adapters("remove", *given)
    return Operator("remove", _finite("remove", strength), given)


def require_adapters(name: str, *adapters: Adapter) -> None:
    """Only low-rank adapters have factors to work on."""
    for adapter in adapters:
        if isinstance(adapter, DoRA):
            raise refused(adapter)
        if not isinstance(adapter, Adapter):
            raise InputError(f"{name}: direction and magnitude are those of LoRA adapters, not of {adapter!r}")


def _finite(name: str, strength: float) -> float:
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise InputError(f"{name}: the strength is {strength!r}; it must be a finite number")
    return float(strength)


def _not_negative(name: str, strength: float) -> float:
    if _finite(name, strength) < 0:
        raise InputError(f"{name}: the strength {strength} makes a negative magnitude; use 0 or more, `reverse` turns")
    return float(strength)


def _reverse(state: State, strength: float, others: Sequence[int]) -> State:
    return state.scaled(-1.0, strength)


def _scale(state: State, strength: float, others: Sequence[int]) -> State:
    return state.scaled(1.0, strength)


def _shift(state: State, strength: float, others: Sequence[int]) -> State:
    direction = state.direction
    source, target = (state.unit(k) for k in others)
    terms = direction, strength * target, strength * source
    turned = state.normalised(direction + strength * (target - source), terms)
    state.count("directions that the shift cancels: nothing is left of them", direction.any(0) & ~turned.any(0))
    return state.turned(turned, state.magnitude)


def _interpolate(state: State, t: float, others: Sequence[int]) -> State:
    direction, other_direction = state.direction, state.unit(others[0])
    cosine = state.dot(direction, other_direction).clamp(-1.0, 1.0)
    gap, sum_ = (2 - 2 * cosine).sqrt(), (2 + 2 * cosine).sqrt()  # ‖D − D_o‖, ‖D + D_o‖
    angle = 2 * torch.atan2(gap, sum_)
    near = gap < 1e-4  # where the chord is the arc, to rounding
    sine = torch.where(near, 1.0, angle.sin())
    first = torch.where(near, 1 - t, ((1 - t) * angle).sin() / sine)
    second = torch.where(near, t, (t * angle).sin() / sine)
    both = direction.any(0) & other_direction.any(0)
    ends = first * direction, second * other_direction
    between = state.normalised(ends[0] + ends[1], ends)
    opposite = both & ((sum_ <= FLOOR) | ~between.any(0))
    between = torch.where(opposite, direction if t <= 0.5 else other_direction, between)
    turned = torch.where(both, between, direction + other_direction)
    state.count("opposite directions, where interpolation keeps the nearer end", opposite)
    magnitude = (1 - t) * state.magnitude + t * state.gram[others[0], others[0]].sqrt()
    return state.turned(turned, magnitude)


def _remove(state: State, strength: float, others: Sequence[int]) -> State:
    direction = state.direction
    units = torch.stack([state.unit(k) for k in others])  # [q, K, P]
    gram = torch.einsum("akp,klp,blp->pab", units, state.gram, units).contiguous()
    cosines = torch.einsum("akp,klp,lp->pa", units, state.gram, direction)
    values, vectors = ops.eigh(gram)
    inverse = torch.where(values > SPAN * values[:, -1:], 1.0 / values, 0.0)
    inverse = torch.where(values > 0, inverse, 0.0)
    amounts = (vectors @ (inverse[..., None] * (vectors.mT @ cosines[..., None])))[..., 0]  # [p, q]
    left = direction - strength * torch.einsum("pa,akp->kp", amounts, units)
    turned = state.normalised(left, [direction, *(strength * amounts.mT[:, None] * units)])
    state.count(
        "directions that lay in the span of what was removed: nothing is left of them",
        direction.any(0) & ~turned.any(0),
    )
    return state.turned(turned, state.magnitude)


_RUN = {"reverse": _reverse, "scale": _scale, "shift": _shift, "interpolate": _interpolate, "remove": _remove}
