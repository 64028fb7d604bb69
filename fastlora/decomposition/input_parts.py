"""Unique and shared parts by inputs: what :func:`fastlora.decompose` returns with ``inputs=``."""

from __future__ import annotations

import functools
import itertools
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
from fastlora.decomposition.input_filter import Filter, Site, complement, is_dual, solved
from fastlora.decomposition.input_report import InputReport, input_report, measured
from fastlora.decomposition.writing import SavedParts, write_parts
from fastlora.engine.checks import not_finite
from fastlora.engine.gram import GramPass
from fastlora.engine.row_products import products_with_rows
from fastlora.engine.schedule import split_to_fit
from fastlora.errors import InputError
from fastlora.merging.input_rows import Places, Statistics
from fastlora.ops.finite import is_finite
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
            for group, site in itertools.chain.from_iterable(_sites(self.pool, self.inputs, "measuring by inputs")):
                each = [(m, a.name, a.updates[m]) for m in group.modules for a in _having(self.pool, m)]
                filters = [(update, self.filters[name][m], *self._sizes[name, m]) for m, name, update in each]
                found = measured(site, filters, self.settings["mu"], self.settings["ridge"])
                for (module, name, _), row in zip(each, found, strict=True):
                    told.setdefault(module, {})[name] = row
        in_order = {m: told[m] for m in self.pool.modules if m in told}
        return input_report(self.settings, in_order, [*self.pool.notices, *self._notices()])

    @functools.cached_property
    def _sizes(self) -> dict[tuple[str, str], tuple[Tensor, float]]:
        """``s²BᵀB`` and ``‖ΔW‖`` of every adapter and module."""
        with bounded(self.memory):
            return {key: size for adapter in self.pool.adapters for key, size in _sizes(adapter).items()}

    def lengths(self, name: str) -> dict[str, float]:
        """``‖unique‖`` of the adapter ``name`` in every module that was filtered."""
        return {m: found.kept(self._sizes[name, m][0]) for m, found in self.filters[name].items()}

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
            m: self._with_right(adapter.name, m, found[m].right) if m in found else u
            for m, u in adapter.updates.items()
        }
        return self._part("unique_of", adapter, updates)

    def shared_of(self, name: str) -> Adapter:
        """What is left of adapter ``name``: ``s_i B_i (A_i − A_i')``; of rank 0 in modules that stayed whole."""
        adapter = self.pool[name]
        found = self.filters[adapter.name]
        updates = {
            m: self._with_right(adapter.name, m, complement(u, found[m].right)) if m in found else _empty(u)
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

    def _with_right(self, name: str, module: str, right: Factor) -> Update:
        """``A'`` is known to the rounding of the whole."""
        update = self.pool[name].updates[module]
        noise = joint_noise([update.noise, Noise(0.0, self._sizes[name, module][1])])
        return replace(update, A=right, noise=noise)

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
            _require_rows(module, pool, inputs)
    _require_finite(pool, inputs)
    filters: dict[str, dict[str, Filter]] = {n: {} for n in pool.names}
    for some in _sites(pool, inputs, "filtering by inputs"):
        each = [[(m, a) for m in group.modules for a in _having(pool, m)] for group, _ in some]
        at = [[group.names.index(a.name) for _, a in of_site] for (group, _), of_site in zip(some, each, strict=True)]
        factors = [[a.updates[m].A for m, a in of_site] for of_site in each]
        for (_, site), of_site, ts, own in zip(some, each, at, _own_products(some, factors, at), strict=True):
            for (module, adapter), product in zip(of_site, own, strict=True):
                if not math.isfinite(float(product.sum())):
                    raise not_finite(adapter.name, module, "A")
            found = solved(site, list(zip(ts, own, strict=True)), mu, ridge)
            weights = [site.weights(t, mu) for t in range(len(site.rows))]
            for (module, adapter), t, product, (solution, epsilon) in zip(of_site, ts, own, found, strict=True):
                filters[adapter.name][module] = Filter(site.rows, weights[t], t, epsilon, product, solution)
    rows = {n: max((len(x) for x in inputs.of[n].rows.values()), default=0) for n in pool.names}
    settings = {"adapters": pool.names, "mode": "inputs", "mu": mu, "ridge": ridge, "rows": rows}
    return InputDecomposition(pool, filters, inputs, settings, memory)


def _having(pool: Pool, module: str) -> list[Adapter]:
    return [pool.adapters[i] for i in pool.present(module)]


def _has_inputs(pool: Pool, module: str) -> bool:
    return _having(pool, module)[0].updates[module].layout.kind in ("linear", "conv")


def _require_finite(pool: Pool, inputs: Statistics) -> None:
    """Raises for a ``B`` that holds NaN or Inf, and for such an ``A`` that meets no rows: of others, products tell."""
    for adapter in pool.adapters:
        for module, update in adapter.updates.items():
            rows = inputs.of[adapter.name].of(module) if _has_inputs(pool, module) else None
            for factor in (update.B, update.A) if rows is None or not len(rows) else (update.B,):
                if not all(is_finite(term.source) for term in factor.terms):
                    raise not_finite(adapter.name, module, factor.side)
            release(sources([update]))


def _sizes(adapter: Adapter) -> dict[tuple[str, str], tuple[Tensor, float]]:
    """``s²BᵀB`` and ``‖ΔW‖`` of every module, by adapter and module."""
    grams = GramPass()
    by_rank: dict[int, list[str]] = {}
    for module, update in adapter.updates.items():
        by_rank.setdefault(update.rank, []).append(module)
    asked: list[tuple[list[str], Tensor, Tensor]] = []
    for rank, modules in by_rank.items():
        updates = [adapter.updates[m] for m in modules]
        empty = torch.zeros(len(modules), 0, 0, dtype=torch.float64)
        left = grams.diagonal([[u.B] for u in updates], rank)[:, 0] if rank else empty
        right = grams.diagonal([[u.A] for u in updates], rank)[:, 0] if rank else empty
        asked.append((modules, left, right))
    grams.run()
    found: dict[tuple[str, str], tuple[Tensor, float]] = {}
    for modules, left, right in asked:
        scalings = torch.tensor([adapter.updates[m].scaling for m in modules], dtype=torch.float64)
        left *= scalings.square()[:, None, None]
        norms = (left * right).sum((1, 2)).clamp(min=0.0).sqrt().tolist()
        found |= {(adapter.name, m): size for m, size in zip(modules, zip(left, norms, strict=True), strict=True)}
    release(sources(adapter.updates.values()))
    return found


def _sites(pool: Pool, inputs: Statistics, label: str) -> Iterator[list[tuple[_Group, Site]]]:
    """Every input of the model with the modules that have it, some at a time. What is computed of rows alone stays with
    the statistics, unless memory is bounded."""
    groups = _groups(pool, inputs)
    counts = [sum(len(inputs.of[n].rows[s]) for n, s in group.places) for group in groups]
    keep = not is_bounded()
    for some in track(split_to_fit([8 * n * n for n in counts], SITE_BYTES), label):
        chosen = [groups[i] for i in some]
        rows = [tuple(inputs.of[n].rows[s] for n, s in group.places) for group in chosen]
        dual = [g.places for g, x in zip(chosen, rows, strict=True) if is_dual(x)]
        grams = iter(inputs.grams(dual, keep=keep))
        sites = []
        for group, own in zip(chosen, rows, strict=True):
            gram = next(grams) if is_dual(own) else None
            sites.append(Site.of(own, gram, None if gram is None else inputs.kept(group.places, keep=keep)))
        yield list(zip(chosen, sites, strict=True))
        factors = sources(a.updates[m] for group in chosen for m in group.modules for a in _having(pool, m))
        release([*itertools.chain.from_iterable(rows), *factors])


def _groups(pool: Pool, inputs: Statistics) -> list[_Group]:
    wanted = [m for m in pool.modules if _has_inputs(pool, m)]
    return [_Group(modules, places) for places, modules in inputs.places(wanted, pool.names).items()]


def _own_products(
    some: Sequence[tuple[_Group, Site]], factors: Sequence[Sequence[Factor]], at: Sequence[Sequence[int]]
) -> list[list[Tensor]]:
    """``A X_tᵀ`` of some factors at each site with the rows of the adapters at their positions ``at``."""
    members: dict[tuple[int, int], list[int]] = {}
    for n, positions in enumerate(at):
        for i, t in enumerate(positions):
            members.setdefault((n, t), []).append(i)
    mine = [[factors[n][i] for i in of] for (n, _), of in members.items()]
    products = products_with_rows(mine, [some[n][1].rows[t] for n, t in members])
    found: list[dict[int, Tensor]] = [{} for _ in some]
    for ((n, _), of), own in zip(members.items(), products, strict=True):
        found[n] |= zip(of, own, strict=True)
    return [[of_site[i] for i in range(len(of_site))] for of_site in found]


def _require_rows(module: str, pool: Pool, inputs: Statistics) -> None:
    widths = {x.shape[1] for n in pool.names if (x := inputs.of[n].of(module)) is not None}
    for adapter in _having(pool, module):
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


def _empty(update: Update) -> Update:
    return replace(update, B=replace(update.B, rank=0, terms=()), A=replace(update.A, rank=0, terms=()))
