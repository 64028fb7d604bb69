"""The toy experiment for shared subspaces: how well is a planted one recovered from noisy copies?

    python examples/toy.py --out DIR

Two matrices with 1000 rows have 100 columns in common, up to noise of strength σ, and 100 of their own. Writes
``toy.png``: the eigenvalues of the projection chain for every σ, with the threshold τ, and the mean principal angle
between the true and the recovered space.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastlora as fl

ROWS, SHARED, OWN = 1000, 100, 100
THRESHOLD = 0.85
NOISE = (0.1, 0.2, 0.3, 0.39)
REPETITIONS = 5


@dataclass(frozen=True)
class Trial:
    values: Tensor  # eigenvalues of P₁P₂, descending
    count: int  # of them above the threshold
    angle: float  # mean principal angle in degrees


def run_trial(noise: float, seed: int) -> Trial:
    """One draw: standard normal entries, noise added to the shared columns of both matrices."""
    generator = torch.Generator().manual_seed(seed)

    def normal(columns: int) -> Tensor:
        return torch.randn(ROWS, columns, generator=generator, dtype=torch.float64)

    common = normal(SHARED)
    adapters = []
    for name in ("first", "second"):
        # With A = I the columns of B are those of ΔW.
        B = torch.cat([common + noise * normal(SHARED), normal(OWN)], 1)
        A = torch.eye(SHARED + OWN, dtype=torch.float64)
        adapters.append(fl.Adapter.from_tensors({"toy": (B, A)}, name=name))
    found = fl.decompose(fl.Pool(adapters), THRESHOLD)
    count = found.shared.update("toy").rank
    recovered = torch.linalg.qr(found.shared.factors("toy")[0].double()).Q
    cosines = torch.linalg.svdvals(torch.linalg.qr(common).Q.mT @ recovered).clamp(max=1)
    return Trial(found.spectrum["toy"].real, count, math.degrees(float(cosines.acos().mean())))


def plot(trials: dict[float, list[Trial]], path: Path) -> None:
    """One histogram a noise strength, and the angles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(trials) + 1, figsize=(3 * (len(trials) + 1), 3), layout="constrained")
    for axis, (noise, draws) in zip(axes, trials.items(), strict=False):
        axis.hist(draws[0].values.numpy(), bins=40, range=(0, 1))
        axis.axvline(THRESHOLD, color="black", linestyle="--", label=f"τ = {THRESHOLD}")
        axis.set(title=f"σ = {noise}", xlabel="eigenvalue", ylim=(0, 90))
    axes[0].set_ylabel("directions")
    axes[0].legend()
    for noise, draws in trials.items():
        axes[-1].plot([noise] * len(draws), [t.angle for t in draws], "o", color="C0")
    axes[-1].set(title="true and recovered space", xlabel="σ", ylabel="mean principal angle [°]", ylim=(0, None))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="directory of toy.png")
    out: Path = parser.parse_args().out
    trials = {noise: [run_trial(noise, seed) for seed in range(REPETITIONS)] for noise in NOISE}
    for noise, draws in trials.items():
        angle = sum(t.angle for t in draws) / len(draws)
        print(f"σ = {noise:<5} {draws[0].count} directions shared, mean principal angle {angle:.1f}°")
    out.mkdir(parents=True, exist_ok=True)
    plot(trials, out / "toy.png")
    print(f"wrote {out / 'toy.png'}")


if __name__ == "__main__":
    main()
