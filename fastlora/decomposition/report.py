"""What a decomposition found, beside what chance alone would give, with the warnings a user should read first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastlora.analysis.chance import chance_edge, expected_by_chance, pair_edge
from fastlora.decomposition.components import Components
from fastlora.decomposition.devec import ModuleResult, Settings

EIGENVALUES_LISTED = 8
COMMON_INITIALISATION = 0.9  # right-side eigenvalues above this mean one initialisation of A
LOST_TOO_MUCH = 0.7  # a unique part below this share of the norm
CHANCE_SHARE = 0.1  # of the shared directions
UNDECIDABLE = 1e-6  # distance of an eigenvalue to τ
WEAK = 0.3  # cos² of directions that are still worth a look


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One module. ``eigenvalues``: a threshold just below the j-th would share j directions. Energies are shares of
    ``‖ΔW_i‖_F²``; ``norm_kept`` is ``‖unique_i‖ / ‖ΔW_i‖``; ``gap`` the distance of τ to the nearest eigenvalue;
    ``taken`` how much of every shared direction the shared part has: 1, but for a soft threshold."""

    module: str
    shape: tuple[int, int]
    adapters: tuple[str, ...]
    ranks: tuple[int, ...]
    directions: tuple[int, ...]
    shared: int
    eigenvalues: tuple[float, ...]
    chance_edge: float
    expected_by_chance: float
    gap: float
    energy_shared: dict[str, float]
    energy_in_cut: dict[str, float]
    norm_kept: dict[str, float]
    taken: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Rows per module and the totals that the command line prints."""

    title: str
    settings: dict[str, Any]
    rows: list[ModuleRow]
    warnings: list[str]
    notices: list[str] = field(default_factory=list)

    @property
    def shared_directions(self) -> int:
        """Shared directions of all modules."""
        return sum(r.shared for r in self.rows)

    @property
    def expected_by_chance(self) -> float:
        """Shared directions that random subspaces of the same sizes would have, of all modules."""
        return sum(r.expected_by_chance for r in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "title": self.title,
            "settings": self.settings,
            "warnings": self.warnings,
            "notices": self.notices,
            "totals": {"shared_directions": self.shared_directions, "expected_by_chance": self.expected_by_chance},
            "rows": [{name: getattr(row, name) for name in ModuleRow.__slots__} for row in self.rows],
        }


def build_report(components: Components, title: str, notices: Sequence[str] = ()) -> Report:
    """The report of one chain over one pool."""
    rows = [module_row(components, r) for r in components.results.values()]
    chosen = {name: getattr(components.settings, name) for name in Settings.__slots__}
    settings = {**chosen, "adapters": components.pool.names, "mode": components.label}
    warnings = [w for w in _warnings(components, rows) if w]
    return Report(title, settings, rows, warnings, [*notices, *_notices(components, rows)])


def module_row(components: Components, result: ModuleResult) -> ModuleRow:
    """The row of one module: its chain's spectrum beside chance, and what of each adapter is shared."""
    settings = components.settings
    n = result.shape[0] if settings.side == "left" else result.shape[1]
    real = sorted(result.real_values, reverse=True)
    listed = tuple(real[: max(EIGENVALUES_LISTED, result.count)])
    dimensions = result.kept
    edge = chance_edge(n, dimensions, settings.chain)
    threshold = edge if isinstance(settings.threshold, str) else settings.threshold
    gap = 1.0 if settings.is_soft else min([abs(v - threshold) for v in real], default=1.0)
    is_cut = any([kept < rank for kept, rank in zip(dimensions, result.ranks, strict=True)])
    energy = list(map(energy_kept, result.sigma, dimensions)) if is_cut else [1.0] * len(dimensions)
    energy_shared = list(map(_share, result.shared_norms, result.norms))
    if result.unique_norms is None:  # the two parts are orthogonal
        norm_kept = [math.sqrt(max(0.0, 1.0 - share)) for share in energy_shared]
    else:
        norm_kept = [u / t if t > 0 else 1.0 for u, t in zip(result.unique_norms, result.norms, strict=True)]
    return ModuleRow(
        module=result.module,
        shape=result.shape,
        adapters=result.names,
        ranks=result.ranks,
        directions=result.kept,
        shared=result.count,
        eigenvalues=listed,
        chance_edge=edge,
        expected_by_chance=expected_by_chance(n, dimensions, settings.chain, threshold),
        gap=gap,
        energy_shared=dict(zip(result.names, energy_shared, strict=True)),
        energy_in_cut=dict(zip(result.names, energy, strict=True)),
        norm_kept=dict(zip(result.names, norm_kept, strict=True)),
        taken=result.taken if result.taken is not None else (1.0,) * result.count,
    )


