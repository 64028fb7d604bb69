"""Files that are written, by the rules of ComfyUI and of kohya's scripts: ``ΔW`` of every weight of the model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers_models import BUILDS
from original_models import Model, model
from reader_rules import NEEDS_ALPHA, Outcome, comfy, sd_scripts
from tolerances import FLOAT32, HALF
from torch import Tensor
from written_files import adapter_of, chosen, contents, error

import fastlora as fl
from fastlora.dialects.families import families
from fastlora.dialects.writing import best_style

NOWHERE = {"cogvideox", "cogview4", "hunyuan_video15", "hunyuan_image", "kandinsky5"}
"""Families without names of the original code: their files have those of diffusers alone."""
MODELS = [
    name for name, (family, _) in BUILDS.items() if family not in NOWHERE and name not in ("framepack", "mochi48")
]
"""FramePack is read by a wrapper of ComfyUI's, not by itself; Mochi is there with two blocks."""
FORMATS = ("kohya", "comfy", "diffusers")
EMBEDDERS = r"time_text_embed\.(timestep|guidance)_embedder|context_embedder\.time_text_embed"

COMFY_LOSES = {
    # Attention is known dotted only as .processor.to_q (ComfyUI#12452); the projection of CLIP-G as lora_te2_ only.
    **{(name, "diffusers"): r"attn\d\.to_|text_projection" for name in ("sd15", "sd2", "sdxl", "refiner")},
    # T5 is known as lora_te3_ and under text_encoders. only.
    ("flux", "diffusers"): r"text_encoder_2\.",
    ("chroma", "diffusers"): r"text_encoder_2\.|distilled_guidance_layer",
    ("sd3", "diffusers"): r"text_encoder_3\.|text_projection",
    ("sd3", "comfy"): r"text_encoder_3\.|text_projection",
    ("flux2", "diffusers"): r"time_guidance_embed|stream_modulation",
    # Its model has other names for these than the original code, and takes the original ones of blocks alone, dotted.
    ("hunyuan_video", "comfy"): EMBEDDERS,
    ("hunyuan_video", "kohya"): rf"{EMBEDDERS}|\.ff|norm\d?(_context)?\.linear",
    # Outside the blocks, it has the original names, and diffusers its own.
    **{(name, "comfy"): r"proj_in|time_embed|prompt_adaln|av_cross_attn" for name in ("ltx_video", "ltx2")},
    # transformer. is known of some families only; of Sana it has no model.
    **{
        (name, "diffusers"): "."
        for name in ("wan", "wan_vace", "hunyuan_video", "ltx_video", "ltx2", "lumina2", "cosmos", "ideogram4", "mochi")
    },
    **{(name, format): "." for name in ("sana", "sana_sprint") for format in FORMATS},
}  # fmt: skip
"""The modules that ComfyUI loses of what is written, as a pattern, and why."""


def written(name: str, format: str, folder: Path, **options: object) -> tuple[Model, fl.Adapter, dict[str, Tensor]]:
    """A model, a random adapter of the modules that files of a format can hold, and what is in its file."""
    tiny = model(name)
    style = best_style(format, families()[tiny.family])
    held = [m for m in tiny.shapes if m in tiny.places] if style.original else list(tiny.shapes)
    adapter = adapter_of({m: tiny.shapes[m] for m in held}, tiny.family, **options)  # type: ignore[arg-type]
    return tiny, adapter, contents(adapter.save(folder / "tiny.safetensors", format=format))[0]


def compared(tiny: Model, adapter: fl.Adapter, outcome: Outcome, lost: str, tolerance: float = FLOAT32) -> None:
    """Every weight as meant, or lost by name."""
    there = [m for m in adapter.modules if m in tiny.places]
    kept = chosen({m: tiny.shapes[m] for m in there}, "", lost)
    meant = tiny.meant(fl.Adapter("kept", {m: adapter.updates[m] for m in kept}))
    assert {w for w, delta in outcome.deltas.items() if delta.any()} == meant.keys()
    for weight, delta in meant.items():
        assert error(outcome.deltas[weight], delta) < tolerance, weight


