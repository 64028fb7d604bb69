"""Style mixing: LoRA adapters of drawing styles are added up, as wholes or only what they do not share.

    pip install diffusers peft matplotlib
    python examples/style_mixing.py [--out DIR] [--seeds 3] [--jobs 1] [--quick]

A tiny Flux transformer learns to draw, and four adapters a style each: three alike, one apart (styles.py). Mixes of
two alike, of one and the one apart, and of all four, at several coefficients, are painted from the same noise as every
style's own pictures. Controls lack as many directions as unique parts do, random or leading ones, or are as short.
Results: docs/experiments.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import combinations
from operator import add
from pathlib import Path

import torch
from common import Results, arguments, console, of_seeds
from negation import energy, without_directions
from styles import ALIKE, APART, CONTENTS, NEEDED, SIDE, STYLES, Painter, State, deltas_of, distance_from_drawings
from torch import Tensor

import fastlora as fl

COEFFICIENTS = [0.5, 1.0, 1.5, 2.0]
THRESHOLD, THRESHOLDS = 0.3, [0.1, 0.2, 0.5]  # left spectra of LoRA adapters stay far below the paper's 0.85
NOISES = 2  # pictures of every content
Names = tuple[str, ...]
GROUPS: dict[str, list[Names]] = {
    "two alike": list(combinations(ALIKE, 2)),
    "two apart": [(name, APART) for name in ALIKE],
    "all four": [tuple(STYLES)],
}
SHOWN: list[Names] = [("etching", "sepia"), ("etching", APART), tuple(STYLES)]
SHOWN_COEFFICIENTS = [1.0, 2.0]
Pictures = dict[str, Tensor]


def uniques(pool: fl.Pool, names: Names, threshold: float) -> dict[str, list[fl.Adapter]]:
    """By what the adapters are decomposed with, their unique parts: as a pool, and, of more than two, each against
    the others one after the other."""
    whole = fl.decompose(pool.subset(names), threshold)
    found = {"unique": [whole.unique_of(name) for name in names]}
    if len(names) > 2:
        ones = [fl.decompose(pool.subset(names), threshold, mode="iterative", target=name) for name in names]
        found["unique, one by one"] = [one.unique_of(name) for one, name in zip(ones, names, strict=True)]
    return found


def total(parts: Sequence[fl.Adapter]) -> fl.Adapter:
    return reduce(add, parts)


def summed(deltas: Sequence[State]) -> State:
    return {module: torch.stack([d[module] for d in deltas]).sum(0) for module in deltas[0]}


def mixes(pool: fl.Pool, names: Names, threshold: float, seed: int) -> dict[str, State]:
    """By kind of mix, what it adds to the base model's weights at the coefficient 1."""
    wholes = [pool[name] for name in names]
    found = {"whole": deltas_of(total(wholes))}
    for kind, parts in uniques(pool, names, threshold).items():
        mix = total(parts)
        found[kind] = deltas_of(mix)
        shorter = (energy(mix) / energy(total(wholes))) ** 0.5
        how = kind.removeprefix("unique")
        found[f"whole, as long as unique{how}"] = {m: shorter * delta for m, delta in found["whole"].items()}
        for control, title in {"random": "random", "top": "leading"}.items():
            lacking = [without_directions(a, part, control, seed) for a, part in zip(wholes, parts, strict=True)]
            found[f"without {title} directions{how}"] = summed(lacking)
    shared = fl.decompose(pool.subset(names), threshold).shared
    return found | {"unique + shared once": deltas_of(total(uniques(pool, names, threshold)["unique"]) + shared)}


