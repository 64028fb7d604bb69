"""Who does what next: threads that write files side by side stay out of each other's way."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastlora.checkpoints.layout import Unit


class Turns:
    """Units for several threads, each of which takes the next when it has done one.

    Systems let one thread at a time write into a file. So the next unit is of the file that the fewest threads are at;
    of several the one with most left, so that there are files to choose from until the end.
    """

    def __init__(self, units: Iterable[Unit]) -> None:
        self._waiting: defaultdict[Path, deque[Unit]] = defaultdict(deque)
        self._left: Counter[Path] = Counter()  # bytes
        self._busy: Counter[Path] = Counter()  # threads
        self._lock = threading.Lock()
        for unit in units:
            self._waiting[unit.file.path].append(unit)
            self._left[unit.file.path] += unit.size

    def taken(self) -> Iterator[Unit]:
        """Units for the thread that asks, until none is left; with the next one, the one before is done."""
        while (unit := self._next()) is not None:
            try:
                yield unit
            finally:
                with self._lock:
                    self._busy[unit.file.path] -= 1

    def stop(self) -> None:
        """Hands out no more."""
        with self._lock:
            self._waiting.clear()

    def _next(self) -> Unit | None:
        with self._lock:
            if not self._waiting:
                return None
            path = min(self._waiting, key=lambda path: (self._busy[path], -self._left[path]))
            unit = self._waiting[path].popleft()
            if not self._waiting[path]:
                del self._waiting[path]
            self._left[path] -= unit.size
            self._busy[path] += 1
            return unit
