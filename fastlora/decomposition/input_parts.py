"""Unique and shared parts by inputs: what :func:`fastlora.decompose` returns with ``inputs=``."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.factors import Factor
from fastlora.core.updates import Noise, Update, joint_noise
from fastlora.decomposition.input_filter import STEPS, Measured, Site, complement, filtered
from fastlora.decomposition.writing import write_parts
from fastlora.engine.checks import require_finite
from fastlora.engine.gram import GramPass
from fastlora.errors import InputError
from fastlora.files.earlier import Overwrite
from fastlora.files.output import OutputDirectory
from fastlora.merging.input_rows import Statistics
from fastlora.runtime.memory import bounded
from fastlora.runtime.progress import track


@dataclass(frozen=True, slots=True)
class InputRow:
    """One adapter in one module, or in all. Shares of squares, between 0 and about 1.

    ``norm_kept``: of ``‖ΔW‖²`` in the unique part. ``own_kept``: of what the adapter does to its own inputs, 1 less the
    part that the unique part misses. ``others_left``: of what it does to the inputs of others, the part that is left.
    ``at``: the same three for other multiples of μ.
    """

    adapter: str
    norm_kept: float
    own_kept: float
    others_left: float
    at: dict[str, tuple[float, float, float]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {name: getattr(self, name) for name in InputRow.__slots__}


@dataclass(frozen=True, slots=True)
class InputReport:
    """``total``: a row an adapter. ``rows``: the same by module."""

    settings: dict[str, Any]
    total: list[InputRow]
    rows: dict[str, list[InputRow]]
    notices: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "title": " + ".join(self.settings["adapters"]),
            "settings": self.settings,
            "notices": self.notices,
            "total": [row.as_dict() for row in self.total],
            "rows": {module: [row.as_dict() for row in rows] for module, rows in self.rows.items()},
        }


class Filter(NamedTuple):
    """``A'`` of one adapter in one module; ``‖ΔW‖``, to whose rounding it is known, and the norm of what is kept."""

    right: Factor
    norm: float
    kept: float


