"""Pictures of similarity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastlora.files.pictures import load_pyplot, save_picture

if TYPE_CHECKING:
    from fastlora.analysis.similar import Overlap


def plot_overlap(overlap: Overlap, path: Path) -> Path:
    """Heat maps of the pool's cosine and subspace similarity."""
    pyplot = load_pyplot()
    k = len(overlap.names)
    figure, panels = pyplot.subplots(
        1, 2, figsize=(2 * max(3.2, 0.6 * k + 1.6), max(3.2, 0.5 * k + 1.6)), layout="constrained"
    )
    pictures = (("cosine of ΔW", overlap.cosine, "coolwarm", -1), ("subspace overlap", overlap.subspace, "viridis", 0))
    for axes, (title, values, colours, low) in zip(panels, pictures, strict=True):
        image = axes.imshow(values, vmin=low, vmax=1, cmap=colours)
        for i in range(k):
            for j in range(k):
                value = float(values[i, j])
                dark = value < 0.6 if colours == "viridis" else abs(value) > 0.8
                colour = "white" if dark else "black"
                axes.text(j, i, f"{value + 0.0:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(k), overlap.names, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(k), overlap.names, fontsize=8)
        axes.set_title(title, fontsize=10)
        figure.colorbar(image, ax=axes, shrink=0.8)
    return save_picture(figure, path)
