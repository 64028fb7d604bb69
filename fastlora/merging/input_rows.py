"""Inputs that adapted modules saw: a few rows for every place of a model, kept in one file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fastlora._version import __version__
from fastlora.core.names import check_name
from fastlora.engine.row_products import row_grams
from fastlora.errors import InputError, NonFiniteError
from fastlora.files.earlier import MARK, Overwrite
from fastlora.files.json_files import shown
from fastlora.files.output import replacing
from fastlora.files.tensor_files import SAFETENSORS, read_safetensors
from fastlora.files.tensor_writing import TensorFile
from fastlora.merging.site_factors import RIDGE, inverse_of, mean_scales, over_rows
from fastlora.ops.finite import is_finite
from fastlora.runtime.progress import track

KIND = "statistics"
PRODUCTS = "products"
"""What names the products of rows in a file: `/I/products` and `/I/inverse` of the `I`-th site with any."""

Places = tuple[tuple[str, str], ...]
"""Rows of some adapters: ``(adapter, site)`` of each."""

ROWS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that rows are kept in."""


@dataclass(frozen=True, eq=False)
class InputRows:
    """What the modules of a model were given, for one adapter.

    ``rows``: ``{site: [N, m]}``, some of the vectors ``x`` of ``y = W x``, one a row, in the dtype that the model had.
    ``sites``: ``{module: site}``; modules with the same input, as queries, keys and values, share a site. ``seen``: how
    many vectors each site had in all.
    """

    rows: Mapping[str, Tensor]
    sites: Mapping[str, str]
    seen: Mapping[str, int] = field(default_factory=dict)

    def of(self, module: str) -> Tensor | None:
        """The rows of a module; ``None`` where none were collected."""
        site = self.sites.get(module)
        return None if site is None else self.rows[site]


