"""Matrices that a model has once and uses twice, as its embedding and its head.

What an adapter learnt for one of them is a change of that one, for which the model has no place. Where it has the same
change for both, it is made once and they stay tied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from fastlora.checkpoints.base import module_of
from fastlora.checkpoints.edits import Pair
from fastlora.checkpoints.targets import Targets
from fastlora.core.architectures import is_head
from fastlora.errors import InputError

SAME = 1e-6  # of the norms: the same change, computed in another way

Alike = Callable[[str, str], bool]


def repeated(targets: Targets, label: str, changed: Collection[str], alike: Alike, *, whole: bool = False) -> set[str]:
    """The names among those of an adapter whose change is that of another one, and is made there.

    ``changed``: modules and parameters under their names in the model. ``alike``: whether the changes of two are one.
    ``whole``: of a fine-tune, which changes a tied matrix as one even where it names one member.
    Raises :class:`InputError` for an adapter that treats tied matrices apart.
    """
    left: set[str] = set()
    for group in targets.ties:
        members = {module_of(name): name for name in group}
        found = {m: next(n for n in (m, members[m]) if n in changed) for m in members if {m, members[m]} & {*changed}}
        if not found:
            continue
        heads = [m for m in members if is_head(m)]
        embeddings = [m for m in members if m not in heads]
        others_too = len(embeddings) > 1 and found.keys() >= {*embeddings[1:]}
        both = found.keys() >= {*heads} and (embeddings[0] in found or others_too)
        first, *others = found.values()
        if not (both or (whole and not others)) or not all(alike(first, other) for other in others):
            raise _apart(targets, label, sorted(found.values()), [n for m, n in members.items() if m not in found])
        stored = {targets.stored(name) for name in found.values()}
        left |= {name for name in others if len(stored) < len(found) and targets.stored(name) == targets.stored(first)}
    return left


def _apart(targets: Targets, label: str, found: Sequence[str], others: Sequence[str]) -> InputError:
    what = f"ties to {', '.join(others)}" if others else "ties to each other, and not alike"
    return InputError(
        f"adapter {label!r} changes {', '.join(found)}, which {targets.base.root} {what}: there is one matrix for "
        "both, and what was trained is a change of one. Untie the model first (`tie_word_embeddings=False`, both "
        "matrices saved), or leave the module out of the adapter"
    )


def same_products(first: Pair, second: Pair) -> bool:
    """Whether two products are the same matrix, but for rounding. Nothing of its size is formed."""
    if (first.left.shape[0], first.right.shape[1]) != (second.left.shape[0], second.right.shape[1]):
        return False
    same = first.scale == second.scale and torch.equal(first.left, second.left)
    if same and torch.equal(first.right, second.right):
        return True
    L = torch.cat([first.left.double() * first.scale, second.left.double() * -second.scale], 1)
    R = torch.cat([first.right.double(), second.right.double()])
    sizes = [_square(p.left.double() * p.scale, p.right.double()) for p in (first, second)]
    return _square(L, R) <= SAME**2 * sum(sizes)


def _square(L: Tensor, R: Tensor) -> float:
    """``‖L R‖²``."""
    return float(((L.mT @ L) * (R @ R.mT)).sum())


def same_tensors(tensors: Mapping[str, Tensor]) -> Alike:
    """Whether two parameters are the same tensor."""
    return lambda first, second: torch.equal(tensors[first], tensors[second])
