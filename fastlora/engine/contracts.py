"""What the engine asks of those above it: a pool to read from, and a sink to write into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastlora.core.data import LoraData
from fastlora.core.factors import Factor, Side
from fastlora.errors import OutputError


class PoolView(Protocol):
    """Adapters whose modules have one naming. A pool is one, and so is a part of it on a device."""

    @property
    def names(self) -> list[str]:
        """Of the adapters, in the order of the pool."""

    @property
    def adapters(self) -> Sequence[LoraData]:
        """In the same order."""

    @property
    def modules(self) -> list[str]:
        """Every module that some adapter has, in order of first appearance."""

    def present(self, module: str) -> list[int]:
        """Positions in the pool of the adapters that have ``module``."""


class Sink(Protocol):
    """An adapter's files while they are written. Kernels write each factor straight to its place.

    The shapes of all factors are known at the start; factors come in any order, from several threads.
    """

    @property
    def dtype(self) -> torch.dtype:
        """What factors are written in."""

    def is_packed(self, module: str) -> bool:
        """Whether a module's factors lie in tensors that hold more than them, so that they go through :meth:`put`."""

    def place(self, module: str, side: Side) -> tuple[str, int]:
        """The name of a factor of a module that is not packed, and where in the file it starts, in bytes."""

    def lay(self, module: str, side: Side, factor: Factor) -> Factor:
        """A factor of such a module as it lies at its place: with columns of zeros where the tensor is wider."""

    def open(self) -> AbstractContextManager[int]:
        """The descriptor of the file, open for writing factors at their places; or where it is mapped whole, an address
        above :data:`fastlora.runtime.system.LARGEST_DESCRIPTOR`."""

    def put(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Writes some modules: ``{module: (B [out, r], A [r, in])}`` with the scaling inside."""

    def written(self, names: Iterable[str]) -> None:
        """Notes that factors were written at their places."""

    def missing(self) -> set[str]:
        """The names of tensors that were announced and not written yet."""

    def sent(self, names: Iterable[str]) -> None:
        """Brings factors that this rank wrote to the files of the first, where they are not the same; all ranks call
        it."""

    def error(self, name: str, errno: int | None) -> OutputError:
        """The error of a factor that could not be written: it holds NaN or Inf, or the system's ``errno``."""

    def finish(self) -> None:
        """Writes what belongs to no module."""

    def close(self) -> None:
        """Checks that everything was written; only then may a reader take the files for an adapter."""


OpenSink = Callable[[Path, LoraData, Mapping[str, tuple[Tensor, Tensor]], torch.dtype], Sink]
"""``(directory, adapter, {module: (B, A) without memory}, dtype)`` → the files of the adapter in that directory."""
