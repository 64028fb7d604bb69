"""The factors of one adapter, written again and again with other numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from fastlora.core.data import LoraData
from fastlora.engine.contracts import Sink
from fastlora.engine.write import prepare_batch
from fastlora.ops.dispatch import RenewableLaunches
from fastlora.ops.passes import CombineOutput, CombineTerm

PLACE = Path()


class RepeatedWrite:
    """What is computed for ``adapter`` and where it goes in files like ``sink``: all of it is prepared here, once.

    For factors on the host that a sink takes one by one (:meth:`Sink.is_packed` is false), no ``B`` as it is stored.
    Coefficients must stay where they are; every :meth:`write` works on what they hold by then.
    """

    def __init__(self, sink: Sink, adapter: LoraData) -> None:
        self._modules = list(adapter.updates)
        self._batch = prepare_batch({PLACE: sink}, {PLACE: adapter}, self._modules)
        self._outputs = [write.output for side in self._batch.sides for write in side.factors]
        lefts = [side.factors[0].output for side in self._batch.sides if not side.job.rows]
        self._lefts: list[tuple[CombineOutput, list[CombineTerm]]] = [(output, list(output.terms)) for output in lefts]
        self._start = self._starts(sink)

    def write(self, sink: Sink, scales: Sequence[float]) -> None:
        """Computes all factors, those of ``B`` with the ``scales`` of all their terms, and puts them into a file.

        Raises :class:`OutputError` where a number does not fit its dtype, or writing fails.
        """
        start = self._starts(sink)
        for output in self._outputs if start != self._start else ():
            output.offset += start - self._start
        self._start = start
        own = iter(scales)
        for output, terms in self._lefts:
            output.terms = [(i, C, at, next(own)) for i, C, at, _ in terms]
        cast(RenewableLaunches, self._batch.launch).renew()
        self._batch.sinks = {PLACE: sink}
        with self._batch.opened():
            self._batch.write()
        sink.finish()

    def _starts(self, sink: Sink) -> int:
        """Where the first module is in a file: others are as far from it in every file."""
        return sink.place(self._modules[0], "B")[1]
