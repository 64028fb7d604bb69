"""From a model name to a directory, off the event loop."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastlora import formats
from fastlora.adapters.loading import Element, load
from fastlora.adapters.lora import Adapter
from fastlora.core.vector_space import VectorSpace
from fastlora.engine.checks import require_finite
from fastlora.errors import FastloraError, InputError, OutputError
from fastlora.expressions.compose import evaluated
from fastlora.files.output import OutputDirectory
from fastlora.files.spare import Spare, offered
from fastlora.integrations.serving.cache import WEIGHTS, Cache
from fastlora.integrations.serving.kept_sums import KeptSum, KeptSums, Weights
from fastlora.integrations.serving.requests import Request, Stamp, is_expression, read_request, stamps
from fastlora.integrations.serving.settings import Settings
from fastlora.views.text import escaped, share_text

MOST_WAITING = 64
"""Expressions that wait to be composed; further ones are refused rather than held."""

MOST_LOADED = 64
"""Adapters that are kept open between requests: they are mapped files, not memory."""

REST = 0.05
"""Seconds after an answer before the next file is made ready: what the server does at once comes first."""

logger = logging.getLogger("fastlora.serving")


class Composer:
    """Answers model names with directories, one composition at a time: each uses all processors.

    ``uniform_rank``: whether the server needs every module at one rank.
    """

    def __init__(self, settings: Settings, *, uniform_rank: bool = False) -> None:
        self.settings, self.uniform_rank = settings, uniform_rank
        self.cache = Cache(settings.cache, settings.cache_bytes)
        self._spare = Spare(settings.cache)
        self._worker = ThreadPoolExecutor(1, "fastlora-compose")
        self._loaded: dict[Path, tuple[Stamp, Element]] = {}  # the ones asked for last at the end
        self._sums = KeptSums()
        self._answered: set[str] = set()
        self._waiting = 0

    async def answer(self, base: str, name: str) -> Path | None:
        """The directory for a model name, which stays while this process runs; ``None`` for what is no expression over
        our adapters, or cannot be composed. It raises nothing: what was wrong is logged."""
        if not is_expression(name):
            return None
        try:
            return await self._answer(base, name)
        except (FastloraError, OSError) as problem:
            reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            logger.warning("%s was not composed: %s", shown(name), escaped(reason))
        except Exception:  # a server answers what a resolver raises with an internal error, and asks no other resolver
            logger.exception("%s was not composed", shown(name))
        return None

    async def _answer(self, base: str, name: str) -> Path:
        if name not in self._answered and len(self._answered) >= self.settings.most_names:
            raise OutputError(
                f"{len(self._answered)} names have been answered, which servers keep as long as they run; raise the "
                "bound (MAX_NAMES), or restart the server"
            )
        request, path = await asyncio.to_thread(self._look_up, base, name)
        if path is None:
            path = await self._composed(request)
        self._answered.add(name)
        return path

    def _look_up(self, base: str, name: str) -> tuple[Request, Path | None]:
        settings = self.settings
        told = [settings.max_rank, self.uniform_rank, settings.any_base]
        request = read_request(name, settings.folder, None if settings.any_base else base, told)
        return request, self.cache.find(request.key)

    async def _composed(self, request: Request) -> Path:
        if self._waiting >= MOST_WAITING:
            raise OutputError(f"{self._waiting} expressions wait to be composed; ask again later")
        self._waiting += 1
        try:
            path = await asyncio.get_running_loop().run_in_executor(self._worker, self._compose, request)
        finally:
            self._waiting -= 1
        asyncio.get_running_loop().call_later(REST, self._worker.submit, self._make_spare, path / WEIGHTS)
        return path

    def _compose(self, request: Request) -> Path:
        earlier = self.cache.find(request.key)  # another request for it may have been before this one
        if earlier is not None:
            return earlier
        self.cache.require_room()
        before = stamps(request.adapters)
        staged = self.cache.staging(request.key)
        with offered(self._spare), OutputDirectory(staged) as folder:
            mix, notes = self._written(request, before, folder)
        _log_notes(request.text, [*mix.notes, *notes])
        if stamps(request.adapters) != before:
            shutil.rmtree(staged, ignore_errors=True)
            raise InputError("the adapters were changed while they were read; ask again")
        return self.cache.put(request.key, staged)

    def _make_spare(self, last: Path) -> None:
        """Makes the file for the next result, which will mostly be as large as the last, unless somebody waits."""
        try:
            self._spare.make(last.stat().st_size, go_on=lambda: not self._waiting)
        except OSError as problem:
            logger.debug("no file was made beforehand: %s", problem)

    def _element(self, name: str, path: Path, stamp: Stamp) -> Element:
        """The adapter in a folder, whose numbers were looked at; it is kept while its files stay as they are."""
        earlier, element = self._loaded.pop(path, (None, None))
        if element is None or earlier != stamp:
            self._sums.forget(name)
            element = load(str(path), name)
            if isinstance(element, Adapter):
                require_finite([element])
        self._loaded[path] = stamp, element
        while len(self._loaded) > MOST_LOADED:
            del self._loaded[next(iter(self._loaded))]
        return element

    def _mixed(self, request: Request, known: Mapping[str, Stamp]) -> tuple[Adapter, list[tuple[float, VectorSpace]]]:
        """The result at its full rank, and what it adds up."""
        adapters = {name: self._element(name, path, known[name]) for name, path in request.adapters.items()}
        mix, terms = evaluated(request.text, adapters, are_finite=True)
        if not isinstance(mix, Adapter):
            raise InputError(f"the result is {mix.kind}; servers take LoRA adapters alone")
        if mix.extras:
            raise InputError(f"the result has {next(iter(mix.extras))!r} beside its factors, which servers do not take")
        return mix, terms

    def _written(self, request: Request, known: Mapping[str, Stamp], folder: Path) -> tuple[Adapter, list[str]]:
        """The result, which was written, and what writing it told."""
        done = None if request.weights is None else self._written_again(request, request.weights, known, folder)
        if done is not None:
            return done
        mix, _ = self._mixed(request, known)
        rank = _largest_rank(mix)
        if rank > self.settings.max_rank:
            mix = mix.compress(self.settings.max_rank)
            self._tell_cut(request, rank, mix)
        return mix, formats.write_adapter(mix, folder, uniform_rank=self.uniform_rank or None)

    def _written_again(
        self, request: Request, weights: Weights, known: Mapping[str, Stamp], folder: Path
    ) -> tuple[Adapter, list[str]] | None:
        """As :meth:`_written`, with what was kept of the same sum with other weights; ``None`` where nothing can be."""
        kept = self._sums.take(weights, known)
        if kept is None:
            mix, terms = self._mixed(request, known)
            kept = KeptSum.of(mix, terms, weights, known, self.settings.max_rank, uniform_rank=self.uniform_rank)
        result = None if kept is None else kept.at(request.text, weights)
        if kept is None or result is None:
            return None
        rank = _largest_rank(kept.mix)
        if rank > self.settings.max_rank:
            self._tell_cut(request, rank, result)
        notes = kept.write(result, weights, folder)
        self._sums.put(kept)
        return result, notes

    def _tell_cut(self, request: Request, rank: int, result: Adapter) -> None:
        kept = float(str(result.provenance["retained_energy"]))
        level = logging.INFO if kept > 1.0 - 1e-6 else logging.WARNING
        told = "%s: rank %d is cut to %d (MAX_RANK), which keeps %s of Σσ²"
        logger.log(level, told, shown(request.text), rank, self.settings.max_rank, share_text(kept))


def _largest_rank(adapter: Adapter) -> int:
    return max((u.rank for u in adapter.updates.values()), default=0)


def _log_notes(text: str, notes: Iterable[str]) -> None:
    for note in dict.fromkeys(notes):
        logger.info("%s: %s", shown(text), escaped(note))


def shown(name: str) -> str:
    """A model name in a log: on one line, and short."""
    return repr(escaped(name if len(name) <= 120 else f"{name[:120]}…"))