@dataclass(frozen=True, eq=False)
class Statistics:
    """The inputs of every adapter's modules, by the names of the adapters: ``{name: InputRows}``.

    :func:`fastlora.statistics` collects them; ``fl.merge(pool, method="regmean", data=…)`` uses them.

    What decompositions compute of rows alone is kept: products, and for ``mu=1`` what they are divided by, each
    ``8·N²`` bytes for all ``N`` rows of a site. So rows must not be changed. Where both take no more bytes than the
    rows, :func:`fastlora.statistics` computes them at once, and they are saved with the rows.
    """

    of: Mapping[str, InputRows]
    _grams: dict[Places, Tensor] = field(default_factory=dict, init=False, repr=False)
    _kept: dict[Places, dict[float, tuple[Tensor | None, float]]] = field(default_factory=dict, init=False, repr=False)

    def places(self, modules: Iterable[str], names: Sequence[str]) -> dict[Places, list[str]]:
        """The rows that the adapters of some ``names`` have for each of the ``modules``, and the modules with the same
        ones. They are in the order of the statistics, so that other orders of a pool are the same rows."""
        ordered = [n for n in self.of if n in set(names)]
        found: dict[Places, list[str]] = {}
        for module in modules:
            sites = [(n, self.of[n].sites.get(module)) for n in ordered]
            found.setdefault(tuple((n, s) for n, s in sites if s is not None), []).append(module)
        return found

    def prepare(self) -> Statistics:
        """Computes what a decomposition of all adapters with ``mu=1`` needs of rows alone, where that takes no more
        bytes than the rows; returns itself.

        Cost: ``N²·m + N³`` operations in float64 an input of the model, for all ``N`` rows there.
        """
        modules = dict.fromkeys(m for own in self.of.values() for m in own.sites)
        sites = [places for places in self.places(modules, list(self.of)) if self._is_small(places)]
        for places in track(sites, "products of inputs"):
            (gram,) = self.grams([places])
            kept = self.kept(places)
            if RIDGE not in kept:
                rows = [self.of[name].rows[site] for name, site in places]
                weights = over_rows(mean_scales(rows), rows)
                kept[RIDGE] = inverse_of(gram, weights, RIDGE, rows[0].shape[1])
        return self

    def _is_small(self, places: Places) -> bool:
        """Whether products and inverse take no more room than the rows, and rows are no more than columns."""
        rows = [self.of[name].rows[site] for name, site in places]
        if len({x.shape[1] for x in rows}) > 1:
            return False
        N = sum(len(x) for x in rows)
        return 0 < N <= rows[0].shape[1] and 16 * N**2 <= sum(x.nbytes for x in rows)

    def grams(self, sites: Sequence[Places], *, keep: bool = True) -> list[Tensor]:
        """``XXᵀ [N, N]`` of each of the ``sites``, float64: ``X`` has the rows of some adapters below one another, each
        named as ``(adapter, site)``. ``keep``: for the next time.

        Cost: ``N²·m`` operations for every one that is not there.
        """
        missing = [places for places in dict.fromkeys(sites) if places not in self._grams]
        computed = row_grams([[self.of[name].rows[site] for name, site in places] for places in missing])
        new = dict(zip(missing, computed, strict=True))
        if keep:
            self._grams.update(new)
        return [new[places] if places in new else self._grams[places] for places in sites]

    def __repr__(self) -> str:
        told = ", ".join(f"{name}: {len(rows.sites)} modules" for name, rows in self.of.items())
        return f"Statistics({told})"

    def __or__(self, other: Statistics) -> Statistics:
        """Those of both. Raises :class:`InputError` where both have an adapter of one name."""
        twice = sorted(self.of.keys() & other.of.keys())
        if twice:
            raise InputError(f"statistics of {twice[0]!r} are given twice; leave out one of the two")
        both = Statistics({**self.of, **other.of})
        for one in (self, other):
            both._grams.update(one._grams)
            both._kept.update(one._kept)
        return both

    def kept(self, places: Places, *, keep: bool = True) -> dict[float, tuple[Tensor | None, float]]:
        """What was computed from the products of a site, named by its ``places``, by the ridge; what is put there stays
        for the next time, unless ``keep`` is false."""
        return self._kept.setdefault(places, {}) if keep else dict(self._kept.get(places, {}))

    def turned(self, of: Mapping[str, InputRows]) -> Statistics:
        """Statistics ``of`` the same rows in other coordinates: their products are the same, and stay."""
        other = Statistics(of)
        other._grams.update(self._grams)
        other._kept.update(self._kept)
        return other

    def save(self, path: str | Path, *, overwrite: Overwrite = False) -> Path:
        """Writes one ``.safetensors`` file to ``path``, atomically, and returns it; ``overwrite`` replaces an earlier
        one, ``"force"`` anything.

        Raises :class:`OutputError` for a path that exists or cannot be written.
        """
        target = Path(path)
        if target.suffix != SAFETENSORS:
            raise InputError(f"statistics are written as one file, NAME{SAFETENSORS}; {target} has another suffix")
        tensors = {f"{name}/{site}": x.contiguous() for name, own in self.of.items() for site, x in own.rows.items()}
        groups = {name: {"sites": dict(own.sites), "seen": dict(own.seen)} for name, own in self.of.items()}
        data: dict[str, Any] = {"kind": KIND, "version": __version__, "groups": groups}
        data[PRODUCTS] = [
            self._told(i, places, tensors) for i, places in enumerate(filter(self._is_small, self._grams))
        ]
        with replacing(target, overwrite=overwrite) as staging:
            file = TensorFile(staging, tensors, {"format": "pt", MARK: json.dumps(data)})
            file.write(tensors, check=True)
            file.close()
        return target

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """What :meth:`save` wrote to the file ``path``. The rows stay in the file, memory-mapped, until they are used.

        Raises :class:`InputError` for another file, and :class:`NonFiniteError` for NaN or Inf.
        """
        file = Path(path)
        tensors = read_safetensors(file)
        groups, products = _groups(file)
        found = {name: _rows(file, name, group, tensors) for name, group in groups.items()}
        known = {f"{name}/{site}" for name, own in found.items() for site in own.rows}
        statistics = cls(found)
        for i, told in enumerate(products):
            known |= statistics._take(file, i, told, tensors)
        unknown = sorted(tensors.keys() - known)
        if unknown:
            raise InputError(f"{file}: tensor {unknown[0]!r} belongs to no adapter of the file; collect it again")
        return statistics

    def _told(self, i: int, places: Places, tensors: dict[str, Tensor]) -> dict[str, object]:
        """What the file says of the products of a site, which go to the ``tensors``."""
        tensors[f"/{i}/products"] = self._grams[places]
        told: dict[str, object] = {"places": places}
        inverse, epsilon = self._kept.get(places, {}).get(RIDGE, (None, 0.0))
        if inverse is not None:
            tensors[f"/{i}/inverse"] = inverse
            told["epsilon"] = epsilon
        return told

    def _take(self, file: Path, i: int, told: object, tensors: Mapping[str, Tensor]) -> set[str]:
        """Keeps the products of a site that a file has; the names of their tensors."""
        wrong = InputError(f"{file}: its products of rows do not belong to its rows; collect the statistics again")
        try:
            places: Places = tuple((name, site) for name, site in told["places"])  # type: ignore[index]
            N = sum(len(self.of[name].rows[site]) for name, site in places)
            epsilon = told.get("epsilon")  # type: ignore[attr-defined]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise wrong from None
        names = [f"/{i}/products", f"/{i}/inverse"][: 1 if epsilon is None else 2]
        own = [tensors.get(name) for name in names]
        square = all(x is not None and x.shape == (N, N) and x.dtype == torch.float64 for x in own)
        if not square or not (epsilon is None or (isinstance(epsilon, float) and 0 < epsilon < math.inf)):
            raise wrong
        gram, *inverse = [x for x in own if x is not None]
        if not all(is_finite(x) for x in (gram, *inverse)):
            raise NonFiniteError(f"{file}: the products of its rows hold NaN or Inf; collect the statistics again")
        self._grams[places] = gram
        if inverse and epsilon is not None:
            self._kept[places] = {RIDGE: (inverse[0], epsilon)}
        return set(names)


