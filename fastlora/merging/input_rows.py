"""Inputs that adapted modules saw: a few rows for every place of a model, kept in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
from fastlora.ops.finite import is_finite

KIND = "statistics"
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
    ``8·N²`` bytes for all ``N`` rows of a site. So rows must not be changed.
    """

    of: Mapping[str, InputRows]
    _grams: dict[Places, Tensor] = field(default_factory=dict, init=False, repr=False)
    _kept: dict[Places, dict[float, tuple[Tensor | None, float]]] = field(default_factory=dict, init=False, repr=False)

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
        return Statistics({**self.of, **other.of})

    def kept(self, places: Places) -> dict[float, tuple[Tensor | None, float]]:
        """Where what is computed from the products of a site, named by its ``places``, is kept, by the ridge."""
        return self._kept.setdefault(places, {})

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
        data = {"kind": KIND, "version": __version__, "groups": groups}
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
        groups = _groups(file)
        found = {name: _rows(file, name, group, tensors) for name, group in groups.items()}
        known = {f"{name}/{site}" for name, own in found.items() for site in own.rows}
        unknown = sorted(tensors.keys() - known)
        if unknown:
            raise InputError(f"{file}: tensor {unknown[0]!r} belongs to no adapter of the file; collect it again")
        return cls(found)


def _groups(file: Path) -> Mapping[str, object]:
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(MARK, "{}")
    try:
        data = json.loads(text)
    except ValueError:
        data = {}
    groups = data.get("groups") if isinstance(data, dict) and data.get("kind") == KIND else None
    if not isinstance(groups, dict):
        raise InputError(f"{file} holds no statistics of inputs; make them with `fastlora.statistics(…).save(…)`")
    return groups


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