def _share(part: float, whole: float) -> float:
    return (part / whole) ** 2 if whole > 0 else 0.0


def energy_kept(sigma: Sequence[float], kept: int) -> float:
    """The share of ``Σσ²`` that the first ``kept`` of ``sigma`` have; 1 where all are zero."""
    if kept >= len(sigma):
        return 1.0
    squares = [x * x for x in sigma]
    total = sum(squares)
    return sum(squares[:kept]) / total if total > 0 else 1.0


def _warnings(components: Components, rows: list[ModuleRow]) -> list[str]:
    if not rows:
        return ["No module is present in two adapters, so nothing can be shared: every unique part is the original."]
    return [
        _full_rank(components, rows),
        _mean_threshold(components, rows),
        _common_initialisation(components, rows),
        "" if components.settings.is_soft else _chance(rows),
        _empty(components, rows),
        _undecidable(components, rows),
        _lost(rows, components.settings.is_soft),
    ]


def _full_rank(components: Components, rows: list[ModuleRow]) -> str:
    axis = 0 if components.settings.side == "left" else 1
    full = [r for r in rows if r.directions and max(r.directions) >= r.shape[axis]]
    if not full:
        return ""
    return (
        f"{len(full)} modules (first: {full[0].module}) have full rank: their subspace is the whole space, so "
        "everything counts as shared. Give a rank or an energy cut (rank=N, `--rank N`; energy=0.9, `--energy 0.9`)."
    )


def _mean_threshold(components: Components, rows: list[ModuleRow]) -> str:
    if components.settings.chain != "mean" or isinstance(components.settings.threshold, str):
        return ""
    k = max(len(r.adapters) for r in rows)
    if components.settings.threshold > (k - 1) / k:
        return ""
    least = max((k - 1) / k, *(r.chance_edge for r in rows))
    text = (
        f"chain='mean' with {k} adapters: a direction that one of them lacks altogether still has eigenvalue up to "
        f"{(k - 1) / k:.3f}, above τ = {components.settings.threshold:g}."
    )
    return text if least >= 1 else f"{text} Use a threshold above {_up(least, 3)}."


def _up(value: float, digits: int) -> str:
    """A threshold as text, rounded up: what it must be above stays below it."""
    return f"{math.ceil(round(value * 10**digits, 6)) / 10**digits:.{digits}f}"


def _common_initialisation(components: Components, rows: list[ModuleRow]) -> str:
    if components.settings.side != "right":
        return ""
    high = [r for r in rows if r.eigenvalues and r.eigenvalues[0] > COMMON_INITIALISATION]
    if len(high) * 2 < len(rows):
        return ""
    return (
        f"Right-side eigenvalues are above {COMMON_INITIALISATION:g} in {len(high)} of {len(rows)} modules: these "
        "adapters started from the same random A (one seed), which training barely moves. That is a common "
        "initialisation, not shared knowledge."
    )


def _chance(rows: list[ModuleRow]) -> str:
    shared, expected = sum(r.shared for r in rows), sum(r.expected_by_chance for r in rows)
    if not shared or expected <= CHANCE_SHARE * shared:
        return ""
    return (
        f"Random subspaces of these ranks would share about {expected:.1f} directions where {shared} were found: "
        f"more than {CHANCE_SHARE:.0%} of the result is chance. Cut the ranks or raise the threshold."
    )


def _empty(components: Components, rows: list[ModuleRow]) -> str:
    if any(r.shared for r in rows):
        return ""
    zero = sum(1 for r in rows if 0 in r.directions)
    top = sorted((v for r in rows for v in r.eigenvalues), reverse=True)
    if not top or top[0] <= 0:
        return f"Nothing is shared at any threshold ({zero} of {len(rows)} modules hold a zero update)."
    edge = max(r.chance_edge for r in rows)
    if isinstance(components.settings.threshold, str):
        return (
            f"Nothing is shared above chance: the largest eigenvalues are {', '.join(f'{v:.3f}' for v in top[:4])} "
            f"(by chance alone up to {edge:.3f}). That is normal for LoRAs that were trained independently."
        )
    text = (
        f"Nothing is shared at τ = {components.settings.threshold:g}: the largest eigenvalues are "
        f"{', '.join(f'{v:.3f}' for v in top[:4])} (by chance alone up to {edge:.3f}). "
    )
    if top[0] > edge:
        text += "A threshold between chance and the largest would share 1, 2, … directions. "
    text += "An empty shared part is normal for LoRAs that were trained independently. "
    if len(components.pool.names) > 2 and components.settings.chain != "mean":
        text += "A chain over three or more adapters hides what pairs share: try mode='pairs' or 'iterative'. "
    return (text + _weaker_threshold(components, rows, edge)).rstrip()


