"""The result of :func:`fastlora.decompose`, in any mode: adapters, spectra, report, and saving them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.adapter import Adapter
from fastlora.engine import write_adapters
from fastlora.errors import InputError
from fastlora.memory import bounded
from fastlora.methods.devec import Components
from fastlora.output import OutputDirectory
from fastlora.pool import Pool
from fastlora.report import Report, build_report


class Pair:
    """What two adapters share and what is left of each: one entry of :attr:`Decomposition.pairs`."""

    def __init__(self, components: Components) -> None:
        self.components = components

    @property
    def shared(self) -> Adapter:
        return self.components.shared

    @property
    def spectrum(self) -> dict[str, Tensor]:
        return self.components.spectrum

    def shared_of(self, name: str) -> Adapter:
        return self.components.shared_of(name)

    def unique_of(self, name: str) -> Adapter:
        return self.components.unique_of(name)


class Decomposition:
    """Shared and unique components of a pool. Adapters are formed when they are saved or looked at."""

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
    ) -> None:
        self.pool = pool
        self.mode = mode
        self.target = target
        self.memory = memory
        self._whole = whole
        self._pairs = dict(pairs or {})
        self._steps = list(steps or [])
        self._report: list[Report] | None = None

    @property
    def shared(self) -> Adapter:
        """One adapter of what all share, MATH (10). ``mode="pool"`` only."""
        return self._pool_mode("shared").shared

    @property
    def components(self) -> Components:
        """The coefficients of the parts on the loaded factors. ``mode="pool"`` only."""
        return self._pool_mode("components")

    def shared_of(self, name: str) -> Adapter:
        """The shared part of one adapter, MATH (7). ``mode="pool"`` only."""
        return self._pool_mode("shared_of").shared_of(name)

    def unique_of(self, name: str) -> Adapter:
        """The unique part of one adapter, MATH (8); in ``mode="iterative"`` that of the target after all steps."""
        if self.mode == "iterative":
            if name != self.target:
                raise InputError(
                    f"mode='iterative' makes the unique part of its target {self.target!r} only, not of {name!r}"
                )
            last = self._steps[-1].unique_of(name)
            last.extras = dict(self.pool[name].extras)
            return last
        return self._pool_mode("unique_of").unique_of(name)

    @property
    def pairs(self) -> dict[tuple[str, str], Pair]:
        """``{(a, b): Pair}`` for every pair in pool order. ``mode="pairs"`` only."""
        if self.mode != "pairs":
            raise InputError(f"pairs: this decomposition has mode={self.mode!r}; use decompose(…, mode='pairs')")
        return {names: Pair(c) for names, c in self._pairs.items()}

    @property
    def spectrum(self) -> dict[Any, Any]:
        """``{module: eigenvalues}``; pairs: ``{(a, b): {module: …}}``; iterative: ``{other: {module: …}}``."""
        if self._whole is not None:
            return dict(self._whole.spectrum)
        if self.mode == "pairs":
            return {names: c.spectrum for names, c in self._pairs.items()}
        return {c.pool.names[1]: c.spectrum for c in self._steps}

    @property
    def reports(self) -> list[Report]:
        """One :class:`fastlora.report.Report` a chain: one for a pool, one a pair, one a step."""
        if self._report is None:
            notices = self.pool.notices
            if self._whole is not None:
                self._report = [build_report(self._whole, " + ".join(self.pool.names), notices)]
            elif self.mode == "pairs":
                self._report = [build_report(c, " + ".join(names)) for names, c in self._pairs.items()]
            else:
                self._report = [
                    build_report(c, f"{self.target} without {c.pool.names[1]} (step {i + 1})")
                    for i, c in enumerate(self._steps)
                ]
        return self._report

    @property
    def report(self) -> Report:
        """The report of ``mode="pool"``; see :attr:`reports` for the other modes."""
        self._pool_mode("report")
        return self.reports[0]

    def adapters(self) -> dict[str, Adapter]:
        """Every result by its place in the output directory: ``shared``, ``unique/<name>``, ``pairs/<a>+<b>/…``."""
        if self.mode == "iterative":
            assert self.target is not None
            return {f"unique/{self.target}": self.unique_of(self.target)}
        if self.mode == "pairs":
            found = {}
            for (a, b), pair in self.pairs.items():
                found[f"pairs/{a}+{b}/shared"] = pair.shared
                found |= {f"pairs/{a}+{b}/unique/{n}": pair.unique_of(n) for n in (a, b)}
            return found
        return {"shared": self.shared} | {f"unique/{n}": self.unique_of(n) for n in self.pool.names}

    def save(self, path: str | Path, *, dtype: torch.dtype | str | None = None, overwrite: bool = False) -> Path:
        """Writes every adapter and ``report.json`` below ``path``, atomically: nothing appears until all is there."""
        with OutputDirectory(Path(path), overwrite=overwrite) as staging:
            self.write(staging, dtype)
        return Path(path)

    def write(self, staging: Path, dtype: torch.dtype | str | None = None) -> None:
        """Writes into a directory that is being staged."""
        adapters = self.adapters()
        for place in adapters:
            (staging / place).mkdir(parents=True)
        with bounded(self.memory):
            write_adapters({staging / place: a for place, a in adapters.items()}, dtype)
        empty = [p for p, a in adapters.items() if not any(u.rank for u in a.updates.values())]
        data = {"mode": self.mode, "empty_adapters": empty, "reports": [r.as_dict() for r in self.reports]}
        (staging / "report.json").write_text(json.dumps(data, allow_nan=False) + "\n")

    def _pool_mode(self, what: str) -> Components:
        if self._whole is None:
            hint = "use .pairs[(a, b)]" if self.mode == "pairs" else "use .unique_of(target), .spectrum or .reports"
            raise InputError(
                f"{what}: this decomposition has mode={self.mode!r}; {hint}, or decompose with mode='pool'"
            )
        return self._whole
