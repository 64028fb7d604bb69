"""Forgetting a domain: its adapter is negated as a whole, or only what it does not share, or controls of that."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from curves import Curve, Curves
from digits import Digits, State, deltas_of

import fastlora as fl

STRENGTHS = [0.5, 1.0, 1.5, 2.5, 4.0]
CONTROLS = ["random", "top"]
Unique = Callable[[str, float], fl.Adapter]  # of a domain's adapter, at a threshold


def without_directions(adapter: fl.Adapter, unique: fl.Adapter, kind: str, seed: int) -> State:
    """A control: the adapter without as many directions as its unique component lacks, random or leading ones of its
    own column space."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module, delta in deltas_of(adapter).items():
        removed = delta.double() - unique.delta(module).double() if module in unique else delta.double()
        U, sigma, _ = torch.linalg.svd(delta.double(), full_matrices=False)
        count = int((torch.linalg.svdvals(removed) > 1e-4 * sigma[0]).sum())  # below it the difference is rounding
        U = U[:, sigma > 1e-6 * sigma[0]]
        if kind == "random":
            U = U @ torch.linalg.qr(torch.randn(U.shape[1], count, generator=generator, dtype=torch.float64)).Q
        Z = U[:, :count]
        found[module] = (delta.double() - Z @ (Z.mT @ delta.double())).float()
    return found


def energy(adapter: fl.Adapter) -> float:
    """``‖ΔW‖²`` over all modules."""
    return sum(float(delta.double().square().sum()) for delta in deltas_of(adapter).values())


def curve_of(digits: Digits, deltas: State, target: str, others: Sequence[str]) -> Curve:
    states = [digits.state(deltas, -strength) for strength in [0.0, *STRENGTHS]]
    return [(digits.accuracy(state, target), digits.mean_accuracy(state, others)) for state in states]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    at = zip(*curves, strict=True)
    return [(statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points)) for points in at]


def forget(
    digits: Digits, adapters: Mapping[str, fl.Adapter], unique: Unique, threshold: float, seed: int
) -> dict[str, Curve]:
    """Accuracy on the target against the mean of the other domains, over strengths; means over the targets."""
    found: dict[str, list[Curve]] = {}
    for target, adapter in adapters.items():
        part = unique(target, threshold)
        kinds = {"whole": deltas_of(adapter), "unique": deltas_of(part)}
        kinds |= {f"without {kind} directions": without_directions(adapter, part, kind, seed) for kind in CONTROLS}
        for kind, deltas in kinds.items():
            curve = curve_of(digits, deltas, target, [n for n in adapters if n != target])
            found.setdefault(kind, []).append(curve)
    return {kind: mean_curve(curves) for kind, curves in found.items()}


def over_thresholds(
    digits: Digits, adapters: Mapping[str, fl.Adapter], unique: Unique, thresholds: Sequence[float]
) -> dict[str, Curve]:
    """The curves of unique components by threshold; means over the targets."""
    curves = {}
    for threshold in thresholds:
        of_targets = [
            curve_of(digits, deltas_of(unique(target, threshold)), target, [n for n in adapters if n != target])
            for target in adapters
        ]
        curves[f"unique, τ = {threshold}"] = mean_curve(of_targets)
    return curves


def kept(adapters: Mapping[str, fl.Adapter], unique: Unique, threshold: float) -> float:
    """The share of ``‖ΔW‖²`` that is in unique components, mean over the adapters."""
    return statistics.fmean(energy(unique(name, threshold)) / energy(a) for name, a in adapters.items())


def gather(curves: Curves, found: Mapping[str, Curve]) -> None:
    """Adds the curves of one seed."""
    for kind, curve in found.items():
        curves.setdefault(kind, []).append(curve)
