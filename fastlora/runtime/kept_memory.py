"""Memory in which results lay that nobody holds any longer, for the next ones.

Pages of new memory are cleared by the system when they are first touched, which takes as long as computing what goes
there. The heap keeps what is given up only while nothing else moves it. So the process keeps a few blocks.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.runtime.memory import advise, is_bounded
from fastlora.runtime.system import HUGE_PAGES

MOST = 64 * 2**20
"""Bytes of all blocks together that stay with the process."""

LEAST = 256 * 2**10
"""Bytes of a block: the heap keeps smaller ones."""


class _Kept(NamedTuple):
    memory: Tensor
    array: weakref.ref[Any]  # what the results were made of: gone when the last one is


_kept: list[_Kept] = []  # the one that was handed out last at the end
_lock = threading.Lock()


def block(size: int) -> Tensor:
    """``size`` uninitialised bytes on the host, in huge pages where the system has them.

    They may be a part of a kept block of at most twice the size, which nobody holds: neither tensors in it nor NumPy
    arrays of those. Large blocks, small ones, and those under a bound on memory are not kept.
    """
    if not LEAST <= size <= MOST or is_bounded():
        return _new(size)
    with _lock:
        free = [i for i, k in enumerate(_kept) if size <= k.memory.nbytes <= 2 * size and k.array() is None]
        memory = _kept.pop(free[-1]).memory if free else _new(size)
        array = memory.numpy()
        _kept.append(_Kept(memory, weakref.ref(array)))
        while sum(k.memory.nbytes for k in _kept) > MOST:
            del _kept[0]
        return torch.from_numpy(array)[:size]


def _new(size: int) -> Tensor:
    memory = torch.empty(size, dtype=torch.uint8)
    advise(memory, HUGE_PAGES)
    return memory
