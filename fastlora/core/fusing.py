"""Updates of a fused weight and of its parts, and transposed ones: exact, without computing a factor.

A fused weight has the rows of its parts one after another, ``W = [W_1; W_2; …]``. So a part of its update has rows of
``B`` and all of ``A``, and parts together have a block-diagonal ``B`` beside ``A = [A_1; A_2; …]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from fastlora.core.factors import Factor, Side, Term, concatenate, source_key
from fastlora.core.updates import Update, joint_noise

Stored = dict[object, Tensor]
"""What was made of stored matrices, by their identity: updates that share matrices still do afterwards."""


def rows(update: Update, start: int, stop: int) -> Update:
    """``ΔW[start:stop]``, of the same rank, on views of the stored matrices."""
    terms = tuple(replace(t, source=t.source[start:stop]) for t in update.B.terms)
    return replace(update, B=replace(update.B, length=stop - start, terms=terms))


def stacked(parts: Sequence[tuple[int, Update]], length: int, made: Stored) -> Update:
    """The update of ``length`` rows that has each part from its first row on, and zeros elsewhere.

    The ranks add up. The stored matrices of the B side are copied, with zeros around them.
    """
    padded = [(start, update.baked()) for start, update in parts]
    left = concatenate([_padded(update.B, start, length, made) for start, update in padded])
    right = concatenate([update.A for _, update in padded])
    return Update(left, right, 1.0, padded[0][1].layout, joint_noise(update.noise for _, update in padded))


def transposed(update: Update, made: Stored) -> Update:
    """``ΔWᵀ``, on transposed copies of the stored matrices."""
    return replace(update, B=_turned(update.A, "B", made), A=_turned(update.B, "A", made))


def _padded(factor: Factor, start: int, length: int, made: Stored) -> Factor:
    def pad(source: Tensor) -> Tensor:
        wide = source.new_zeros(length, source.shape[1])
        wide[start : start + source.shape[0]] = source
        return wide

    terms = tuple(replace(t, source=_once(made, t.source, (start, length), pad)) for t in factor.terms)
    return replace(factor, length=length, terms=terms)


def _turned(factor: Factor, side: Side, made: Stored) -> Factor:
    def turn(source: Tensor) -> Tensor:
        return source.mT.contiguous()

    terms = tuple(
        Term(
            _once(made, t.source, (), turn),
            None if t.coefficient is None else t.coefficient.mT.contiguous(),
            t.at,
            t.scale,
        )
        for t in factor.terms
    )
    return Factor(side, factor.length, factor.rank, terms)


def _once(made: Stored, source: Tensor, how: tuple[int, ...], make: Callable[[Tensor], Tensor]) -> Tensor:
    key = source_key(source), how
    if key not in made:
        made[key] = make(source)
    return made[key]
