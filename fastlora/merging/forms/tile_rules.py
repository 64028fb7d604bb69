"""Rules on elements that the kernels have: what a method file says (:class:`Rule`), and the numbers that follow from it
for one module (:func:`resolved`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from fastlora.errors import InputError
from fastlora.ops import merge_tiles
from fastlora.ops.merge_tiles import Cut, TileOutputs, TileRule, TileTask

Votes = Literal["plain", "weighted"]
Divisor = Literal["none", "count", "weights"]
Rescale = Literal["none", "density", "l1"]

TINY = 1e-30  # a divisor that is 0
NO_FLOOR = 1e-300  # a divisor that is 0, where energies have no floor
SMALL_SUM = 1e-8  # a sum of weights that is taken for 0
ENERGY_FLOOR = 1e-6  # of SCE: of its divisor, and of the sum of its energies


@dataclass(frozen=True, slots=True)
class Largest:
    """The ``⌊density·n·m⌋`` largest magnitudes of a module stay; of equals the first in the order of rows, or all.

    ``scope="model"``: those of all modules together, which one threshold parts from the others.
    """

    density: float
    all_equals: bool = False
    scope: Literal["module", "model"] = "module"


@dataclass(frozen=True, slots=True)
class Between:
    """``⌊density·n·m⌋`` magnitudes stay, those that follow the ``⌊outliers·n·m⌋`` largest (breadcrumbs); of equals
    those that come first in the order of rows, or all."""

    density: float
    outliers: float
    all_equals: bool = False


@dataclass(frozen=True, slots=True)
class Random:
    """Every element stays with the probability ``density`` (DARE)."""

    density: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Ranked:
    """An element stays with a probability from ``density − epsilon``, for the least of its row, to ``density +
    epsilon``, for the largest (DELLA)."""

    density: float
    epsilon: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Varied:
    """The places with the ``⌊share·v⌋`` largest variances stay, of the ``v`` places that have one (SCE).

    ``same``: a variance up to the square of this part of the module's largest magnitude is none.
    """

    share: float
    all_equals: bool = False
    same: float = 0.0


Trimming = Largest | Between | Random | Ranked | Varied


@dataclass(frozen=True, slots=True)
class Rule:
    """A merge of the elements ``x_i = ΔW_i[a, b]`` with the weights ``w_i``, place by place.

    1. ``trim``: ``v_i = c_i x_i``, or 0 where it is trimmed. ``rescale``: ``c_i = 1``; ``1/density``; with ``l1``
       ``‖x_i‖₁/‖trimmed x_i‖₁`` of the module.
    2. ``elect``: the sign of ``Σ v_i`` (``total``) or ``Σ sgn v_i`` (``frequency``), with ``votes="weighted"`` of
       ``w_i v_i``. Plus where it is 0; with ``zero="majority"`` the sign that most places have, of the module or of all
       modules that are trimmed together. Only those agree that are not 0 and have the sign. ``none``: all agree.
    3. ``scale · Σ w_i v_i / D`` over those that agree: ``D`` is 1, their ``count``, or the sum of their ``weights``;
       1 where that is 0.

    ``weigh="energy"``: in place of the ``w_i``, the mean squares of the ``v_i`` over their sum, times ``w_i`` (SCE).
    What is below ``floor``, of their sum and of ``D``, is replaced by equal shares and by the floor itself.
    """

    trim: Trimming | None = None
    rescale: Rescale = "none"
    elect: Literal["none", "total", "frequency"] = "none"
    votes: Votes = "plain"
    divide: Divisor = "none"
    zero: Literal["plus", "majority"] = "plus"
    weigh: Literal["given", "energy"] = "given"
    scale: float = 1.0
    floor: float = ENERGY_FLOOR

    @property
    def is_of_model(self) -> bool:
        """Whether all modules are trimmed together."""
        return isinstance(self.trim, Largest) and self.trim.scope == "model"


@dataclass(frozen=True, slots=True)
class OfModel:
    """What a rule of the whole model says of one module: how many elements every adapter keeps, and the sign of places
    where the sum is 0."""

    kept: Sequence[int]
    zero: Literal[-1, 1] = 1


def check_share(method: str, name: str, value: float, *, zero: bool = False) -> None:
    """Refuses a share that is not in (0, 1], or in [0, 1] with ``zero``."""
    if not (0.0 <= value <= 1.0 if zero else 0.0 < value <= 1.0):
        least = "at least 0" if zero else "above 0"
        raise InputError(f"{method}: {name}={value:g} must be {least} and at most 1")


def resolved(
    rule: Rule,
    task: TileTask,
    weights: Sequence[float],
    names: Sequence[str],
    module: str,
    of_model: OfModel | None = None,
) -> TileRule:
    """The numbers of a rule for one module: cuts, masks and coefficients, by as many passes as they need.

    ``names``: of the adapters; with seeds and the module's name they are what random masks depend on. ``of_model``:
    what a rule of the whole model needs.
    """
    if of_model is not None:
        assert isinstance(rule.trim, Largest)
        trimmed = _largest(task, of_model.kept, rule.trim.all_equals)
        return replace(_coefficients(rule, task, trimmed, weights), zero=of_model.zero)
    trimmed = _trimmed(rule.trim, task, names, module)
    coefficients = _coefficients(rule, task, trimmed, weights)
    if rule.zero == "plus" or rule.elect == "none":
        return coefficients
    told = merge_tiles.merge(task, coefficients, TileOutputs())
    return replace(coefficients, zero=-1) if told.undecided and told.majority < 0 else coefficients


def _trimmed(trim: Trimming | None, task: TileTask, names: Sequence[str], module: str) -> TileRule:
    """The first step of a rule."""
    size, k = task.shape[0] * task.shape[1], len(task.pairs)
    match trim:
        case Largest(density, all_equals):
            return TileRule() if density >= 1.0 else _largest(task, [int(density * size)] * k, all_equals)
        case Between(density, outliers, all_equals):
            kept = int(density * size)
            top = min(int(outliers * size), size - kept)
            both = _cuts(task, [(i, q) for i in range(k) for q in (top + kept, top)], all_equals)
            return TileRule("magnitude", both[::2], both[1::2])
        case Random(density, seed):
            keep, module_key = [merge_tiles.bound_of(density)] * k, merge_tiles.key_of(module)
            return TileRule("random", keep=keep, keys=_keys(seed, names), module_key=module_key)
        case Ranked(density, epsilon, seed):
            spans = [(density - epsilon, 2 * epsilon)] * k
            bits = merge_tiles.row_masks(task, spans, _keys(seed, names), merge_tiles.key_of(module))
            return TileRule("bits", bits=bits)
        case Varied(share, all_equals, same):
            if share >= 1.0:
                return TileRule()
            q = int(share * merge_tiles.count_varied(task, (same * _largest_of(task)) ** 2 if same else 0.0))
            return TileRule("variance", _cuts(task, [(0, q)], all_equals, "variance"))
    return TileRule()


def _cuts(
    task: TileTask, ranks: Sequence[tuple[int, int]], all_equals: bool, quantity: merge_tiles.Quantity = "magnitude"
) -> list[Cut]:
    """Cuts that hold the first of equal elements, or ``all_equals``."""
    size = task.shape[0] * task.shape[1]
    cuts = merge_tiles.select(task, ranks, quantity)
    return [Cut(c.magnitude, size) if all_equals and q else c for c, (_, q) in zip(cuts, ranks, strict=True)]


def _largest_of(task: TileTask) -> float:
    """The largest magnitude of all updates."""
    least = min(1, task.shape[0] * task.shape[1])
    cuts = merge_tiles.select(task, [(i, least) for i in range(len(task.pairs))])
    return max(c.magnitude for c in cuts) if least else 0.0


def _largest(task: TileTask, kept: Sequence[int], all_equals: bool) -> TileRule:
    """The trimming that keeps so many elements of every adapter."""
    return TileRule("magnitude", _cuts(task, list(enumerate(kept)), all_equals))


def _keys(seed: int, names: Sequence[str]) -> list[int]:
    return [merge_tiles.key_of(seed, name) for name in names]


def _coefficients(rule: Rule, task: TileTask, trimmed: TileRule, weights: Sequence[float]) -> TileRule:
    """A trimming with the other steps of its rule."""
    k, given = len(task.pairs), list(weights)
    factors = [1.0] * k
    if rule.rescale == "density" and isinstance(rule.trim, Random | Largest | Ranked):
        factors = [1.0 / rule.trim.density] * k
    if rule.rescale == "l1" or rule.weigh == "energy":
        sums = _sums(task, trimmed)
        if rule.rescale == "l1":
            factors = [whole / kept if kept > 0 else 1.0 for whole, kept, _ in sums.tolist()]
        if rule.weigh == "energy":
            squares = [w * c * c * s for w, c, s in zip(given, factors, sums[:, 2].tolist(), strict=True)]
            given = _energies(squares, task, rule.floor)
    gains = [w * c for w, c in zip(given, factors, strict=True)]
    votes = gains if rule.votes == "weighted" else factors
    shares = {"none": None, "count": [1.0] * k, "weights": given}[rule.divide]
    least, instead = {"none": (0.0, 1.0), "count": (0.5, 1.0), "weights": (TINY, 1.0)}[rule.divide]
    if rule.divide == "weights" and rule.elect == "none":
        least = SMALL_SUM
    if rule.weigh == "energy":
        least, instead = (rule.floor, rule.floor) if rule.floor else (NO_FLOOR, 1.0)
    return replace(
        trimmed, elect=rule.elect, votes=votes, gains=gains, shares=shares, least=least, instead=instead,
        scale=rule.scale,
    )  # fmt: skip


def _sums(task: TileTask, trimmed: TileRule) -> Tensor:
    plain = replace(trimmed, gains=[1.0] * len(task.pairs))
    sums = merge_tiles.merge(task, plain, TileOutputs(sums=True)).sums
    assert sums is not None
    return sums


def _energies(squares: Sequence[float], task: TileTask, floor: float) -> list[float]:
    """Mean squares over their sum, equal ones where that is next to nothing."""
    size = task.shape[0] * task.shape[1]
    means = [s / max(size, 1) for s in squares]
    total = sum(means)
    return [x / total for x in means] if total and abs(total) >= floor else [1.0 / len(means)] * len(means)
