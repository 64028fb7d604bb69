"""Styles in a live pipeline of diffusers: added up, merged to one adapter, and mixed by what is their own.

    pip install diffusers peft matplotlib
    python examples/styles_in_a_pipeline.py [--out DIR] [--quick]

The model is a toy: a tiny Flux transformer that is trained here, for some minutes, to draw one shape with one ink
(styles.py), and so are its four adapters. The pictures show what the calls do. They are no evidence for real models;
docs/experiments.md has measurements on this toy.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import arguments, console
from styles import ALIKE, APART, NEEDED, SIDE, Painter
from torch import Tensor

THRESHOLD = 0.3
SHOWN = [1, 6, 8, 15]  # a disc, a square, a triangle, a cross


def pipeline(painter: Painter, folder: Path) -> object:
    """A pipeline with the model and its adapters, loaded from files as any other."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=painter.model, **nothing)
    for name, adapter in painter.adapters.items():
        file = adapter.save(folder / f"{name}.safetensors", format="diffusers")
        pipe.load_lora_weights(str(folder), weight_name=file.name, adapter_name=name)
    return pipe


def paintings(painter: Painter, folder: Path) -> dict[str, Tensor]:
    """Pictures ``[4, 3, SIDE, SIDE]`` by how the styles were mixed."""
    from fastlora.integrations.diffusers import merge_loaded, mix_unique, overlap, save_merged

    pipe = pipeline(painter, folder)
    content = torch.tensor(SHOWN)
    noise = torch.randn(len(SHOWN), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    found: dict[str, Tensor] = {}

    def paint(title: str) -> None:
        found[title] = painter.paint_with(pipe.transformer, content, noise)

    for name in (*ALIKE, APART):
        pipe.set_adapters([name])
        paint(name)
    console.print(overlap(pipe)["transformer"].cosine)
    for names in (ALIKE, [ALIKE[0], APART]):
        title = " + ".join(names)
        weights = dict.fromkeys(names, 1.0)
        pipe.set_adapters(names, list(weights.values()))
        paint(f"{title}: set_adapters")
        merge_loaded(pipe, weights, "merged", method="cat")
        paint(f"{title}: merge_loaded")
        parts = mix_unique(pipe, weights, "mixed", threshold=THRESHOLD)
        console.print(f"{title}: {parts['transformer'].report.shared_directions} directions are shared")
        paint(f"{title}: mix_unique")
        save_merged(pipe, "mixed", folder, f"{'_'.join(names)}.safetensors")
        pipe.delete_adapters(["merged", "mixed"])
    return found


def plot(found: dict[str, Tensor], out: Path) -> None:
    """A column a mix, a row a content."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    framed = [torch.nn.functional.pad(x.clamp(0, 1), (1, 1, 1, 1), value=1.0) for x in found.values()]
    tiles = torch.stack(framed)  # [columns, rows, 3, height, width]
    figure, axis = pyplot.subplots(figsize=(0.6 * len(found), 5), layout="constrained")
    axis.imshow(tiles.permute(1, 3, 0, 4, 2).flatten(2, 3).flatten(0, 1).numpy())
    axis.set_xticks([(i + 0.5) * tiles.shape[4] for i in range(len(found))], list(found), rotation=90, fontsize=6)
    axis.set_yticks([])
    axis.set_title("a toy model, trained for some minutes", fontsize=8)
    figure.savefig(out, dpi=150)


def main() -> None:
    options = arguments(__doc__, "styles_in_a_pipeline", NEEDED)
    console.print("training the base model and its adapters")
    painter = Painter(0, shorter=60 if options.quick else 1)
    with tempfile.TemporaryDirectory() as folder:
        found = paintings(painter, Path(folder))
    options.out.mkdir(parents=True, exist_ok=True)
    plot(found, options.out / "pictures.png")
    console.print(f"written: {options.out}/pictures.png")


if __name__ == "__main__":
    main()