def stems_of(keys: set[str]) -> set[str]:
    """The modules of tensors, as the file calls them."""
    return {re.sub(r"\.lora_(down|up|A|B)\.weight$|\.alpha$", "", key) for key in keys}


@pytest.mark.filterwarnings("ignore:.*diffusers")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_comfyui_changes_every_weight_as_meant(name: str, format: str, tmp_path: Path) -> None:
    tiny, adapter, tensors = written(name, format, tmp_path)
    lost = COMFY_LOSES.get((name, format), "")
    outcome = comfy(tensors, tiny)
    compared(tiny, adapter, outcome, lost)
    assert bool(outcome.lost) == bool(lost)


@pytest.mark.filterwarnings("ignore:.*diffusers")
@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl", "flux", "sd3", "lumina2", "cosmos"])
def test_scripts_of_kohya_change_every_weight_as_meant(name: str, tmp_path: Path) -> None:
    tiny, adapter, tensors = written(name, "kohya", tmp_path)
    lost = {  # what they do not train
        "sd": r"^(conv_in|conv_out|time_embedding|add_embedding)|text_projection",
        "flux": r"^norm_out|^proj_out|text_projection",
        "sd3": r"text_projection",
    }.get("sd" if name in ("sd15", "sd2", "sdxl") else name, "")
    outcome = sd_scripts(tensors, tiny)
    compared(tiny, adapter, outcome, lost)
    assert all(f"{key.partition('.')[0]}.alpha" in tensors for key in tensors)
    reading = fl.check(tmp_path / "tiny.safetensors", "sd-scripts", family=tiny.family).readings["sd-scripts"]
    assert reading.refused is None and {f.fault for f in reading.findings.values()} <= {"lost"}
    assert reading.findings.keys() == stems_of(outcome.lost)


@pytest.mark.filterwarnings("ignore:.*diffusers")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "format"),
    [("sd15", "kohya"), ("flux", "kohya"), ("flux2", "comfy"), ("wan", "comfy"), ("sd3", "diffusers")],
)
def test_half_precision_is_rounded_once(name: str, format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny, adapter, tensors = written(name, format, tmp_path, dtype=dtype)
    assert {t.dtype for key, t in tensors.items() if not key.endswith(".alpha")} == {dtype}
    compared(tiny, adapter, comfy(tensors, tiny), COMFY_LOSES.get((name, format), ""), HALF)


CHECKED = ["sd15", "sdxl", "flux", "flux2", "sd3", "wan", "qwen_image", "z_image", "hunyuan_video", "ltx_video"]


@pytest.mark.filterwarnings("ignore:.*diffusers")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CHECKED)
def test_check_finds_what_comfyui_loses(name: str, format: str, tmp_path: Path) -> None:
    tiny, _, tensors = written(name, format, tmp_path)
    file = tmp_path / "tiny.safetensors"
    reading = fl.check(file, "comfy", family=tiny.family).readings["comfy"]
    lost = {stem for stem, finding in reading.findings.items() if finding.fault == "lost"}
    assert reading.refused is None and lost == stems_of(comfy(tensors, tiny).lost)


@pytest.mark.filterwarnings("ignore:.*diffusers")
@pytest.mark.parametrize("name", NEEDS_ALPHA)
def test_the_scripts_need_every_alpha(name: str, tmp_path: Path) -> None:
    """The rule itself: a file of such a family without one is refused."""
    tiny, _, tensors = written(name, "kohya", tmp_path)
    first = next(key for key in tensors if key.startswith("lora_unet_") and key.endswith(".alpha"))
    with pytest.raises(KeyError):
        sd_scripts({k: t for k, t in tensors.items() if k != first}, tiny)
