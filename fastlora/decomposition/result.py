"""The result of :func:`fastlora.decompose`, in any mode: adapters, spectra, report, and saving them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.decomposition.components import Components
from fastlora.decomposition.report import Report, build_report
from fastlora.decomposition.writing import SavedParts, write_parts
from fastlora.engine.schedule import split_to_fit
from fastlora.engine.stream import Stream, streamed
from fastlora.engine.write import WRITE_BYTES
from fastlora.errors import InputError
from fastlora.runtime.memory import bounded
from fastlora.runtime.ranks import from_first

AS_JSON = json.JSONEncoder(allow_nan=False).encode


class Pair:
    """What two adapters share and what is left of each: one entry of :attr:`Decomposition.pairs`."""

    def __init__(self, components: Components) -> None:
        self.components = components

    @property
    def shared(self) -> Adapter:
        """The one adapter that holds what both share."""
        return self.components.shared

    @property
    def spectrum(self) -> dict[str, Tensor]:
        """``{module: eigenvalues}`` of the chain of both, descending by real part."""
        return self.components.spectrum

    def shared_of(self, name: str) -> Adapter:
        """What of adapter ``name`` lies in the shared directions."""
        return self.components.shared_of(name)

    def unique_of(self, name: str) -> Adapter:
        """What of adapter ``name`` the other does not share."""
        return self.components.unique_of(name)


class Decomposition(SavedParts):
    """Shared and unique parts of a pool, ``ΔW_i = shared_i + unique_i``: what :func:`fastlora.decompose` returns.

    What there is depends on the mode. ``"pool"``: :attr:`shared`, :meth:`shared_of`, :meth:`unique_of` and
    :attr:`report`. ``"pairs"``: :attr:`pairs`. ``"iterative"``: :meth:`unique_of` of the target. All modes:
    :attr:`spectrum`, :attr:`reports`, :meth:`adapters` and :meth:`save`. What a mode does not have raises
    :class:`InputError`, which names what it has.

    Every part is an :class:`Adapter` on the stored factors of the pool: asking for one reads no factor, and saving it
    reads them once. Its dtype is the widest of the adapters that it is made of.
    """

    def __init__(
        self,
        pool: Pool,
        mode: str,
        *,
        whole: Components | None = None,
        pairs: Mapping[tuple[str, str], Components] | None = None,
        steps: list[Components] | None = None,
        target: str | None = None,
        memory: int | None = None,
        stream: Stream | None = None,
    ) -> None:
        self.pool = pool
        self.mode = mode
        self.target = target
        self.memory = memory
        self.stream = stream
        self._whole = whole
        self._pairs = dict(pairs or {})
        self._steps = list(steps or [])
        self._report: list[Report] | None = None
        self._keeps_reports = False

    @property
    def shared(self) -> Adapter:
        """What all share, as one adapter: ``Σ_i ω_i shared_i`` with ``ω_i = ‖shared_i‖ / Σ_j ‖shared_j‖``, MATH (10).

        Its rank in a module is the number ``q`` of shared directions, 0 where there are none: ``B [n, q]``,
        ``A [q, m]``. ``mode="pool"`` only, else :class:`InputError`.
        """
        return self._pool_mode("shared").shared

    @property
    def components(self) -> Components:
        """The parts as coefficients on the stored factors, module by module. ``mode="pool"`` only."""
        return self._pool_mode("components")

    def shared_of(self, name: str) -> Adapter:
        """The shared part of the adapter ``name``, ``s_i Z (Zᵀ B_i) A_i``, MATH (7).

        ``Z [n, q]`` is an orthonormal basis of the ``q`` shared directions, so the part has ``B [n, q]`` and
        ``A [q, m]``. Raises :class:`InputError` for an unknown name and in other modes than ``"pool"``.
        """
        return self._pool_mode("shared_of").shared_of(name)

    def unique_of(self, name: str) -> Adapter:
        """The unique part of the adapter ``name``, ``s_i (B_i − Z Zᵀ B_i) A_i``, MATH (8).

        It has the rank of the adapter, and its factor ``A_i`` bit for bit (``side="left"``); biases and replaced
        modules stay with it. In ``mode="iterative"`` it is what is left of the target after all steps. Raises
        :class:`InputError` for an unknown name and in ``mode="pairs"``.
        """
        if self.mode == "iterative":
            if name != self.target:
                raise InputError(
                    f"mode='iterative' makes the unique part of its target {self.target!r} only, not of {name!r}"
                )
            return replace(self._steps[-1].unique_of(name), extras=self.pool[name].extras)
        return self._pool_mode("unique_of").unique_of(name)

    @property
    def pairs(self) -> dict[tuple[str, str], Pair]:
        """``{(a, b): pair}`` for every pair in pool order. ``mode="pairs"`` only, else :class:`InputError`.

        A pair has ``shared``, ``shared_of(name)``, ``unique_of(name)`` and ``spectrum``, as a decomposition of two.
        """
        if self.mode != "pairs":
            raise InputError(f"pairs: this decomposition has mode={self.mode!r}; use decompose(…, mode='pairs')")
        return {names: Pair(c) for names, c in self._pairs.items()}

    @property
    def spectrum(self) -> dict[Any, Any]:
        """``{module: eigenvalues}``; pairs: ``{(a, b): {module: …}}``; iterative: ``{other: {module: …}}``.

        The eigenvalues are those of the chain in a module, float64 or complex128, descending by their real parts.
        """
        if self._whole is not None:
            return dict(self._whole.spectrum)
        if self.mode == "pairs":
            return {names: c.spectrum for names, c in self._pairs.items()}
        return {c.pool.names[1]: c.spectrum for c in self._steps}

    @property
    def reports(self) -> list[Report]:
        """What was found, with chance levels and warnings: one report for a pool, one a pair, one a step.

        A report has ``title``, ``settings``, ``rows`` (one a module), ``warnings``, ``notices`` and ``as_dict()``.
        """
        if self._report is None:
            self._report = list(self._built_reports())
        return self._report

    def _built_reports(self) -> Iterator[Report]:
        if self._whole is not None:
            yield build_report(self._whole, " + ".join(self.pool.names), self.pool.notices)
        elif self.mode == "pairs":
            for names, c in self._pairs.items():
                yield build_report(c, " + ".join(names))
        else:
            for i, c in enumerate(self._steps):
                yield build_report(c, f"{self.target} without {c.pool.names[1]} (step {i + 1})")

    @property
    def report(self) -> Report:
        """The report of ``mode="pool"``, else :class:`InputError`; other modes have :attr:`reports`."""
        self._pool_mode("report")
        return self.reports[0]

    def adapters(self) -> dict[str, Adapter]:
        """Every part by its place in the output directory: ``shared``, ``unique/<name>``, ``pairs/<a>+<b>/…``.

        No factor is read; :meth:`save` writes them all with one read.
        """
        return {place: adapter for part in self._parts() for place, adapter in part.items()}

    def summands(self) -> dict[str, Adapter]:
        """What a weighted sum is taken over, by name: all of :meth:`adapters`; in ``mode="pairs"`` the adapters of the
        pool and, as ``<a>+<b>``, the shared part of every pair (Table 1 of DeVec). No factor is read."""
        if self.mode != "pairs":
            return self.adapters()
        whole = dict(zip(self.pool.names, self.pool.adapters, strict=True))
        return whole | {f"{a}+{b}": pair.shared for (a, b), pair in self.pairs.items()}

    def _parts(self) -> Iterator[dict[str, Adapter]]:
        """The results, those of a pool of many pairs some pairs at a time: as many as have room together."""
        if self.mode == "iterative":
            assert self.target is not None
            yield {f"unique/{self.target}": self.unique_of(self.target)}
        elif self.mode == "pool":
            yield {"shared": self.shared} | {f"unique/{n}": self.unique_of(n) for n in self.pool.names}
        else:
            pairs = list(self.pairs.items())
            sizes = [_written_bytes(pair.components) for _, pair in pairs]
            # Ranks may have other amounts of memory free.
            for some in from_first("cutting the pairs", lambda: split_to_fit(sizes, WRITE_BYTES)):
                adapters = {}
                for (a, b), pair in (pairs[p] for p in some):
                    adapters[f"pairs/{a}+{b}/shared"] = pair.shared
                    adapters |= {f"pairs/{a}+{b}/unique/{n}": pair.unique_of(n) for n in (a, b)}
                yield adapters

    def write(
        self,
        staging: Path,
        dtype: torch.dtype | str | None = None,
        uniform_rank: bool = False,
        format: str | None = None,
        *,
        keep_reports: bool = False,
    ) -> list[str]:
        """Writes into the directory ``staging``, which exists; for ``dtype``, ``uniform_rank``, ``format`` and what it
        raises see :meth:`save`. ``keep_reports``: so that :attr:`reports` need not be made again. Returns what is worth
        telling, in sentences."""
        self._keeps_reports |= keep_reports
        with bounded(self.memory), streamed(self.stream):
            return write_parts(staging, self._parts(), self._write_reports, dtype, uniform_rank, format)

    def _write_reports(self, file: TextIO) -> None:
        """The start of ``report.json``; pool by pool, since there can be thousands of pairs."""
        file.write(f'{{"mode": {json.dumps(self.mode)}, "reports": [')
        reports = self.reports if self._keeps_reports else self._report or self._built_reports()
        for i, report in enumerate(reports):
            file.write(", " * (i > 0) + AS_JSON(report.as_dict()))
        file.write("]")

    def _pool_mode(self, what: str) -> Components:
        if self._whole is None:
            hint = "use .pairs[(a, b)]" if self.mode == "pairs" else "use .unique_of(target), .spectrum or .reports"
            raise InputError(
                f"{what}: this decomposition has mode={self.mode!r}; {hint}, or decompose with mode='pool'"
            )
        return self._whole


def _written_bytes(components: Components) -> int:
    """Of the largest module of one pair: its results are in memory together."""
    updates = [a.updates[m] for a in components.pool.adapters for m in components.results]
    sizes = [4 * u.rank * sum(u.shape) for u in updates]
    return 3 * max(sizes, default=1)
