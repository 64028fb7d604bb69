"""Unique and shared parts by inputs: what :func:`fastlora.decompose` returns with ``inputs=``."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.factors import Factor
from fastlora.core.updates import Noise, Update, joint_noise, sources
from fastlora.decomposition.input_filter import Filter, Site, complement, solved
from fastlora.decomposition.input_report import InputReport, input_report, measured
from fastlora.decomposition.writing import SavedParts, write_parts
from fastlora.engine.checks import not_finite
from fastlora.engine.gram import GramPass
from fastlora.engine.row_products import products_with_rows
from fastlora.engine.schedule import split_to_fit
from fastlora.errors import InputError
from fastlora.merging.input_rows import Places, Statistics
from fastlora.runtime.memory import bounded, is_bounded, release
from fastlora.runtime.progress import track

SITE_BYTES = 64 * 2**20
"""Of what sites take that are computed together."""


class InputDecomposition(SavedParts):
    """``ΔW_i = unique_i + shared_i`` by inputs: ``unique_i`` does on the inputs of ``i`` what ``ΔW_i`` does, and little
    on those of others.

    Every part has the ``B`` and the rank of its adapter. Asking for one computes nothing; saving it reads the rows.
    What :func:`fastlora.decompose` returns with ``inputs``.

    Args:
        pool: that was decomposed.
        filters: ``{adapter: {module: A'}}``.
        inputs: the rows that it was decomposed by.
        settings: ``mu``, ``ridge``, ``rows``: how.
        memory: bound in bytes on what the report and saving take.
    """

    mode = "inputs"

    def __init__(
        self,
        pool: Pool,
        filters: Mapping[str, Mapping[str, Filter]],
        inputs: Statistics,
        settings: dict[str, Any],
        memory: int | None = None,
    ) -> None:
        self.pool = pool
        self.inputs = inputs
        self.settings = settings
        self.memory = memory
        self.filters = filters

    @functools.cached_property
    def report(self) -> InputReport:
        """What was kept and what is left, also for ``μ/10`` and ``10 μ``. Made when it is first asked for: it reads the
        factors and the rows again, and costs more than the parts."""
        told: dict[str, dict[str, Any]] = {}
        with bounded(self.memory):
            for group, site in _sites(self.pool, self.inputs, "measuring by inputs"):
                each = [(m, a.name, a.updates[m]) for m in group.modules for a in _having(self.pool, m)]
                filters = [(update, self.filters[name][m]) for m, name, update in each]
                found = measured(site, filters, self.settings["mu"], self.settings["ridge"])
                for (module, name, _), row in zip(each, found, strict=True):
                    told.setdefault(module, {})[name] = row
        in_order = {m: told[m] for m in self.pool.modules if m in told}
        return input_report(self.settings, in_order, [*self.pool.notices, *self._notices()])

    def _notices(self) -> list[str]:
        odd = [m for m in self.pool.modules if not _has_inputs(self.pool, m)]
        if not odd:
            return []
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        return [f"{odd[0]}{more} have no inputs of this kind (embeddings, experts), and stayed whole: unique"]

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
            **{key: self.settings[key] for key in ("mu", "ridge", "rows")},
            "pool": {n: self.pool[n].provenance for n in self.pool.names},
        }
        return replace(adapter, name=f"{part}({adapter.name})", updates=updates, provenance=provenance)


@dataclass(frozen=True, slots=True)
class _Group:
    """Modules that all adapters give the same rows: those of ``places``, by the names of the adapters."""

    modules: list[str]
    places: Places

    @property
    def names(self) -> list[str]:
        """Of the adapters that have rows: others see a change too, whether they adapt the module or not."""
        return [name for name, _ in self.places]


def decompose_by_inputs(
    pool: Pool, inputs: Statistics, mu: float, ridge: float, memory: int | None
) -> InputDecomposition:
    """The parts of every adapter. Raises :class:`InputError` for statistics that lack an adapter or a module, and
    :class:`NonFiniteError` for a factor that holds NaN or Inf."""
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
    for module in pool.modules:
        if _has_inputs(pool, module):
            _require_rows(module, _having(pool, module), inputs)
    squares, norms = _sizes(pool)
    filters: dict[str, dict[str, Filter]] = {n: {} for n in pool.names}
    for group, site in _sites(pool, inputs, "filtering by inputs"):
        each = [(m, a) for m in group.modules for a in _having(pool, m)]
        at = [group.names.index(a.name) for _, a in each]
        products = _own_products(site, [a.updates[m].A for m, a in each], at)
        found = solved(site, list(zip(at, products, strict=True)), mu, ridge)
        for (module, adapter), t, (own, solution, epsilon) in zip(each, at, found, strict=True):
            key = adapter.name, module
            filters[adapter.name][module] = Filter(site, t, mu, epsilon, own, solution, squares[key], norms[key])
    rows = {n: max((len(x) for x in inputs.of[n].rows.values()), default=0) for n in pool.names}
    settings = {"adapters": pool.names, "mode": "inputs", "mu": mu, "ridge": ridge, "rows": rows}
    return InputDecomposition(pool, filters, inputs, settings, memory)


def _having(pool: Pool, module: str) -> list[Adapter]:
    return [pool.adapters[i] for i in pool.present(module)]


def _has_inputs(pool: Pool, module: str) -> bool:
    return _having(pool, module)[0].updates[module].layout.kind in ("linear", "conv")


def _sizes(pool: Pool) -> tuple[dict[tuple[str, str], Tensor], dict[tuple[str, str], float]]:
    """``s²BᵀB`` and ``‖ΔW‖`` of every adapter and module. Raises for a factor that holds NaN or Inf."""
    grams = GramPass()
    asked: list[tuple[str, list[str], Tensor, Tensor, Tensor]] = []
    for adapter in pool.adapters:
        by_rank: dict[int, list[str]] = {}
        for module, update in adapter.updates.items():
            by_rank.setdefault(update.rank, []).append(module)
        for rank, modules in by_rank.items():
            updates = [adapter.updates[m] for m in modules]
            empty = torch.zeros(len(modules), 0, 0, dtype=torch.float64)
            left = grams.diagonal([[u.B] for u in updates], rank)[:, 0] if rank else empty
            right = grams.diagonal([[u.A] for u in updates], rank)[:, 0] if rank else empty
            scalings = torch.tensor([u.scaling for u in updates], dtype=torch.float64)
            asked.append((adapter.name, modules, left, right, scalings))
    grams.run()
    squares: dict[tuple[str, str], Tensor] = {}
    norms: dict[tuple[str, str], float] = {}
    for name, modules, left, right, scalings in asked:
        for side, blocks in (("B", left), ("A", right)):
            bad = (~blocks.flatten(1).isfinite()).any(1).nonzero().flatten().tolist()
            if bad:
                raise not_finite(name, modules[bad[0]], side)
        left *= scalings.square()[:, None, None]
        sizes = (left * right).sum((1, 2)).clamp(min=0.0).sqrt().tolist()
        squares |= {(name, m): block for m, block in zip(modules, left.unbind(), strict=True)}
        norms |= {(name, m): size for m, size in zip(modules, sizes, strict=True)}
    return squares, norms


def _sites(pool: Pool, inputs: Statistics, label: str) -> Iterator[tuple[_Group, Site]]:
    """Every input of the model with the modules that have it. Products of rows stay with the statistics, unless memory
    is bounded."""
    groups = _groups(pool, inputs)
    counts = [sum(len(inputs.of[n].rows[s]) for n, s in group.places) for group in groups]
    for some in track(split_to_fit([8 * n * n for n in counts], SITE_BYTES), label):
        chosen = [groups[i] for i in some]
        rows = [tuple(inputs.of[n].rows[s] for n, s in group.places) for group in chosen]
        is_dual = [counts[i] <= x[0].shape[1] for i, x in zip(some, rows, strict=True)]
        few = [group.places for group, dual in zip(chosen, is_dual, strict=True) if dual]
        grams = iter(inputs.grams(few, keep=not is_bounded()))
        for group, own, dual in zip(chosen, rows, is_dual, strict=True):
            yield group, Site(own, next(grams) if dual else None)
            release([*own, *sources(a.updates[m] for m in group.modules for a in _having(pool, m))])


def _groups(pool: Pool, inputs: Statistics) -> list[_Group]:
    groups: dict[Places, list[str]] = {}
    for module in pool.modules:
        if _has_inputs(pool, module):
            sites = [(n, inputs.of[n].sites.get(module)) for n in pool.names]
            groups.setdefault(tuple((n, s) for n, s in sites if s is not None), []).append(module)
    return [_Group(modules, places) for places, modules in groups.items()]


def _own_products(site: Site, factors: Sequence[Factor], at: Sequence[int]) -> list[Tensor]:
    """``A X_tᵀ`` of some factors with the rows of the adapters at their positions ``at``."""
    members = {t: [i for i, of in enumerate(at) if of == t] for t in sorted(set(at))}
    of_each = products_with_rows([[factors[i] for i in m] for m in members.values()], [site.rows[t] for t in members])
    found = {i: x for m, some in zip(members.values(), of_each, strict=True) for i, x in zip(m, some, strict=True)}
    return [found[i] for i in range(len(factors))]


def _require_rows(module: str, adapters: Sequence[Adapter], inputs: Statistics) -> None:
    widths = {x.shape[1] for n in inputs.of.values() if (x := n.of(module)) is not None}
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
    if len(widths) > 1:
        raise InputError(f"inputs: module {module!r} has rows of different lengths ({', '.join(map(str, widths))})")


def _with_right(update: Update, right: Factor, norm: float) -> Update:
    return replace(update, A=right, noise=joint_noise([update.noise, Noise(0.0, norm)]))


def _empty(update: Update) -> Update:
    return replace(update, B=replace(update.B, rank=0, terms=()), A=replace(update.A, rank=0, terms=()))
