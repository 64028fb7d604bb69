"""Converters of diffusers that take whole blocks only, and what is told of files that a reader will not take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers_models import modules
from pipelines import loaded, shapes
from tolerances import FLOAT32
from written_files import adapter_of, chosen, contents, error

import fastlora as fl


@pytest.mark.parametrize("wanted", [r"blocks\.1\.attn1\.to_q$", r"ffn", r"attn2\.to_k$|blocks\.0\.ffn\.net\.2"])
def test_diffusers_reads_a_part_of_the_blocks_of_a_kohya_file_of_wan(wanted: str, tmp_path: Path) -> None:
    """Its converter asks for every module of every block, with its alpha: those that are missing are zeros."""
    published = wanted.startswith("blocks")  # no feed-forward layer tells its width: that of the published model
    adapter = adapter_of(chosen(shapes("wan"), wanted), "wan")
    file = adapter.save(tmp_path / "tiny.safetensors", format="kohya")
    found = loaded("wan", file)
    assert (found.error is not None) == published
    for module, weight in found.deltas.items():
        assert (
            torch.equal(weight, torch.zeros_like(weight))
            if module not in adapter
            else (error(weight, adapter.delta(module)) < FLOAT32)
        )
    assert {m for m in fl.load(file, family="wan").modules if fl.load(file, family="wan").delta(m).any()} == {
        *adapter.modules
    }


@pytest.mark.parametrize("wanted", [r"^layers\.1\.attn\.to_q$", "noise_refiner.0.norm1|context_refiner.1.feed_forward"])
def test_the_converter_of_lumina_finds_whole_blocks(wanted: str, tmp_path: Path) -> None:
    convert = pytest.importorskip(
        "diffusers.loaders.lora_conversion_utils"
    )._convert_non_diffusers_lumina2_lora_to_diffusers
    sizes = {m: s for m, s in modules("lumina2").items() if len(s) > 1}
    adapter = adapter_of(chosen(sizes, wanted), "lumina2")
    tensors, metadata = contents(adapter.save(tmp_path / "tiny.safetensors", format="comfy"))
    found = convert(dict(tensors))
    said = json.loads(metadata["lora_adapter_metadata"])
    for key, A in found.items():
        module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        if key.endswith("lora_B.weight"):
            continue
        B = found[key.replace("lora_A", "lora_B")]
        assert (len(B), A.shape[1]) == sizes[module]
        assert len(A) == said["transformer.rank_pattern"].get(f"^{module}", said["transformer.r"])
        assert error(B @ A, adapter.delta(module)) < FLOAT32 if module in adapter else not (B @ A).any()


@pytest.mark.parametrize(
    ("family", "format", "wanted", "words"),
    [
        (
            "wan",
            "comfy",
            "patch_embedding|attn1",
            r"diffusers refuses such a file \(.*patch_embedding.*format='diffusers'",
        ),
        ("wan", "kohya", r"blocks\.0\.attn1|^proj_out", r"diffusers refuses such a file .*ComfyUI reads all of it"),
        (
            "ltx_video",
            "comfy",
            "attn1|proj_in",
            "ComfyUI leaves out proj_in of such a file .*diffusers reads all",
        ),
        ("hunyuan_video", "comfy", r"to_q|guidance_embedder", r"ComfyUI leaves out time_text_embed.guidance_embedder"),
    ],
)
def test_what_readers_will_not_take_is_told(family: str, format: str, wanted: str, words: str, tmp_path: Path) -> None:
    adapter = adapter_of(chosen(shapes(family), wanted, "single_|refiner"), family)
    with pytest.warns(UserWarning, match=words):
        adapter.save(tmp_path / "tiny.safetensors", format=format)
