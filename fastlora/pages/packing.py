"""Arrays in a page: base64 of little-endian numbers, which takes a third of the room of decimal digits.

Shares and cosines are kept to 3e-5, which is finer than what is printed of them.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt

Packed = dict[str, object]
"""``{"t": type, "s": shape, "b": base64}``, and ``"q"``: what the stored integers are divided by."""

QUANTUM = 32767
MISSING = -32768
"""In place of NaN, beside :data:`QUANTUM`."""


def packed(values: npt.ArrayLike, kind: str) -> Packed:
    """Numbers of the type ``f4``, ``i2``, ``u2`` or ``i4``; integers are held to its range."""
    array = np.asarray(values)
    if kind != "f4":
        limits = np.iinfo(kind)
        array = np.clip(array, limits.min, limits.max)
    return {"t": kind, "s": list(array.shape), "b": _text(array.astype(f"<{kind}"))}


def packed_shares(values: npt.ArrayLike) -> Packed:
    """Numbers from -1 to 1, or NaN, in two bytes each."""
    array = np.asarray(values, dtype=np.float64)
    known = np.isfinite(array)
    whole = np.where(known, np.rint(np.clip(np.where(known, array, 0.0), -1, 1) * QUANTUM), MISSING)
    return {"t": "i2", "s": list(array.shape), "q": QUANTUM, "b": _text(whole.astype("<i2"))}


def upper(matrix: npt.ArrayLike) -> npt.NDArray[Any]:
    """What is above the diagonal of a symmetric ``[k, k]``, row by row."""
    array = np.asarray(matrix)
    return array[np.triu_indices(len(array), 1)]


def _text(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