class InputDecomposition:
    """``ΔW_i = unique_i + shared_i`` by inputs: ``unique_i`` does on the inputs of ``i`` what ``ΔW_i`` does, and little
    on those of others.

    Every part has the ``B`` and the rank of its adapter. Asking for one computes nothing; saving it reads the rows.
    What :func:`fastlora.decompose` returns with ``inputs``.

    Args:
        pool: that was decomposed.
        filters: ``{adapter: {module: A' and norms}}``.
        inputs: the rows that it was decomposed by.
        report: what was kept and what is left.
        memory: bound in bytes while parts are saved.
    """

    mode = "inputs"

    def __init__(
        self,
        pool: Pool,
        filters: Mapping[str, Mapping[str, Filter]],
        inputs: Statistics,
        report: InputReport,
        memory: int | None = None,
    ) -> None:
        self.pool = pool
        self.inputs = inputs
        self.report = report
        self.memory = memory
        self.filters = filters

    @property
    def reports(self) -> list[InputReport]:
        """The report alone, as a list."""
        return [self.report]

    def unique_of(self, name: str) -> Adapter:
        """Adapter ``name`` as far as its own inputs need it: ``s_i B_i A_i'``. Its biases stay with it."""
        adapter = self.pool[name]
        found = self.filters[adapter.name]
        updates = {
            m: _with_right(u, found[m].right, found[m].norm) if m in found else u for m, u in adapter.updates.items()
        }
        return self._part("unique_of", adapter, updates)

    def shared_of(self, name: str) -> Adapter:
        """What is left of adapter ``name``: ``s_i B_i (A_i − A_i')``; of rank 0 in modules that stayed whole."""
        adapter = self.pool[name]
        found = self.filters[adapter.name]
        updates = {
            m: _with_right(u, complement(u, found[m].right), found[m].norm) if m in found else _empty(u)
            for m, u in adapter.updates.items()
        }
        return replace(self._part("shared_of", adapter, updates), extras={})

    def adapters(self) -> dict[str, Adapter]:
        """Every part by its place in the output directory: ``unique/<name>`` and ``shared/<name>``."""
        return {f"{part}/{n}": a for n in self.pool.names for part, a in self._both(n).items()}

    def summands(self) -> dict[str, Adapter]:
        """What a weighted sum is taken over, by name: all of :meth:`adapters`."""
        return self.adapters()

    def save(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        uniform_rank: bool = False,
        overwrite: Overwrite = False,
        format: str | None = None,
    ) -> Path:
        """Writes every part and ``report.json`` below ``path``: complete or not at all.

        Args:
            path: the directory to make; :meth:`adapters` has the names of the folders in it.
            dtype, uniform_rank, overwrite, format: as in :meth:`Decomposition.save`.

        Returns:
            ``path``.

        Raises:
            InputError, OutputError: as :meth:`Decomposition.save`.

        Cost: one read of the factors and the rows of inputs, and one write of all parts.
        """
        with OutputDirectory(Path(path), overwrite=overwrite) as staging:
            notes = self.write(staging, dtype, uniform_rank, format)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return Path(path)

    def write(
        self,
        staging: Path,
        dtype: torch.dtype | str | None = None,
        uniform_rank: bool = False,
        format: str | None = None,
    ) -> list[str]:
        """Writes into the directory ``staging``, which exists; for ``dtype``, ``uniform_rank`` and ``format`` see
        :meth:`save`. Returns what is worth telling, in sentences."""
        with bounded(self.memory):
            return write_parts(staging, self._parts(), self._write_report, dtype, uniform_rank, format)

    def _write_report(self, file: TextIO) -> None:
        file.write(f'{{"mode": "{self.mode}", "reports": [{json.dumps(self.report.as_dict(), allow_nan=False)}]')

    def _parts(self) -> Iterator[dict[str, Adapter]]:
        for name in self.pool.names:
            yield {f"{part}/{name}": adapter for part, adapter in self._both(name).items()}

    def _both(self, name: str) -> dict[str, Adapter]:
        return {"unique": self.unique_of(name), "shared": self.shared_of(name)}

    def _part(self, part: str, adapter: Adapter, updates: Mapping[str, Update]) -> Adapter:
        provenance = {
            "inputs": f"{part}({adapter.name})",
            **{key: self.report.settings[key] for key in ("mu", "ridge", "rows")},
            "pool": {n: self.pool[n].provenance for n in self.pool.names},
        }
        return replace(adapter, name=f"{part}({adapter.name})", updates=updates, provenance=provenance)


def decompose_by_inputs(
    pool: Pool, inputs: Statistics, mu: float, ridge: float, memory: int | None
) -> InputDecomposition:
    """The parts of every adapter. Raises :class:`InputError` for statistics that lack an adapter or a module."""
    if not (math.isfinite(mu) and mu >= 0.0):
        raise InputError(f"mu={mu}: how much the inputs of others weigh must be a finite number of at least 0")
    if not (math.isfinite(ridge) and ridge > 0.0):
        raise InputError(f"ridge={ridge}: must be a finite number above 0")
    lacking = [n for n in pool.names if n not in inputs.of]
    if lacking:
        raise InputError(
            f"inputs: the statistics have none of {lacking[0]!r}; they have {', '.join(inputs.of)}. Collect them with "
            "`fl.statistics(model, {name: batches, …}, pool.modules)`, under the names of the pool"
        )
    require_finite(pool.adapters)
    squares = _squares(pool)
    filters: dict[str, dict[str, Filter]] = {n: {} for n in pool.names}
    measured: dict[str, dict[str, Measured]] = {}
    odd: list[str] = []
    for modules in track(_by_site(pool, inputs), "filtering by inputs"):
        site, names = _site(pool, inputs, modules[0])
        for module in modules:
            present = [pool.adapters[i] for i in pool.present(module)]
            if present[0].updates[module].layout.kind not in ("linear", "conv"):
                odd.append(module)
                continue
            _require_rows(module, present, inputs)
            for adapter in present:
                update, t = adapter.updates[module], names.index(adapter.name)
                factor, told = filtered(site, t, update, squares[adapter.name, module], mu, ridge)
                filters[adapter.name][module] = Filter(factor, math.sqrt(told.whole), math.sqrt(told.kept))
                measured.setdefault(module, {})[adapter.name] = told
    return InputDecomposition(pool, filters, inputs, _report(pool, inputs, measured, odd, mu, ridge), memory)