def _groups(file: Path) -> tuple[Mapping[str, object], list[object]]:
    """What a file says of every adapter, and of products of rows: files that were written without them have none."""
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(MARK, "{}")
    try:
        data = json.loads(text)
    except ValueError:
        data = {}
    groups = data.get("groups") if isinstance(data, dict) and data.get("kind") == KIND else None
    products = data.get(PRODUCTS, []) if isinstance(groups, dict) else None
    if not isinstance(groups, dict) or not isinstance(products, list):
        raise InputError(f"{file} holds no statistics of inputs; make them with `fastlora.statistics(…).save(…)`")
    return groups, products


def _rows(file: Path, name: str, group: object, tensors: Mapping[str, Tensor]) -> InputRows:
    check_name(name)
    sites = group.get("sites") if isinstance(group, dict) else None
    seen = group.get("seen") if isinstance(group, dict) else None
    if sites is None or seen is None or not _is_table(sites, str) or not _is_table(seen, int):
        raise InputError(f"{file}: what it says of {shown(name)} is not understood; collect the statistics again")
    rows = {}
    for site in dict.fromkeys(sites.values()):
        x = tensors.get(f"{name}/{site}")
        if x is None or x.dim() != 2 or x.dtype not in ROWS:
            raise InputError(f"{file}: there are no rows of {shown(site)} for {shown(name)}; collect them again")
        if not is_finite(x):
            raise NonFiniteError(f"{file}: the rows of {shown(site)} hold NaN or Inf; collect them again")
        rows[site] = x
    return InputRows(rows, sites, seen)


def _is_table(value: object, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(v, kind) for v in value.values())
