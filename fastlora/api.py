"""The public functions. Each checks its arguments, then hands over to one method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fastlora import device as devices
from fastlora import formats
from fastlora import stream as streams
from fastlora.adapter import Adapter
from fastlora.decomposition import Decomposition
from fastlora.engine import require_finite
from fastlora.errors import InputError, NonFiniteError
from fastlora.finetune import TaskVector
from fastlora.ia3 import IA3
from fastlora.interpreter import paused_collector
from fastlora.memory import bounded
from fastlora.memory import parse as parse_memory
from fastlora.methods import Method, all_methods, devec, find_method, svd
from fastlora.methods.overlap import Overlap, pool_overlap
from fastlora.ops.chain import check_cuts
from fastlora.pool import Pool, require_updates

MODES = ("pool", "pairs", "iterative")


def load(path: str | Path, name: str | None = None) -> Adapter | IA3 | TaskVector:
    """Loads one adapter, LoRA or (IA)³, or a saved task vector; the format is detected. Tensors stay in the file,
    memory-mapped.

    Raises:
        InputError: a path, file, field or tensor that cannot be used. UnsupportedAdapter: a kind whose numbers would
            come out wrong (DoRA, …). Both say what was found and what to do.
    """
    with paused_collector():
        return formats.load(Path(path), name)


def decompose(
    pool: Pool,
    threshold: float = 0.85,
    *,
    chain: str = "product",
    mode: str = "pool",
    side: str = "left",
    rank: int | None = None,
    energy: float | None = None,
    rtol: float | None = None,
    target: str | None = None,
    order: Sequence[str] | None = None,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
) -> Decomposition:
    r"""Shared and unique components of a pool: DeVec (arXiv 2512.22511), MATH section 3, in factor space.

    ``ΔW_i = shared_i + unique_i`` with ``shared_i = P ΔW_i``, where ``P`` projects on the eigenvectors of the chained
    column-space projections whose eigenvalue is above ``threshold``.

    Args:
        pool: two adapters or more; ranks, dtypes and modules may differ.
        threshold: ``τ`` in ``[0, 1)``; the paper uses 0.85.
        chain: ``"product"`` ``P_1 P_2 … P_k`` (the paper; depends on the order of the pool for ``k > 2``),
            ``"palindrome"`` (symmetric), ``"mean"`` ``(1/k) Σ P_i`` (no order).
        mode: ``"pool"``: all at once. ``"pairs"``: every pair. ``"iterative"``: take from ``target`` what it shares
            with each other adapter in turn, in ``order`` (default: pool order).
        side: ``"left"``: column spaces (the paper). ``"right"``: row spaces.
        rank, energy: cut every ``ΔW_i`` to its ``rank`` largest directions, or the fewest with this share of ``Σσ²``,
            before projecting.
        rtol: directions with ``σ <= rtol·σ_max`` are noise. Default: rounding of the stored dtype, 1e-6 at the least.
        memory: bound on the peak resident memory of computing and saving, as bytes or ``"1GiB"``; factors that were
            loaded from files are given back to the system after use. The result has the same bits. With a ``device`` it
            bounds the memory taken there: modules are streamed through it when the pool does not fit.
        device: where to compute: ``"cuda"``, ``"cuda:1"``, ``"cpu"``; by default where the pool is. See docs/gpu.md.

    Returns:
        :class:`fastlora.Decomposition`.

    Raises:
        InputError: a pool of one adapter, a parameter out of range, NaN or Inf in a factor (by adapter and module).

    Cost: one read of all factors and ``O(k·r³)`` small operations a module; nothing of size ``n×n`` or ``n×m``.
    """
    if mode not in MODES:
        raise InputError(f"mode={mode!r} does not exist: use one of {', '.join(MODES)}")
    if rank is not None and rank < 1:
        raise InputError(f"rank={rank}: must be at least 1")
    check_cuts(threshold, chain, rtol or 0.0, rank or 0, 1.0 if energy is None else energy)
    if rank is not None and energy is not None:
        raise InputError("give a rank or an energy cut, not both")
    if len(pool) < 2:
        raise InputError("decompose: a pool of one adapter has nothing to share; give two adapters or more")
    settings = devec.Settings(float(threshold), chain, side, rank, energy, rtol)
    bound = parse_memory(memory)
    where = devices.parse(device) or pool.device
    stream = streams.needed(pool.adapters, where, bound)
    pool = pool.to(where if stream is None else "cpu")
    if where.type != "cpu":
        bound = None  # it is the device's memory that is bounded
    if mode == "iterative":
        if target is None:
            raise InputError("mode='iterative' needs target=NAME (`--target NAME`), the adapter to clean")
        others = [n for n in pool.names if n != pool[target].name] if order is None else list(order)
        if target in others or len(set(others)) != len(others) or not others:
            raise InputError(f"order={others}: name each other adapter once, without the target {target!r}")
        with bounded(bound), streams.streamed(stream), paused_collector():
            steps = devec.decompose_iteratively(pool, settings, target, others)
        return Decomposition(pool, mode, steps=steps, target=target, memory=bound, stream=stream)
    if target is not None or order is not None:
        raise InputError(f"target and order belong to mode='iterative', not to mode={mode!r}")
    with bounded(bound), streams.streamed(stream), paused_collector():
        if mode == "pairs":
            return Decomposition(pool, mode, pairs=devec.decompose_pairs(pool, settings), memory=bound, stream=stream)
        return Decomposition(pool, mode, whole=devec.decompose_pool(pool, settings), memory=bound, stream=stream)


def merge(
    pool: Pool,
    weights: Mapping[str, float] | None = None,
    *,
    method: str = "svd",
    rank: int | None = None,
    energy: float | None = None,
    device: str | torch.device | None = None,
) -> Adapter:
    """One adapter from many: ``Σ_i w_i ΔW_i`` and the like; :func:`methods` lists what ``method`` accepts.

    ``weights=None`` counts every adapter with 1.0. Otherwise an adapter that is not named counts 0, which the result's
    ``notes`` say; an unknown name is an error.
    """
    chosen = find_method(method)
    counted, notes = full_weights(pool, weights)
    pool = on_device(pool, device)
    try:
        with paused_collector():
            merged = chosen(pool, counted, rank=rank, energy=energy)
    except NonFiniteError:
        require_finite(pool.adapters)  # names the adapter of the pool; the method only knows their sum
        raise InputError(f"the weighted sum overflows: lower the weights {counted}") from None
    merged.notes += notes
    return merged


def full_weights(pool: Pool, weights: Mapping[str, float] | None) -> tuple[dict[str, float], list[str]]:
    """A finite weight for every adapter of the pool, and notices of what was left to 0."""
    if weights is None:
        return dict.fromkeys(pool.names, 1.0), []
    unknown = [n for n in weights if n not in pool.names]
    if unknown:
        raise InputError(
            f"weights name {', '.join(map(repr, unknown))}, which the pool does not have: {', '.join(pool.names)}"
        )
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or weight != weight or weight in (float("inf"), float("-inf")):
            raise InputError(f"weight of {name!r} is {weight!r}: it must be a finite number")
    missing = [n for n in pool.names if n not in weights]
    notes = [f"{name} has no weight and counts 0" for name in missing]
    return {n: float(weights.get(n, 0.0)) for n in pool.names}, notes


def compress(adapter: Adapter, rank: int | None = None, *, energy: float | None = None) -> Adapter:
    """The best approximation of every ``ΔW``, of at most ``rank`` or with at least the share ``energy`` of ``Σσ²``.

    Exact in factor space, MATH section 6; the retained energy of each module is in ``.details["retained_energy"]`` of
    the result, the total in ``.provenance``. Costs one read of the factors and ``O(r³)`` operations a module.
    """
    return svd.compress(require_updates(adapter, "compress"), rank=rank, energy=energy)


def overlap(pool: Pool, *, device: str | torch.device | None = None) -> Overlap:
    """Similarity of every pair: cosine of ``ΔW`` (13) and subspace overlap (14), per module and in total."""
    return pool_overlap(on_device(pool, device))


def on_device(pool: Pool, device: str | torch.device | None) -> Pool:
    """The pool where it is computed on: on ``device``, or where all of it is."""
    return pool.to(devices.parse(device) or pool.device)


def methods() -> dict[str, Method]:
    """What ``method=`` accepts: name, summary, parameters and source of each."""
    return all_methods()