def _weaker_threshold(components: Components, rows: list[ModuleRow], edge: float) -> str:
    """The lowest threshold that has a meaning, where it is below ``τ``: above chance, and beside ``mean`` above what a
    direction keeps that one adapter lacks."""
    if components.settings.chain != "mean":
        value, meaning = max(WEAK, 2 * edge), f" = max({WEAK:g}, twice the chance edge) = {_up(max(WEAK, 2 * edge), 2)}"
    else:
        axis = 0 if components.settings.side == "left" else 1
        k = max(len(r.adapters) for r in rows)
        square = min(1.0, max(WEAK, *(2 * pair_edge(r.shape[axis], r.directions) for r in rows)))
        # Of a direction that k − 1 adapters have, and the last one nearly: the larger root of a 2×2 matrix.
        value = (k + math.sqrt(k**2 - 4 * (k - 1) * (1 - square))) / (2 * k)
        shares = f"cos² in one adapter is {square:.2g} and 1 in the others"
        meaning = f" = {_up(value, 2)}, which a direction has whose {shares}"
    threshold = components.settings.threshold
    if isinstance(threshold, str) or not edge < value < threshold:
        return ""
    return f"To look for weaker common directions, opt in to τ{meaning}."


def _undecidable(components: Components, rows: list[ModuleRow]) -> str:
    close = [r for r in rows if r.gap < UNDECIDABLE]
    if not close:
        return ""
    return (
        f"{len(close)} modules (first: {close[0].module}) have an eigenvalue within {UNDECIDABLE:g} of τ: whether that "
        "direction counts as shared is decided by rounding. Move the threshold a little."
    )


def _lost(rows: list[ModuleRow], is_soft: bool) -> str:
    counts = Counter(name for r in rows for name, kept in r.norm_kept.items() if kept < LOST_TOO_MUCH)
    if not counts:
        return ""
    most, modules = counts.most_common(1)[0]
    return (
        f"The unique part of {most!r} keeps less than {LOST_TOO_MUCH:g} of the norm in {modules} of {len(rows)} "
        f"modules: it has probably lost more than the interference.{'' if is_soft else ' Raise the threshold.'}"
    )


def _notices(components: Components, rows: list[ModuleRow]) -> list[str]:
    pool = components.pool
    notices = [note for adapter in pool.adapters for note in adapter.notes]
    if components.settings.is_soft:
        notices.append(
            "Soft threshold: (λ − edge)/(1 − edge) of every direction is shared, with the largest eigenvalue that "
            "chance gives as edge; `taken` in report.json has the shares."
        )
    if components.settings.weighting:
        notices.append(
            f"Directions count by σ²/(σ² + ρσ₁²), ρ = {components.settings.rho:g}. Chance levels are those without "
            "weights, which are larger."
        )
    alone = [m for m in pool.modules if m not in components.results]
    if alone:
        notices.append(
            f"{len(alone)} modules are in one adapter only (first: {alone[0]}): they stay with its unique part."
        )
    gaps = [r for r in rows if len(r.adapters) < len(pool.names)]
    if gaps:
        notices.append(
            f"{len(gaps)} modules are missing in some adapters (first: {gaps[0].module}): decomposed among the rest."
        )
    zero = [r for r in rows if 0 in r.directions]
    if zero:
        notices.append(
            f"{len(zero)} modules hold a zero update (first: {zero[0].module}): a product or palindrome chain "
            "shares nothing there."
        )
    dropped = sum(1 for r in components.results.values() for i, k in enumerate(r.kept) if k < r.ranks[i])
    if dropped:
        notices.append(
            f"{dropped} factors have directions below the noise floor or cut by rank or energy; they took no part "
            "in the chain and stay with the unique part."
        )
    for name in pool.names:
        if pool[name].extras:
            notices.append(
                f"{name}: {len(pool[name].extras)} parameters that are no low-rank updates (first: "
                f"{next(iter(pool[name].extras))}) stay with its unique part."
            )
    return notices
