"""``merge_tiles``: rules on the elements of ``ΔW``, tile by tile, without any ``ΔW`` in memory.

What is merged is a :class:`TileTask`: the updates of one module. Its elements are formed anew in every pass::

    x_i[a, b] = Σ_p (s_i·B_i[a, p])·A_i[p, b]        p = 0, 1, …, each step one fused multiply-add

in ``task.dtype``: stored factors are widened to it, ``s_i`` is rounded to it, and so is every ``s_i·B_i[a, p]``. So an
element has the same bits in every pass, tile and thread. That is what thresholds need.

Three passes, all private to the engine (``fastlora.ops.dispatch`` finds the backend):

* :func:`select` finds the exact cut that keeps the ``q`` largest magnitudes.
* :func:`row_masks` draws the masks of DELLA, which depend on the ranks within a row.
* :func:`merge` trims, elects signs and sums: into a dense matrix or onto a base weight (in its dtype), or only into
  products of the merged matrix with a thin one, from which a low-rank adapter is made.

For one backend and instruction set the bits of all results depend on the task, the rule and the thin matrix alone: not
on the number of threads, tiles, the order in which they are computed, or the run. Elements have the same bits on all
instruction sets with a fused multiply-add. Elsewhere (``baseline``) each step rounds twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastlora.errors import InputError
from fastlora.ops import dispatch

Trim = Literal["none", "magnitude", "random", "bits", "variance"]
Elect = Literal["none", "total", "frequency"]
Quantity = Literal["magnitude", "variance"]

TILE_DTYPES = (torch.float32, torch.float64)
MOST_ADAPTERS = 1024


@dataclass(frozen=True, slots=True)
class Cut:
    """The elements of the first ``q`` magnitudes: ``|x| > magnitude``, or equal to it and ``row·m + column < order``.

    Of elements of equal magnitude the first in the order of rows are kept, whatever the tiles.
    """

    magnitude: float
    order: int


NOTHING = Cut(float("inf"), 0)


@dataclass(frozen=True, slots=True, eq=False)
class TileTask:
    """The updates ``s_i B_i A_i`` of one module ``[n, m]``.

    Args:
        pairs: ``(B_i [n, r_i], A_i [r_i, m])``, float16, bfloat16, float32 or float64, or ``None`` for an update of
            zero.
        scales: ``s_i``, finite.
        shape: ``(n, m)``.
        dtype: in which elements are formed, float32 or float64; not narrower than a factor.
        threads: that the CPU kernel uses; by default torch's.
    """

    pairs: Sequence[tuple[Tensor, Tensor] | None]
    scales: Sequence[float]
    shape: tuple[int, int]
    dtype: torch.dtype
    threads: int | None = None

    def __post_init__(self) -> None:
        n, m = self.shape
        if self.dtype not in TILE_DTYPES:
            raise TypeError(f"merge_tiles: elements are float32 or float64, not {self.dtype}")
        if len(self.pairs) != len(self.scales) or not 1 <= len(self.pairs) <= MOST_ADAPTERS:
            raise InputError(
                f"merge_tiles: {len(self.pairs)} updates and {len(self.scales)} scales; needed are as many of both, "
                f"from 1 to {MOST_ADAPTERS}"
            )
        for pair in self.pairs:
            if pair is None:
                continue
            B, A = pair
            if B.dim() != 2 or A.dim() != 2 or (B.shape[0], A.shape[1]) != (n, m) or B.shape[1] != A.shape[0]:
                raise ValueError(
                    f"merge_tiles: factors {list(B.shape)} and {list(A.shape)} of a module {[n, m]}; needed are "
                    "[n, r] and [r, m]"
                )
            if torch.float64 in (B.dtype, A.dtype) and self.dtype != torch.float64:
                raise TypeError("merge_tiles: factors in float64 need elements in float64")

    @property
    def factors(self) -> list[Tensor]:
        """All factors, for the choice of a backend."""
        return [x for pair in self.pairs if pair is not None for x in pair]

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return next((x.device for x in self.factors), torch.device("cpu"))


@dataclass(frozen=True, slots=True, eq=False)
class TileRule:
    """What becomes of the ``x_i`` of one place.

    1. Trim: ``v_i = x_i`` where it is kept, else 0.

       * ``magnitude``: kept is what ``low[i]`` holds and ``high[i]`` (if there are any) does not.
       * ``random``: kept where the Philox word of the element is below ``keep[i]``, of ``2³²``.
       * ``bits``: kept where ``bits[i]`` says so (:func:`row_masks`).
       * ``variance``: kept for all ``i`` is what ``low[0]`` holds of the variance of the ``x_i``.

    2. Elect: the sign of ``S``, that of ``zero`` where it is 0. ``total``: ``S = Σ votes_i v_i``; ``frequency``:
       ``S = Σ sgn(votes_i v_i)``. Those agree whose ``votes_i v_i`` has this sign. With ``none`` all do.
    3. Merge: ``scale · Σ gains_i v_i / D``, over those that agree. ``D = Σ shares_i`` over them, or ``instead`` where
       its magnitude is below ``least``. Without ``shares`` it is 1.
    """

    trim: Trim = "none"
    low: Sequence[Cut] = ()
    high: Sequence[Cut] = ()
    keep: Sequence[int] = ()
    keys: Sequence[int] = ()
    module_key: int = 0
    bits: Tensor | None = None
    elect: Elect = "none"
    votes: Sequence[float] = ()
    gains: Sequence[float] = ()
    shares: Sequence[float] | None = None
    least: float = 0.5
    instead: float = 1.0
    scale: float = 1.0
    zero: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class TileOutputs:
    """Where the merged ``M [n, m]`` goes.

    ``dense``: a matrix of any floating dtype that takes ``M``, or ``base + M`` with ``add`` (rounded once). ``right``:
    float64 ``[m, l]``, for ``M·right``. ``left``: float64 ``[n, l]``, for ``Mᵀ·left``. At most one of the three.
    ``sums``: of every adapter ``Σ|x|``, ``Σ|v|`` and ``Σv²``.
    """

    dense: Tensor | None = None
    add: bool = False
    right: Tensor | None = None
    left: Tensor | None = None
    sums: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class TileResult:
    """``square = ‖M‖²``; ``product``, float64: ``M·right`` or ``Mᵀ·left``; ``sums``: float64 ``[k, 3]``.

    ``undecided``: places where ``S`` is 0 and some ``v_i`` is not. ``majority``: places with ``S > 0`` minus those with
    ``S < 0``. ``finite``: whether every element of ``M`` is.
    """

    square: float
    undecided: int
    majority: int
    finite: bool
    product: Tensor | None = None
    sums: Tensor | None = field(default=None)


def key_of(*parts: object) -> int:
    """A 64-bit number of a seed and names: the key and the counter of masks, the same on every machine."""
    text = "\0".join(str(part) for part in parts).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def bound_of(density: float) -> int:
    """The ``2³²``-th parts of a density below which a word keeps its element: 1 keeps all."""
    return min(max(int(density * 2**32), 0), 2**32)


def select(task: TileTask, ranks: Sequence[tuple[int, int]], quantity: Quantity = "magnitude") -> list[Cut]:
    """The cuts that keep the ``q`` largest magnitudes, for every ``(adapter, q)`` of ``ranks``, exactly.

    With ``variance`` the magnitudes are the population variances ``Σ_i (x_i − x̄)²/k`` of places (``adapter`` is 0).
    ``0 ≤ q ≤ n·m``. Cost: on the CPU about one pass over the tiles, ``2·n·m·Σr_i`` operations (a sample brackets the
    threshold, and what lies between is collected), two more where the sample misleads, and one where elements equal to
    a threshold are in part kept.
    """
    n, m = task.shape
    for adapter, q in ranks:
        if not 0 <= q <= n * m or not 0 <= adapter < len(task.pairs):
            raise ValueError(f"merge_tiles: rank {q} of adapter {adapter}: needed is 0 to {n * m}")
    cuts: list[Cut] = dispatch.run("merge_select", task, ranks, quantity)
    return cuts


def count_varied(task: TileTask, least: float = 0.0) -> int:
    """The places where the variance of the ``x_i`` is above ``least``: one pass."""
    count: int = dispatch.run("merge_count_varied", task, least)
    return count


def row_masks(task: TileTask, spans: Sequence[tuple[float, float]], keys: Sequence[int], module_key: int) -> Tensor:
    """DELLA's masks, int64 ``[k, n, ⌈m/64⌉]``: column ``c`` is bit ``c mod 64`` of word ``c div 64``.

    ``|x|`` is ranked in its row, from 0 for the least (of equals the first column is the lesser), and kept with the
    probability ``p + d·rank/(m − 1)`` for ``(p, d) = spans[i]``: where the Philox word of the element is below its
    ``2³²``-th parts. Cost: one pass and a sort of every row.
    """
    bits: Tensor = dispatch.run("merge_row_masks", task, spans, keys, module_key)
    return bits


def merge(task: TileTask, rule: TileRule, outputs: TileOutputs) -> TileResult:
    """One pass of a rule over all tiles: see :class:`TileRule` and :class:`TileOutputs`.

    Cost: ``2·n·m·Σr_i`` operations for the elements, about ``12·k·n·m`` for the rule (7 of Philox more for random
    masks), ``2·n·m·l`` in float64 for a product. Reads the factors once a pass; beyond them and the outputs, memory of
    a few tiles a thread.
    """
    n, m = task.shape
    k = len(task.pairs)
    given = [x for x in (outputs.dense, outputs.right, outputs.left) if x is not None]
    if len(given) > 1:
        raise ValueError("merge_tiles: one of dense, right and left")
    for name, x, length in (("right", outputs.right, m), ("left", outputs.left, n)):
        if x is not None and (x.dim() != 2 or x.shape[0] != length or x.dtype != torch.float64):
            raise ValueError(f"merge_tiles: {name} must be float64 [{length}, l], got {x.dtype} {list(x.shape)}")
    if outputs.dense is not None and tuple(outputs.dense.shape) != (n, m):
        raise ValueError(f"merge_tiles: dense must be {[n, m]}, got {list(outputs.dense.shape)}")
    _check_rule(rule, k)
    result: TileResult = dispatch.run("merge_tiles", task, rule, outputs)
    return result


def _check_rule(rule: TileRule, k: int) -> None:
    lengths = {"gains": (len(rule.gains), k)}
    if rule.elect != "none":
        lengths["votes"] = len(rule.votes), k
    if rule.shares is not None:
        lengths["shares"] = len(rule.shares), k
    if rule.trim in ("magnitude", "variance"):
        lengths["low"] = len(rule.low), k if rule.trim == "magnitude" else 1
    if rule.high:
        lengths["high"] = len(rule.high), k
    if rule.trim == "random":
        lengths |= {"keep": (len(rule.keep), k), "keys": (len(rule.keys), k)}
    if rule.trim == "bits":
        lengths["bits"] = 0 if rule.bits is None else len(rule.bits), k
    for name, (found, needed) in lengths.items():
        if found != needed:
            raise ValueError(f"merge_tiles: {name} has {found} entries, needed are {needed}")