def _squares(pool: Pool) -> dict[tuple[str, str], torch.Tensor]:
    """``BᵀB`` of every adapter and module."""
    grams = GramPass()
    asked: dict[tuple[str, str], torch.Tensor] = {}
    for adapter in pool.adapters:
        by_rank: dict[int, list[str]] = {}
        for module, update in adapter.updates.items():
            by_rank.setdefault(update.rank, []).append(module)
        for rank, modules in by_rank.items():
            if rank:
                blocks = grams.diagonal([[adapter.updates[m].B] for m in modules], rank)
                asked |= {(adapter.name, m): blocks[i, 0] for i, m in enumerate(modules)}
            else:
                asked |= {(adapter.name, m): torch.zeros(0, 0, dtype=torch.float64) for m in modules}
    grams.run()
    return asked


def _by_site(pool: Pool, inputs: Statistics) -> list[list[str]]:
    """The modules that all adapters give the same rows, together."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for module in pool.modules:
        key = tuple(inputs.of[n].sites.get(module) for n in pool.names)
        groups.setdefault(key if any(key) else (module,), []).append(module)
    return list(groups.values())


def _site(pool: Pool, inputs: Statistics, module: str) -> tuple[Site, list[str]]:
    """The rows of all adapters that have some for a module: others see its change too, whether they adapt it or not."""
    found = {n: rows for n in pool.names if (rows := inputs.of[n].of(module)) is not None}
    widths = {rows.shape[1] for rows in found.values()}
    if len(widths) > 1:
        raise InputError(f"inputs: module {module!r} has rows of different lengths ({', '.join(map(str, widths))})")
    return (Site.of(list(found.values())) if found else Site((), torch.zeros(0, 0), torch.zeros(0, 0))), list(found)


def _require_rows(module: str, adapters: Sequence[Adapter], inputs: Statistics) -> None:
    for adapter in adapters:
        rows, length = inputs.of[adapter.name].of(module), adapter.updates[module].A.length
        if rows is None:
            raise InputError(
                f"the statistics of {adapter.name!r} lack module {module!r}; collect them for all of `pool.modules`"
            )
        if rows.shape[1] != length:
            raise InputError(
                f"the statistics of {adapter.name!r} have inputs of length {rows.shape[1]} for {module!r}, whose "
                f"weight takes {length}; they are of another model"
            )


def _with_right(update: Update, right: Factor, norm: float) -> Update:
    return replace(update, A=right, noise=joint_noise([update.noise, Noise(0.0, norm)]))


def _empty(update: Update) -> Update:
    return replace(update, B=replace(update.B, rank=0, terms=()), A=replace(update.A, rank=0, terms=()))


def _report(
    pool: Pool,
    inputs: Statistics,
    measured: Mapping[str, Mapping[str, Measured]],
    odd: Sequence[str],
    mu: float,
    ridge: float,
) -> InputReport:
    rows = {m: [_row(n, [told]) for n, told in of.items()] for m, of in measured.items()}
    each = {n: [of[n] for of in measured.values() if n in of] for n in pool.names}
    settings = {
        "adapters": pool.names,
        "mode": "inputs",
        "mu": mu,
        "ridge": ridge,
        "rows": {n: max((len(x) for x in inputs.of[n].rows.values()), default=0) for n in pool.names},
    }
    notices = list(pool.notices)
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        notices.append(f"{odd[0]}{more} have no inputs of this kind (embeddings, experts), and stayed whole: unique")
    return InputReport(settings, [_row(n, told) for n, told in each.items()], rows, notices)


def _row(name: str, told: Sequence[Measured]) -> InputRow:
    whole, own, others = (sum(getattr(m, key) for m in told) for key in ("whole", "own", "others"))

    def shares(kept: float, missed: float, left: float) -> tuple[float, float, float]:
        return _share(kept, whole), 1.0 - _share(missed, own), _share(left, others)

    at = {f"{step:g}": shares(*(sum(m.at[i][j] for m in told) for j in range(3))) for i, step in enumerate(STEPS)}
    return InputRow(name, *at["1"], at)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
