"""Philox 4×32-10 (Salmon et al. 2011): the random words of masks, one for each element."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
MASK = 0xFFFFFFFF


def philox(counters: Words, key: tuple[int, int]) -> Words:
    """The four words of every counter: ``counters [..., 4]`` → ``[..., 4]``."""
    c = [counters[..., i].astype(np.uint64) for i in range(4)]
    first, second = key
    for _ in range(ROUNDS):
        even, odd = c[0] * np.uint64(MULTIPLIERS[0]), c[2] * np.uint64(MULTIPLIERS[1])
        high_even, low_even = even >> np.uint64(32), even & np.uint64(MASK)
        high_odd, low_odd = odd >> np.uint64(32), odd & np.uint64(MASK)
        c = [high_odd ^ c[1] ^ np.uint64(first), low_odd, high_even ^ c[3] ^ np.uint64(second), low_even]
        first, second = (first + WEYL[0]) & MASK, (second + WEYL[1]) & MASK
    return np.stack(c, -1).astype(np.uint32)


def words(elements: NDArray[np.int64], key: int, module_key: int) -> Words:
    """The word of every element number ``e = row·m + column``.

    The counter is ``(e div 4 low, e div 4 high, module low, module high)``, and ``e mod 4`` says which of its words.
    """
    blocks = elements.astype(np.uint64) >> np.uint64(2)
    parts = [blocks & np.uint64(MASK), blocks >> np.uint64(32)]
    parts += [np.full_like(blocks, module_key & MASK), np.full_like(blocks, module_key >> 32)]
    four = philox(np.stack(parts, -1).astype(np.uint32), (key & MASK, key >> 32))
    chosen = (elements & 3)[..., None]
    return np.take_along_axis(four, chosen, -1)[..., 0]
