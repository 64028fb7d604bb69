"""``add_weighted_adapter`` on a live model: peft's signature, and every merge method."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.adapters.ia3 import IA3
from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool, require_updates
from fastlora.core.dtypes import parse_dtype
from fastlora.core.sums import common_base
from fastlora.errors import InputError
from fastlora.integrations.peft.clamping import check_quantile, clamped
from fastlora.integrations.peft.live import Host, host_of, require_new
from fastlora.integrations.peft.reading import live_factors, read_from
from fastlora.integrations.peft.sums import side_by_side
from fastlora.integrations.peft.writing import (
    Ready,
    ReadyFactors,
    put,
    ready,
    refuse_experts,
    require_finite_tensors,
)
from fastlora.merging.forms.result import largest_rank
from fastlora.merging.merge import merge, methods

SUMS = ("linear", "cat")
TOLD_BELOW = 0.9
"""A share of the energy of an elementwise result below which its loss is told."""
PEFT_TYPES = (
    *("svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd"),
    *("magnitude_prune", "magnitude_prune_svd"),
)


class Wanted(NamedTuple):
    """What a call asked for."""

    kind: str
    rank: int | None
    density: float | None
    elect: str
    parameters: dict[str, Any]


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    *,
    dtype: torch.dtype | str | None = None,
    uniform_rank: int | bool = False,
    activate: bool = False,
    **parameters: object,
) -> None:
    """Adds the combination of some adapters to a live model, in place: peft's method, on ``ΔW`` instead of factors.

    ``"linear"`` and ``"cat"`` are ``Σ_i w_i s_i B_i A_i`` itself, of rank ``Σ r_i``; ``"svd"`` is its best
    approximation. ``"ties"``, ``"dare_linear"``, ``"dare_ties"`` and ``"magnitude_prune"`` are taken elementwise of
    ``ΔW`` and cut, with ``_svd`` or without: peft takes them, and ``"linear"``, of ``A`` and ``B`` apart without it,
    which is another sum. Of (IA)³ adapters it is ``l = 1 + Σ_i w_i (l_i − 1)``.

    Args:
        model: a ``PeftModel``, its tuner, or a module with a ``peft_config``.
        adapters: names, each once.
        weights: one a name; negative ones subtract.
        adapter_name: of the new adapter.
        combination_type: peft's, or a name of :func:`fastlora.methods`.
        svd_rank: of the result, for what is cut; by default the largest rank of the adapters. ``"linear"`` is cut
            where it is given.
        svd_clamp: cuts the entries of ``U S`` and ``Vᵀ`` of a decomposition at this quantile of them and of their
            negatives, from 0.5 to 1.
        svd_full_matrices, svd_driver: of peft's dense decomposition; they change no result and are not used.
        density: share of elements that are kept, in (0, 1].
        majority_sign_method: ``"total"`` or ``"frequency"``.
        dtype, uniform_rank, activate: as :func:`write` takes them.
        **parameters: of the method, as ``seed=`` of ``"dare_ties"``, or ``data=`` and ``energy=`` of
            :func:`fastlora.merge`.

    Raises:
        InputError: an adapter that is not loaded, a name that exists, weights that do not fit, an unknown type or
            parameter, factors on different devices. The model is as it was.
        UnsupportedAdapter: what :func:`pool` refuses, such as DoRA; replaced modules.

    Cost: of the sums one copy of the factors; of the others that of :func:`fastlora.merge`: nothing of the size of a
    weight is decomposed.
    """
    host = host_of(model)
    counted = _counted(adapters, weights)
    require_new(host, [adapter_name])
    wanted = Wanted(combination_type, svd_rank, density, majority_sign_method, dict(parameters))
    _check(wanted, svd_clamp)
    elements = [read_from(host, name) for name in counted]
    if all(isinstance(e, IA3) for e in elements):
        made = _scaled(elements, counted, wanted, dtype)
    else:
        loras = [require_updates(e) for e in elements]
        made = _combined(host, loras, counted, wanted, svd_clamp, dtype, uniform_rank)
    put(host, {adapter_name: made}, activate=activate)


def _counted(adapters: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    names, numbers = list(adapters), list(weights)
    if isinstance(adapters, str) or not names:
        raise InputError(f"adapters={adapters!r}: a list of names is needed, one at the least")
    if len(names) != len(numbers):
        raise InputError(f"{len(names)} adapters and {len(numbers)} weights were given; each adapter needs one weight")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"adapter {twice[0]!r} is listed twice; list it once, with the sum of its weights")
    for name, weight in zip(names, numbers, strict=True):
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise InputError(f"weight of {name!r} is {weight!r}: it must be a finite number")
    return dict(zip(names, map(float, numbers), strict=True))


def _check(wanted: Wanted, clamp: float | None) -> None:
    """Refuses what no type takes, before anything is read."""
    if wanted.kind not in PEFT_TYPES and wanted.kind not in methods():
        ours = ", ".join(n for n in methods() if n not in PEFT_TYPES)
        raise InputError(
            f"combination_type={wanted.kind!r} does not exist: use one of peft's ({', '.join(PEFT_TYPES)}) or of "
            f"fastlora's methods ({ours})"
        )
    if wanted.rank is not None and (not isinstance(wanted.rank, int) or wanted.rank < 1):
        raise InputError(f"svd_rank={wanted.rank!r}: a whole number of 1 or more is needed")
    if wanted.kind == "cat" and wanted.rank is not None:
        raise InputError("combination_type='cat' is the whole sum and takes no svd_rank; 'svd' cuts it")
    if wanted.kind in SUMS and wanted.parameters:
        raise InputError(
            f"combination_type={wanted.kind!r} takes no parameters, and got {', '.join(wanted.parameters)}"
        )
    if clamp is not None:
        check_quantile(clamp)


def _scaled(elements: Sequence[Any], weights: dict[str, float], wanted: Wanted, dtype: Any) -> Ready:
    if wanted.kind not in ("svd", *SUMS) or wanted.rank is not None or wanted.parameters:
        raise InputError(
            f"(IA)³ adapters have one weighted sum, and no combination_type={wanted.kind!r}, rank or parameters; leave "
            "them out"
        )
    return ready(IA3.weighted_sum([(weights[e.name], e) for e in elements]), dtype)


def _combined(
    host: Host,
    adapters: list[Adapter],
    weights: dict[str, float],
    wanted: Wanted,
    clamp: float | None,
    dtype: torch.dtype | str | None,
    uniform_rank: int | bool,
) -> Ready:
    refuse_experts(adapters)
    _require_one_device(adapters)
    pool = Pool(adapters, align=False)
    if wanted.kind in SUMS and wanted.rank is None and not any(a.extras for a in adapters):
        made = _sum(host, pool, weights, dtype, uniform_rank)
    else:
        made = ready(_merged(pool, weights, wanted), dtype, uniform_rank)
    if clamp is not None and isinstance(made, ReadyFactors) and wanted.kind not in SUMS:
        made = replace(made, pairs={path: clamped(*pair, clamp) for path, pair in made.pairs.items()})
    return made


def _require_one_device(adapters: Sequence[Adapter]) -> None:
    places = {a.place: a.name for a in reversed(adapters)}
    if len(places) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in places.items())
        raise InputError(
            f"the adapters are on different devices ({where}); move the model to one (`model.to(…)`), or merge "
            "`pool(model).to(device)` and `write` the result"
        )


def _sum(host: Host, pool: Pool, weights: dict[str, float], dtype: Any, uniform_rank: int | bool) -> Ready:
    factors = {name: live_factors(host, name) for name in weights}
    pairs = side_by_side(factors, weights, None if dtype is None else parse_dtype(dtype, torch.float32))
    checked = {f"{path}.lora_{side}": t for path, pair in pairs.items() for side, t in zip("BA", pair, strict=True)}
    require_finite_tensors("the sum", checked)
    embeddings = {path for layers in factors.values() for path, f in layers.items() if f.is_embedding}
    if uniform_rank:
        summed = Adapter.from_tensors(pairs, name="sum", embeddings=embeddings)
        return replace(ready(summed, dtype, uniform_rank), base=common_base(pool.adapters))
    return ReadyFactors(pairs, frozenset(embeddings), common_base(pool.adapters), {})


def _merged(pool: Pool, weights: dict[str, float], wanted: Wanted) -> Adapter:
    """By a method of the registry; ``density`` and ``majority_sign_method`` where it takes them."""
    method, fixed = _method(wanted)
    takes = methods()[method].parameters
    given = dict(wanted.parameters) | fixed
    if wanted.rank is not None:
        given["rank"] = wanted.rank
    elif method != "cat" and wanted.kind in PEFT_TYPES and "energy" not in given:
        given["rank"] = largest_rank(pool)  # peft's default
    if wanted.density is not None and "density" in takes:
        given["density"] = wanted.density
    if wanted.kind in PEFT_TYPES and "density" in takes and "density" not in given:
        raise InputError(
            f"combination_type={wanted.kind!r} needs density, the share of the elements that every adapter keeps, such "
            "as 0.2"
        )
    is_cut_elementwise = "min_energy" in takes and wanted.kind in PEFT_TYPES
    if is_cut_elementwise:
        given.setdefault("min_energy", 0.0)  # peft cuts whatever there is: here it is told, below
    merged = merge(pool, weights, method=method, **given)
    for note in merged.notes:
        warnings.warn(note, stacklevel=5)
    share = float(merged.provenance.get("retained_energy", 1.0))  # type: ignore[arg-type]
    if is_cut_elementwise and share < TOLD_BELOW:
        warnings.warn(
            f"combination_type={wanted.kind!r}: the result keeps {share:.2g} of Σσ² of the merged ΔW, whose elements "
            "make it a matrix of full rank; give a larger svd_rank",
            stacklevel=5,
        )
    return merged


def _method(wanted: Wanted) -> tuple[str, dict[str, Any]]:
    """The method of a type, and the parameters that the type stands for."""
    if wanted.kind not in PEFT_TYPES:
        return wanted.kind, {}
    kind = wanted.kind.removesuffix("_svd")
    if kind in ("ties", "dare_ties") and wanted.elect not in ("total", "frequency"):
        raise InputError(f"majority_sign_method={wanted.elect!r} does not exist: use 'total' or 'frequency'")
    types: dict[str, tuple[str, dict[str, Any]]] = {
        "svd": ("svd", {}),
        "linear": ("svd" if wanted.rank is not None else "cat", {}),
        "cat": ("cat", {}),
        "ties": ("ties", {"elect": wanted.elect}),
        "dare_ties": ("dare", {"elect": wanted.elect}),
        "dare_linear": ("dare", {"elect": "none"}),
        "magnitude_prune": ("magnitude", {}),
    }
    return types[kind]
