"""Adapters that change nothing: as they were before training, or what is left of a run that failed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from fastlora.core.data import LoraData
from fastlora.core.updates import Update, with_rank
from fastlora.errors import InputError

FIRST_ROW, FIRST_COLUMNS = np.s_[:1, :], np.s_[:, :64]
"""Of ``B`` and ``A``, what is looked at first: of a trained update the product is not zero."""

NUMPY = {torch.float16, torch.float32, torch.float64}
"""What NumPy has too."""

NO_CHANGE = "the result changes nothing: every update is zero"
PROBABLY = "so it was probably saved before it was trained, or its tensors were lost on the way"


Lora = TypeVar("Lora", bound=LoraData)


def loadable(adapter: Lora) -> Lora:
    """The adapter with zeros of rank 1 in its first module where it has no ranks, so that readers can load it.

    Raises :class:`InputError` for an adapter without modules.
    """
    if any(u.rank for u in adapter.updates.values()):
        return adapter
    if not adapter.updates:
        raise InputError(f"adapter {adapter.name!r} has no modules, so there is nothing to write")
    first = next(iter(adapter.updates))
    return replace(adapter, updates={**adapter.updates, first: with_rank(adapter.updates[first], 1)})


def note_on_zeros(name: str, updates: Iterable[Update], *, with_extras: bool = False) -> list[str]:
    """A sentence on an adapter whose every ``ΔW = s·B·A`` is zero; none for any other.

    ``with_extras``: it holds biases or replaced modules beside them. Of an adapter that was trained, one row of ``B``
    and 64 columns of ``A`` of one module are read.
    """
    reasons: set[str] = set()
    for update in updates:
        reason = _zero_because(update)
        if reason is None:
            return []
        reasons.add(reason)
    if not reasons:
        return []
    why = reasons.pop() if len(reasons) == 1 else "every update is zero"
    what = "changes nothing but what it holds beside its updates" if with_extras else "changes nothing"
    return [f"adapter {name!r} {what}: {why}, {PROBABLY}"]


def changes_something(B: npt.NDArray[np.floating], A: npt.NDArray[np.floating]) -> bool:
    """Whether a product of the first rows of ``B`` with the first columns of ``A`` is not zero. Where it is, the rest
    may not be."""
    with np.errstate(all="ignore"):
        product = B.astype(np.float64) @ A.astype(np.float64)
    return bool(product.any())  # NaN is something, too


def _zero_because(update: Update) -> str | None:
    """Why an update is zero; ``None`` where it is not, or where that cannot be told from stored matrices."""
    if update.scaling == 0.0:
        return "its scaling is zero (lora_alpha)"
    B, A = update.B.stored, update.A.stored
    if B is None or A is None:
        return None
    if B.is_cpu and not B.requires_grad and not A.requires_grad and B.dtype in NUMPY and A.dtype in NUMPY:
        is_something = changes_something(B.numpy()[FIRST_ROW], A.numpy()[FIRST_COLUMNS])  # in a third of the time
    else:
        is_something = bool((B[FIRST_ROW].double() @ A[FIRST_COLUMNS].double()).any())
    if is_something:
        return None
    if not bool(B.any()):
        return "all its lora_B are zero"
    if not bool(A.any()):
        return "all its lora_A are zero"
    left, right = B.double(), A.double()
    square = ((left.mT @ left) * (right @ right.mT)).sum()  # ‖BA‖²
    return None if bool(square != 0) or bool(torch.isnan(square)) else "every update is zero"