@dataclass
class Measure:
    """What the mixes' pictures are held against: contents, noise, and the styles' own pictures."""

    painter: Painter
    content: Tensor
    noise: Tensor
    own: Pictures = field(default_factory=dict)

    def paint(self, deltas: State, strength: float = 1.0) -> Tensor:
        return self.painter.paint(self.painter.state(deltas, strength), self.content, self.noise)

    def quality(self, pictures: Tensor) -> dict[str, float]:
        """How many show the content that was asked for, and how far they are from a clean drawing of it."""
        distances = distance_from_drawings(pictures)
        of_asked = distances.gather(0, self.content[None])
        recognised = float((distances.argmin(0) == self.content).double().mean())
        return {"content recognised": recognised, "from a clean drawing": float(of_asked.mean())}

    def from_style(self, pictures: Tensor, name: str) -> float:
        """Root mean square distance to the pictures of the style's own adapter, of the same contents and noise."""
        return float((pictures - self.own[name]).double().square().mean((1, 2, 3)).sqrt().mean())

    def of_mix(self, pictures: Tensor, names: Names) -> dict[str, float]:
        alike = [self.from_style(pictures, name) for name in names if name != APART]
        apart = {f"from {APART}": self.from_style(pictures, APART)} if APART in names else {}
        return self.quality(pictures) | {"from the styles alike": statistics.fmean(alike)} | apart


@dataclass
class Seed:
    """What one seed found: numbers, and pictures of the styles and of the mixes that are shown."""

    results: Results
    own: Pictures
    shown: dict[Names, Pictures] = field(default_factory=dict)
    seconds: float = 0.0


def one_seed(seed: int, quick: bool, out: Path) -> Seed:
    torch.set_num_threads(1)  # matrices are small: more threads would only wait for each other
    start = time.process_time()
    console.print(f"seed {seed}: training the base model and {len(STYLES)} adapters")
    painter = Painter(seed, shorter=60 if quick else 1)
    pool = fl.Pool(painter.adapters.values())
    measured, results = own_pictures(painter, seed, 1 if quick else NOISES)
    found = Seed(results, measured.own)
    console.print(f"seed {seed}: mixing")
    for group, of_names in GROUPS.items():
        of_names = [n for n in of_names if n in SHOWN or not quick]
        sharing(pool, group, of_names, results)
        mix(measured, pool, group, of_names, found, seed, COEFFICIENTS[1::2] if quick else COEFFICIENTS)
        over_thresholds(measured, pool, group, of_names, results, seed, quick)
    if seed == 0:
        mixed = total(uniques(pool, SHOWN[0], THRESHOLD)["unique"])
        mixed.save(out / "mix.safetensors", format="diffusers", overwrite=True)
    found.seconds = time.process_time() - start
    return found


def own_pictures(painter: Painter, seed: int, noises: int) -> tuple[Measure, Results]:
    """The base model's and the styles' own pictures, measured."""
    generator = torch.Generator().manual_seed(1000 + seed)
    content = torch.arange(CONTENTS).repeat(noises)
    found = Measure(painter, content, torch.randn(len(content), 3, SIDE, SIDE, generator=generator))
    results, title = Results(), "Pictures of one style"
    results.add(title, "base model", found.quality(found.paint({})))
    for name, adapter in painter.adapters.items():
        found.own[name] = found.paint(deltas_of(adapter))
        results.add(title, name, found.quality(found.own[name]))
    return found, results


def sharing(pool: fl.Pool, group: str, of_names: Sequence[Names], results: Results) -> None:
    """How many directions are shared, beside chance; and what unique parts keep of ``‖ΔW‖²``."""
    for threshold in sorted([THRESHOLD, *THRESHOLDS]):
        rows = []
        for names in of_names:
            report = fl.decompose(pool.subset(names), threshold).report
            row = {"shared": float(report.shared_directions), "by chance": report.expected_by_chance}
            for kind, parts in uniques(pool, names, threshold).items():
                kept = [energy(part) / energy(pool[name]) for part, name in zip(parts, names, strict=True)]
                row[f"{kind}: ‖ΔW‖² kept"] = statistics.fmean(kept)
            rows.append(row)
        results.add("Shared directions", f"{group}, τ = {threshold}", means(rows))


