"""``fl.decompose``: checks its arguments, then runs one of three modes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import torch

from fastlora.adapters.placing import place
from fastlora.adapters.pool import Pool
from fastlora.decomposition import devec
from fastlora.decomposition.components import Components
from fastlora.decomposition.devec import ModuleResult, Settings, shared_directions
from fastlora.decomposition.input_parts import InputDecomposition, decompose_by_inputs
from fastlora.decomposition.result import Decomposition
from fastlora.engine import shares
from fastlora.engine import stream as streams
from fastlora.engine.blocks import read_chain_blocks
from fastlora.engine.checks import require_finite_extras
from fastlora.engine.schedule import GroupPart, parts, rtol_or_default
from fastlora.errors import InputError
from fastlora.merging.input_rows import Statistics
from fastlora.merging.site_factors import RIDGE
from fastlora.ops.chain import check_cuts
from fastlora.runtime import devices
from fastlora.runtime.cpython import paused_collector

DEFAULT_THRESHOLD = 0.85
"""τ of the paper."""

RHO = 0.01
"""ρ of a weighting by energy."""

MODES = ("pool", "pairs", "iterative")


@overload
def decompose(
    pool: Pool,
    threshold: float | str = DEFAULT_THRESHOLD,
    *,
    chain: str = "product",
    mode: str = "pool",
    side: str = "left",
    rank: int | None = None,
    energy: float | None = None,
    rtol: float | None = None,
    weighting: str | None = None,
    rho: float | None = None,
    target: str | None = None,
    order: Sequence[str] | None = None,
    inputs: None = None,
    mu: float | None = None,
    ridge: float | None = None,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
) -> Decomposition: ...


@overload
def decompose(
    pool: Pool,
    *,
    inputs: Statistics | str | Path,
    mu: float | None = None,
    ridge: float | None = None,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
) -> InputDecomposition: ...


@paused_collector()
def decompose(
    pool: Pool,
    threshold: float | str = DEFAULT_THRESHOLD,
    *,
    chain: str = "product",
    mode: str = "pool",
    side: str = "left",
    rank: int | None = None,
    energy: float | None = None,
    rtol: float | None = None,
    weighting: str | None = None,
    rho: float | None = None,
    target: str | None = None,
    order: Sequence[str] | None = None,
    inputs: Statistics | str | Path | None = None,
    mu: float | None = None,
    ridge: float | None = None,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
) -> Decomposition | InputDecomposition:
    r"""Shared and unique components of a pool: DeVec (arXiv 2512.22511), MATH section 3, in factor space.

    ``ΔW_i = shared_i + unique_i`` with ``shared_i = P ΔW_i``, where ``P`` projects on the eigenvectors of the chained
    column-space projections whose eigenvalue is above ``threshold``.

    Args:
        pool: two adapters or more; ranks, dtypes and modules may differ.
        threshold: ``τ`` in ``[0, 1)``; the paper uses 0.85. ``"soft"`` takes ``(λ − edge)/(1 − edge)`` of every
            direction, ``unique_i = (I − Z f Zᵀ) ΔW_i``: nothing of what chance alone gives (``edge``, module by
            module), everything of what all have. It needs ``chain="palindrome"`` or ``"mean"``.
        chain: ``"product"`` ``P_1 P_2 … P_k`` (the paper; depends on the order of the pool for ``k > 2``),
            ``"palindrome"`` (symmetric), ``"mean"`` ``(1/k) Σ P_i`` (no order).
        mode: ``"pool"``: all at once. ``"pairs"``: every pair. ``"iterative"``: take from ``target`` what it shares
            with each other adapter in turn, in ``order`` (default: pool order).
        side: ``"left"``: column spaces (the paper). ``"right"``: row spaces.
        rank, energy: cut every ``ΔW_i`` to its ``rank`` largest directions, or the fewest with this share of ``Σσ²``,
            before projecting.
        rtol: directions with ``σ <= rtol·σ_max`` are noise. Default: rounding of the stored dtype, 1e-6 at the least.
        weighting: ``"energy"``: directions count by ``σ²/(σ² + ρ σ_1²)`` in their adapter's projector, so that weak
            ones have no equal vote. *Our definition.*
        rho: ``ρ`` of the weighting, 0.01 by default: a tenth of the largest singular value counts half.
        inputs: statistics of the adapters' inputs (:func:`fastlora.statistics`), or their file: decomposes by inputs
            instead of column spaces. ``unique_t = argmin_X ‖(X − ΔW_t) C_t^½‖² + μ Σ_j ‖X C_j^½‖² + ε‖X‖²`` with
            ``C_i = X_iᵀX_i/N_i`` of the rows of adapter ``i``, which is ``s_t B_t A_t C_t (C_t + μ Σ_j C_j + εI)⁻¹``:
            the same ``B``, another ``A``; ``shared_t = ΔW_t − unique_t``.
        mu: ``μ``, 1 by default: how much it counts what the others' inputs see. 0: only what the adapter's own inputs
            do not show is left out.
        ridge: ``ε`` as a share of the mean of the diagonal of ``C_t + μ Σ_j C_j``; 1e-4 by default.
        memory: bound on the peak resident memory of computing and saving, as bytes or ``"1GiB"``; factors that were
            loaded from files are given back to the system after use. The result has the same bits. With a ``device`` it
            bounds the memory taken there: modules are streamed through it when the pool does not fit.
        device: where to compute: ``"cuda"``, ``"cuda:1"``, ``"cpu"``; by default where the pool is. See docs/gpu.md.

    Returns:
        :class:`fastlora.Decomposition`; with ``inputs``, :class:`fastlora.InputDecomposition`.

    Raises:
        InputError: a pool of one adapter, a parameter out of range, NaN or Inf in a factor (by adapter and module).

    Cost: one read of all factors and ``O(k·r³)`` small operations a module; nothing of size ``n×n`` or ``n×m``. With
    ``inputs``, of ``N`` rows of length ``m`` together, in float64 for every distinct input: ``N²·m`` operations, whose
    results stay with the statistics, ``N³/3`` (for ``μ ≠ 1`` an adapter), and ``2N²`` a row of ``A``. The report is
    made when it is asked for.
    """
    if inputs is not None:
        changed = {"threshold": threshold != DEFAULT_THRESHOLD, "chain": chain != "product", "mode": mode != "pool"}
        changed |= {"side": side != "left", "rank": rank is not None, "energy": energy is not None}
        changed |= {"rtol": rtol is not None, "target": target is not None, "order": order is not None}
        changed |= {"weighting": weighting is not None, "rho": rho is not None}
        useless = next((name for name, is_given in changed.items() if is_given), None)
        if useless is not None:
            raise InputError(f"{useless} has no effect on a decomposition by inputs; leave it out")
        return _by_inputs(pool, inputs, mu, ridge, memory, device)
    if mu is not None or ridge is not None:
        raise InputError(f"{'mu' if mu is not None else 'ridge'} belongs to a decomposition by inputs; give inputs")
    if mode not in MODES:
        raise InputError(f"mode={mode!r} does not exist: use one of {', '.join(MODES)}")
    if rank is not None and rank < 1:
        raise InputError(f"rank={rank}: must be at least 1")
    _check_weighting(threshold, chain, weighting, rho)
    cut = 0.0 if isinstance(threshold, str) else float(threshold)
    check_cuts(cut, chain, rtol or 0.0, rank or 0, 1.0 if energy is None else energy)
    if rank is not None and energy is not None:
        raise InputError("give a rank or an energy cut, not both")
    if len(pool) < 2:
        raise InputError("decompose: a pool of one adapter has nothing to share; give two adapters or more")
    require_finite_extras(pool.adapters)
    rho = RHO if weighting is not None and rho is None else rho
    chosen = threshold if isinstance(threshold, str) else cut
    settings = devec.Settings(chosen, chain, side, rank, energy, rtol, weighting, rho)
    given = devices.parse(device)
    placed = place(pool.adapters, given or pool.device, memory)
    if given is not None or placed.stream is not None:  # else it is there
        pool = pool.to(placed.device)
    if mode == "iterative":
        if target is None:
            raise InputError("mode='iterative' needs target=NAME (`--target NAME`), the adapter to clean")
        others = [n for n in pool.names if n != pool[target].name] if order is None else list(order)
        if target in others or len(set(others)) != len(others) or not others:
            raise InputError(f"order={others}: name each other adapter once, without the target {target!r}")
        with placed.in_use():
            steps = decompose_iteratively(pool, settings, target, others)
        return Decomposition(pool, mode, steps=steps, target=target, memory=placed.memory, stream=placed.stream)
    if target is not None or order is not None:
        raise InputError(f"target and order belong to mode='iterative', not to mode={mode!r}")
    with placed.in_use():
        pairs = decompose_pairs(pool, settings) if mode == "pairs" else None
        whole = decompose_pool(pool, settings) if mode == "pool" else None
    return Decomposition(pool, mode, whole=whole, pairs=pairs, memory=placed.memory, stream=placed.stream)


def _check_weighting(threshold: float | str, chain: str, weighting: str | None, rho: float | None) -> None:
    if isinstance(threshold, str):
        if threshold != devec.SOFT:
            raise InputError(f"threshold={threshold!r}: give a number of at least 0 and below 1, or 'soft'")
        if chain == "product":
            raise InputError(
                "threshold='soft' needs a symmetric chain, whose directions are orthogonal: chain='palindrome' (of two "
                "adapters, the directions and eigenvalues of the product) or 'mean'"
            )
    if weighting not in (None, "energy"):
        raise InputError(f"weighting={weighting!r} does not exist: use 'energy', or leave it out")
    if rho is not None and weighting is None:
        raise InputError("rho belongs to weighting='energy'; leave it out, or weigh")
    if rho is not None and not 0.0 < rho < math.inf:
        raise InputError(f"rho={rho}: must be a finite number above 0")


def _by_inputs(
    pool: Pool,
    inputs: Statistics | str | Path,
    mu: float | None,
    ridge: float | None,
    memory: int | str | None,
    device: str | torch.device | None,
) -> InputDecomposition:
    if len(pool) < 2:
        raise InputError("decompose: a pool of one adapter has nothing to share; give two adapters or more")
    if any(d is not None and d.type != "cpu" for d in (devices.parse(device), pool.device)):
        raise InputError("decompositions by inputs are computed on the CPU; leave out device, or move the pool there")
    require_finite_extras(pool.adapters)
    statistics = inputs if isinstance(inputs, Statistics) else Statistics.load(inputs)
    placed = place(pool.adapters, pool.device, memory)
    with placed.in_use():
        return decompose_by_inputs(
            pool, statistics, 1.0 if mu is None else mu, RIDGE if ridge is None else ridge, placed.memory
        )


def decompose_pool(pool: Pool, settings: Settings) -> Components:
    """One decomposition of all adapters, from one read of the factors; blocks that the Gram cache in use has are not
    read."""

    def work() -> dict[str, ModuleResult]:
        results: dict[str, ModuleResult] = {}
        for part in _parts(pool, settings, "decomposing"):
            blocks, chain = settings.read(part)
            for result in shared_directions(blocks, settings, chain):
                results[result.module] = result
        return results

    results = shares.each("decompose", work, pool.adapters)
    return Components(pool, {m: results[m] for m in pool.modules if m in results}, settings, "pool")


def decompose_pairs(pool: Pool, settings: Settings) -> dict[tuple[str, str], Components]:
    """A decomposition of every pair, from one read of the factors; blocks that the Gram cache in use has are not
    read."""

    def work() -> dict[tuple[str, ...], ModuleResult]:
        found: dict[tuple[str, ...], ModuleResult] = {}
        for part in _parts(pool, settings, "decomposing pairs"):
            for blocks in read_chain_blocks(part, settings.side, "pairs").pairs():
                for result in shared_directions(blocks, settings):
                    found[*result.names, result.module] = result
        return found

    results: dict[tuple[str, str], dict[str, ModuleResult]] = {
        (a, b): {} for i, a in enumerate(pool.names) for b in pool.names[i + 1 :]
    }
    for (a, b, module), result in shares.each("decompose pairs", work, pool.adapters).items():
        results[a, b][module] = result
    return {
        pair: Components(
            pool.subset(list(pair)), {m: of_pair[m] for m in pool.modules if m in of_pair}, settings, "pairs"
        )
        for pair, of_pair in results.items()
    }


def _parts(pool: Pool, settings: Settings, label: str) -> Iterator[GroupPart]:
    """The modules that two adapters or more have, this rank's, on the device of the stream in use."""
    stream = streams.current()
    return parts(pool, label, rtol_of=rtol_or_default(settings.rtol), least=2, stream=stream, shared=True)


def decompose_iteratively(pool: Pool, settings: Settings, target: str, order: Sequence[str]) -> list[Components]:
    """The target against each other adapter in turn, every time keeping the unique part: one step a list entry.

    The unique part of a first adapter stays in its own column space, ``B_t → B_t (I − basis H)``, so the loop runs on
    small matrices; the pool of step ``i`` holds the target as step ``i − 1`` left it.
    """
    steps: list[Components] = []
    current = pool[target]
    for other in order:
        pair = Pool([current, pool[other]], align=False)
        step = decompose_pool(pair, settings)
        steps.append(Components(pair, step.results, settings, "iterative"))
        current = replace(steps[-1].unique_of(target), name=target)
    return steps
