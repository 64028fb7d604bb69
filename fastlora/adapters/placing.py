"""Where adapters are computed on: on the host or a device, and within what memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from fastlora.adapters.lora import Adapter
from fastlora.engine.stream import Stream, current, needed, streamed
from fastlora.runtime.memory import bounded, is_bounded
from fastlora.runtime.memory import parse as parse_memory

HOST = torch.device("cpu")
NOTHING = contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class Place:
    """Where adapters have to be, and what is in effect while they are computed on.

    ``device``: where their factors are put. ``memory``: the bound on resident memory, in bytes; ``None`` without one,
    and where the memory of a device is bounded instead. ``stream``: brings modules to the device one after another,
    where the adapters do not fit into the bound; they are then on the host, and so is what is made of them.
    """

    device: torch.device
    memory: int | None
    stream: Stream | None

    def in_use(self) -> AbstractContextManager[None]:
        """Inside the block, the bound on memory and the stream are in effect."""
        if self.memory is None and self.stream is None and not is_bounded() and current() is None:
            return NOTHING
        return self._entered()

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        with bounded(self.memory), streamed(self.stream):
            yield


def place(adapters: Sequence[Adapter], where: torch.device, memory: int | str | None) -> Place:
    """Where adapters have to be to be computed on the device ``where``, within ``memory`` there.

    Raises :class:`InputError` for a size of memory that cannot be read.
    """
    bound = parse_memory(memory)
    stream = needed(adapters, where, bound)
    return Place(where if stream is None else HOST, bound if where.type == "cpu" else None, stream)