def mix(
    measured: Measure,
    pool: fl.Pool,
    group: str,
    of_names: Sequence[Names],
    found: Seed,
    seed: int,
    coefficients: Sequence[float],
) -> None:
    """Every kind of mix at every coefficient; means over the mixes of the group."""
    table = f"Mixes of {group}, τ = {THRESHOLD}"
    by_names = {names: mixes(pool, names, THRESHOLD, seed) for names in of_names}
    wholes: dict[float, dict[str, float]] = {}
    for kind in by_names[of_names[0]]:
        for c in coefficients:
            rows = []
            for names, of_mix in by_names.items():
                pictures = measured.paint(of_mix[kind], c)
                rows.append(measured.of_mix(pictures, names))
                if names in SHOWN and c in SHOWN_COEFFICIENTS:
                    found.shown.setdefault(names, {})[f"{kind}, c = {c:g}"] = pictures
            row = means(rows)
            results, title = found.results, f"{kind}, c = {c:g}"
            results.add(table, title, row)
            against = wholes.setdefault(c, row)
            if kind != "whole":
                results.add(f"{table}: minus the whole", title, {k: v - against[k] for k, v in row.items()})


def over_thresholds(
    measured: Measure, pool: fl.Pool, group: str, of_names: Sequence[Names], results: Results, seed: int, quick: bool
) -> None:
    """Every kind of mix at other thresholds, at the coefficient 1."""
    for threshold in THRESHOLDS[:1] if quick else THRESHOLDS:
        by_names = {names: mixes(pool, names, threshold, seed) for names in of_names}
        for kind in by_names[of_names[0]]:
            if kind != "whole":
                rows = [measured.of_mix(measured.paint(of_mix[kind]), names) for names, of_mix in by_names.items()]
                results.add(f"Mixes of {group} over thresholds, c = 1", f"{kind}, τ = {threshold}", means(rows))


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {column: statistics.fmean(row[column] for row in rows) for column in rows[0]}


def plot_pictures(found: Seed, out: Path) -> None:
    """The styles' own pictures, and below them every kind of mix side by side: a row a content."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"styles alone": found.own} | {" + ".join(names): shown for names, shown in found.shown.items()}
    rows = [1, 6, 8, 15]  # a disc, a square, a triangle, a cross
    width = max(len(columns) for columns in panels.values())
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(0.42 * width, 3.3 * len(panels)), layout="constrained")
    for axis, (title, columns) in zip(axes, panels.items(), strict=True):
        framed = [torch.nn.functional.pad(x[rows].clamp(0, 1), (1, 1, 1, 1), value=1.0) for x in columns.values()]
        tiles = torch.stack(framed)  # [columns, rows, 3, height, width]
        axis.imshow(tiles.permute(1, 3, 0, 4, 2).flatten(2, 3).flatten(0, 1).numpy())
        centres = [(i + 0.5) * tiles.shape[4] for i in range(len(columns))]
        axis.set_xticks(centres, list(columns), rotation=90, fontsize=6)
        axis.set_yticks([])
        axis.set_title(title, fontsize=8)
    figure.savefig(out, dpi=150)


def main() -> None:
    options = arguments(__doc__, "style_mixing", NEEDED)
    results, seconds = Results(), []
    first = None
    for found in of_seeds(partial(one_seed, quick=options.quick, out=options.out), options):
        first = first or found
        results.extend(found.results)
        seconds.append(found.seconds)
        results.save(options.out)  # of the seeds so far
    results.show()
    facts = f"Processor time of the seeds, one thread each: {', '.join(f'{s:.0f} s' for s in seconds)}."
    console.print(facts)
    results.save(options.out, facts)
    assert first is not None
    plot_pictures(first, options.out / "mixes.png")
    console.print(f"written: {options.out}/results.json, results.md, mixes.png, mix.safetensors (for diffusers)")


if __name__ == "__main__":
    main()
