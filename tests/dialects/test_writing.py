"""What is written means what was to be written: for the real diffusers, and by the rules of the other readers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import gaussian
from pipelines import loaded, shapes
from safetensors.torch import save_file
from tolerances import FLOAT32, HALF, ROUNDED32
from written_files import adapter_of, chosen, contents, delta, error

import fastlora as fl
from fastlora.core.file_form import FileForm
from fastlora.dialects.spelling import STYLES, style_named

FUSED_MLP = r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp)$"
"""Diffusers cuts the fused weight of single blocks at the published width alone."""
BLOCKS = r"blocks\.|layers\.|text_encoder"

WRITTEN = {
    ("sd15", "kohya"): ("", ""),
    ("sd15", "diffusers"): ("", ""),
    ("sd15", "comfy"): ("", ""),
    ("sdxl", "kohya"): ("", ""),
    ("sdxl", "diffusers"): ("", ""),
    ("flux", "kohya"): (BLOCKS, FUSED_MLP),
    ("flux", "comfy"): (BLOCKS, FUSED_MLP),
    ("flux", "diffusers"): ("", ""),
    ("flux2", "comfy"): ("", r"^norm_out\.linear$"),
    ("flux2", "diffusers"): ("", ""),
    ("sd3", "diffusers"): ("", "text_encoder"),
    ("sd3", "comfy"): ("", "text_encoder"),
    ("wan", "comfy"): ("", "patch_embedding"),
    ("wan", "diffusers"): ("", ""),
    ("wan", "kohya"): (r"blocks\.", ""),
    ("qwen_image", "kohya"): ("", ""),
    ("qwen_image", "comfy"): ("", ""),
    ("qwen_image", "diffusers"): ("", ""),
    ("z_image", "comfy"): ("", ""),
    ("z_image", "diffusers"): ("", ""),
    ("z_image", "kohya"): (r"layers\.", ""),
    ("hunyuan_video", "comfy"): (r"\.attn\.|ff", "single_|refiner"),
    ("hunyuan_video", "diffusers"): ("", ""),
    ("ltx_video", "comfy"): ("", ""),
    ("ltx_video", "diffusers"): ("", ""),
}
"""Families and formats, and the modules that diffusers takes of such files."""


@pytest.mark.parametrize(("family", "format"), WRITTEN, ids=[f"{f}-{g}" for f, g in WRITTEN])
def test_diffusers_reads_what_is_written(family: str, format: str, tmp_path: Path) -> None:
    adapter = adapter_of(chosen(shapes(family), *WRITTEN[family, format]), family)
    found = loaded(family, adapter.save(tmp_path / "tiny.safetensors", format=format))
    assert found.error is None
    for module in adapter.modules:
        assert error(found.deltas[module], adapter.delta(module)) < FLOAT32, module
    for module, weight in found.deltas.items():
        assert module in adapter or not weight.any(), module


@pytest.mark.parametrize(("family", "format"), [("sdxl", "kohya"), ("flux", "kohya"), ("wan", "comfy")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_diffusers_reads_half_precision(family: str, format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = adapter_of(chosen(shapes(family), *WRITTEN[family, format]), family, dtype=dtype)
    file = adapter.save(tmp_path / "tiny.safetensors", format=format)
    assert {t.dtype for key, t in contents(file)[0].items() if not key.endswith(".alpha")} == {dtype}
    found = loaded(family, file)
    for module in adapter.modules:
        assert error(found.deltas[module], adapter.delta(module)) < HALF, module


@pytest.mark.parametrize(("family", "format"), [("wan", "comfy"), ("z_image", "comfy"), ("hunyuan_video", "comfy")])
@pytest.mark.parametrize("wanted", [r"\.to_q$|add_k_proj$", r"(to_k|add_v_proj)$", "ff|feed_forward"])
def test_diffusers_reads_a_part_of_the_modules(family: str, format: str, wanted: str, tmp_path: Path) -> None:
    adapter = adapter_of(chosen(shapes(family), wanted, "single_|refiner|context_embedder"), family)
    found = loaded(family, adapter.save(tmp_path / "tiny.safetensors", format=format))
    assert found.error is None
    for module, weight in found.deltas.items():
        meant = adapter.delta(module) if module in adapter else torch.zeros_like(weight)
        assert torch.equal(weight, meant) if module not in adapter else error(weight, meant) < FLOAT32, module


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_one_alpha_stands_for_a_whole_file_of_stable_diffusion(family: str, tmp_path: Path) -> None:
    adapter = adapter_of(shapes(family), family)
    tensors, metadata = contents(adapter.save(tmp_path / "tiny.safetensors", format="kohya"))
    alphas = {float(t) for key, t in tensors.items() if key.endswith(".alpha")}
    assert len(alphas) == 1
    assert all(t.shape == () and t.dtype == torch.float32 for k, t in tensors.items() if k.endswith(".alpha"))
    assert "lora_adapter_metadata" not in metadata
    again = fl.load(tmp_path / "tiny.safetensors", family=family)
    for module in adapter.modules:  # ComfyUI and sd-scripts: alpha / rank · up · down, as trainers mean it
        stem = again.base.form.stems[module]
        assert error(delta(tensors, stem, ".lora_down.weight", ".lora_up.weight"), adapter.delta(module)) < FLOAT32


def test_stored_factors_stay_as_they_are_beside_one_alpha(tmp_path: Path) -> None:
    adapter = adapter_of(shapes("sd15"), "sd15", ranks=(4,), scales=(0.5,), dtype=torch.float16)
    tensors, _ = contents(adapter.save(tmp_path / "tiny.safetensors", format="kohya"))
    for module, update in adapter.updates.items():
        stem = "lora_unet_" + module.replace(".", "_")
        if not module.startswith("text_encoder"):
            assert torch.equal(tensors[f"{stem}.lora_up.weight"].flatten(1), update.B.stored)
            assert torch.equal(tensors[f"{stem}.lora_down.weight"].flatten(1), update.A.stored)


STYLES_WITH_ALPHA = [name for name in STYLES if name not in ("mlx", "xlabs", "processor")]


@pytest.mark.parametrize(
    "style", [*STYLES_WITH_ALPHA, "component+alpha", "diffusion_model+alpha", "kohya-original+folded"]
)
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_a_round_trip_in_its_own_names_keeps_every_bit(style: str, family: str, tmp_path: Path) -> None:
    without = rf"{FUSED_MLP}|text_encoder" if style_named(style).prefix == "" else FUSED_MLP
    if family == "sd15" and "original" in style:
        without += "|text_encoder"
    adapter = adapter_of(
        chosen(shapes(family), "", without), family, style=style, format=style_named(style).format, dtype=torch.bfloat16
    )
    first = adapter.save(tmp_path / "first.safetensors")
    again = fl.load(first, family=family)
    assert again.base.form.style == style
    second = again.save(tmp_path / "second.safetensors")
    one, other = contents(first)[0], contents(second)[0]
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key


def test_the_dtype_of_scales_is_kept(tmp_path: Path) -> None:
    adapter = adapter_of(shapes("sdxl"), "sdxl", style="kohya-original", format="kohya", scales=(0.5, 0.25))
    form = replace(adapter.base.form, alpha_dtype="float16")
    file = replace(adapter, base=replace(adapter.base, form=form)).save(tmp_path / "first.safetensors")
    again = fl.load(file, family="sdxl")
    tensors, _ = contents(again.save(tmp_path / "second.safetensors"))
    assert {t.dtype for key, t in tensors.items() if key.endswith(".alpha")} == {torch.float16}


def test_a_sum_is_written_in_the_names_of_its_first_file(tmp_path: Path) -> None:
    one = adapter_of(shapes("sd15"), "sd15", style="kohya-diffusers", format="kohya")
    other = adapter_of(shapes("sd15"), "sd15", style="component", format="diffusers", ranks=(5,), seed=1)
    a = fl.load(one.save(tmp_path / "a.safetensors"), family="sd15")
    b = fl.load(other.save(tmp_path / "b.safetensors"), family="sd15")
    merged = 0.7 * a - 0.2 * b
    tensors, _ = contents(merged.save(tmp_path / "c.safetensors"))
    assert {k for k in tensors if not k.endswith(".alpha")} == {
        k for k in contents(tmp_path / "a.safetensors")[0] if not k.endswith(".alpha")
    }
    found = loaded("sd15", tmp_path / "c.safetensors")
    for module in one.modules:
        meant = 0.7 * one.delta(module).double() - 0.2 * other.delta(module).double()
        assert error(found.deltas[module], meant) < FLOAT32, module


def test_a_negative_scale_goes_into_the_factor(tmp_path: Path) -> None:
    adapter = -adapter_of(chosen(shapes("flux"), BLOCKS, FUSED_MLP), "flux")
    file = adapter.save(tmp_path / "tiny.safetensors", format="kohya")
    assert all(float(t) > 0 for key, t in contents(file)[0].items() if key.endswith(".alpha"))
    found = loaded("flux", file)
    assert max(error(found.deltas[m], adapter.delta(m)) for m in adapter.modules) < FLOAT32


def test_parts_are_put_together_and_cut_again(tmp_path: Path) -> None:
    attention = chosen(shapes("flux"), r"^transformer_blocks.*attn\.(to_[qkv]|add_[qk]_proj)$")
    adapter = adapter_of(attention, "flux")
    file = adapter.save(tmp_path / "tiny.safetensors", format="comfy")
    fused = fl.load(file, family="flux")
    assert set(fused.modules) == {
        f"transformer_blocks.{i}.attn.{n}" for i in (0, 1) for n in ("to_qkv", "to_added_qkv")
    }
    rank_of = {m: u.rank for m, u in adapter.updates.items()}
    block = "transformer_blocks.0.attn"
    assert fused.update(f"{block}.to_qkv").rank == sum(rank_of[f"{block}.{n}"] for n in ("to_q", "to_k", "to_v"))
    h = 24
    left_out = fused.delta(f"{block}.to_added_qkv")[2 * h :]
    assert not left_out.any()
    parts = fl.load(fused.save(tmp_path / "parts.safetensors", format="diffusers"), family="flux")
    assert {m: u.rank for m, u in parts.updates.items()} == rank_of
    for module in adapter.modules:
        assert error(parts.delta(module), adapter.delta(module)) < ROUNDED32


def test_parts_of_one_input_keep_their_rank(tmp_path: Path) -> None:
    A = gaussian(3, 24, seed=1)
    names = [f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v")]
    adapter = fl.Adapter.from_tensors(
        {name: (gaussian(24, 3, seed=i), A.clone(), 0.5) for i, name in enumerate(names)}, name="tiny"
    )
    adapter = replace(adapter, base=replace(adapter.base, form=FileForm("", "flux")))
    fused = fl.load(adapter.save(tmp_path / "tiny.safetensors", format="comfy"), family="flux")
    assert fused.update("transformer_blocks.0.attn.to_qkv").rank == 3
    meant = torch.cat([adapter.delta(name) for name in names])
    assert error(fused.delta("transformer_blocks.0.attn.to_qkv"), meant) < ROUNDED32


def test_the_converter_of_diffusers_finds_the_ranks_that_metadata_say(tmp_path: Path) -> None:
    """At the published width: parts of one rank make a block-diagonal B, of which diffusers cuts the rank too."""
    convert = pytest.importorskip("diffusers.loaders.lora_conversion_utils")._convert_kohya_flux_lora_to_diffusers
    names = [*(f"single_transformer_blocks.0.attn.to_{n}" for n in "qkv"), "single_transformer_blocks.0.proj_mlp"]
    for ranks in ((2, 2, 2, 2), (1, 2, 2, 3), (1, 2, 3, 1)):
        shape = {name: (12288 if "mlp" in name else 3072, 3072) for name in names}
        adapter = adapter_of(shape, "flux", ranks=ranks)
        file = tmp_path / f"{ranks}.safetensors"
        adapter.save(file, format="kohya")
        tensors, metadata = contents(file)
        said = json.loads(metadata["lora_adapter_metadata"])
        found = convert(dict(tensors))
        for name in names:
            A, B = found[f"transformer.{name}.lora_A.weight"], found[f"transformer.{name}.lora_B.weight"]
            rank = said["transformer.rank_pattern"].get(f"^{name}", said["transformer.r"])
            assert len(A) == rank and said["transformer.alpha_pattern"] == said["transformer.rank_pattern"]
            assert error(B.double() @ A.double(), adapter.delta(name)) < FLOAT32


@pytest.mark.parametrize(("family", "style"), [("flux", "kohya-original"), ("flux", "diffusion_model-down+alpha")])
def test_halves_stand_in_the_order_of_the_original_code(family: str, style: str, tmp_path: Path) -> None:
    adapter = adapter_of(chosen(shapes(family), r"^norm_out\.linear$"), family)
    format = style_named(style).format
    with pytest.warns(UserWarning, match="diffusers leaves out norm_out.linear"):
        file = adapter.save(tmp_path / "tiny.safetensors", format=format)
    tensors, _ = contents(file)
    (stem,) = {key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key}
    scale, shift = adapter.delta("norm_out.linear").chunk(2)
    assert error(delta(tensors, stem, ".lora_down.weight", ".lora_up.weight"), torch.cat([shift, scale])) < FLOAT32


def test_xlabs_names_processors(tmp_path: Path) -> None:
    wanted = (
        r"^transformer_blocks\.\d\.attn\.(to_[qkv]|to_out\.0|to_add_out|add_[qkv]_proj)$|^single.*(to_[qkv]|proj_out)$"
    )
    adapter = adapter_of(chosen(shapes("flux"), wanted), "flux")
    file = adapter.save(tmp_path / "tiny.safetensors", format="xlabs")
    tensors, _ = contents(file)
    stem = "single_blocks.0.processor.qkv_lora"
    meant = torch.cat([adapter.delta(f"single_transformer_blocks.0.attn.to_{n}") for n in "qkv"])
    assert error(delta(tensors, stem, ".down.weight", ".up.weight"), meant) < FLOAT32
    found = loaded("flux", file)
    for module in chosen(shapes("flux"), r"^transformer_blocks.*attn\.(to_q|add_v_proj|to_out\.0|to_add_out)$"):
        assert error(found.deltas[module], adapter.delta(module)) < FLOAT32, module


def test_small_updates_keep_their_digits_in_float16(tmp_path: Path) -> None:
    adapter = adapter_of(shapes("sdxl"), "sdxl", size=1e-9)
    again = fl.load(adapter.save(tmp_path / "tiny.safetensors", format="diffusers", dtype="float16"), family="sdxl")
    assert max(error(again.delta(m), adapter.delta(m)) for m in adapter.modules) < HALF


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_uniform_rank_is_filled_with_zeros(format: str, tmp_path: Path) -> None:
    adapter = adapter_of(shapes("sdxl"), "sdxl")
    file = adapter.save(tmp_path / "tiny.safetensors", format=format, uniform_rank=True)
    tensors, _ = contents(file)
    assert {len(t) for key, t in tensors.items() if key.endswith(("down.weight", "lora_A.weight"))} == {6}
    found = loaded("sdxl", file)
    assert max(error(found.deltas[m], adapter.delta(m)) for m in adapter.modules) < FLOAT32


def test_an_adapter_that_is_zero_can_be_loaded(tmp_path: Path) -> None:
    adapter = adapter_of(shapes("sd15"), "sd15")
    file = (adapter - adapter).save(tmp_path / "zero.safetensors", format="kohya")
    assert loaded("sd15", file).error is None
    assert not any(fl.load(file, family="sd15").delta(m).any() for m in fl.load(file, family="sd15").modules)


def test_names_of_a_peft_adapter_tell_its_family(tmp_path: Path) -> None:
    adapter = adapter_of(chosen(shapes("z_image"), r"layers\."), "z_image")
    plain = replace(adapter, base=replace(adapter.base, form=None))
    directory = plain.save(tmp_path / "peft")
    file = fl.convert(directory, tmp_path / "tiny.safetensors", "comfy")
    found = loaded("z_image", file)
    assert max(error(found.deltas[m], adapter.delta(m)) for m in adapter.modules) < FLOAT32


def test_peft_gets_a_directory_for_each_model(tmp_path: Path) -> None:
    adapter = adapter_of(shapes("sd15"), "sd15", style="kohya-diffusers", format="kohya")
    file = adapter.save(tmp_path / "tiny.safetensors")
    with pytest.warns(UserWarning, match="each has a directory of its own: text_encoder, unet"):
        fl.convert(file, tmp_path / "peft", "peft", family="sd15")
    unet, text = fl.load(tmp_path / "peft" / "unet"), fl.load(tmp_path / "peft" / "text_encoder")
    for module in adapter.modules:
        part, name = (text, module.removeprefix("text_encoder.")) if module.startswith("text_") else (unet, module)
        assert error(part.delta(name), adapter.delta(module)) < ROUNDED32


def test_fused_projections_become_modules_of_diffusers_in_peft(tmp_path: Path) -> None:
    adapter = adapter_of(chosen(shapes("flux"), r"^transformer_blocks.*(to_[qkv]|to_out\.0)$"), "flux")
    file = adapter.save(tmp_path / "tiny.safetensors", format="kohya")
    parts = fl.load(fl.convert(file, tmp_path / "peft", "peft", family="flux"))
    assert set(parts.modules) == set(adapter.modules)
    assert max(error(parts.delta(m), adapter.delta(m)) for m in adapter.modules) < ROUNDED32


REFUSED = {
    "xlabs has attentions only": ("flux", "xlabs", "", r"no place for .*; write format='diffusers'"),
    "a format that is none": ("flux", "gguf", "", "there is no format 'gguf' to write; formats are peft, kohya"),
}


@pytest.mark.parametrize(("family", "format", "wanted", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(family: str, format: str, wanted: str, message: str, tmp_path: Path) -> None:
    adapter = adapter_of(chosen(shapes(family), wanted), family)
    with pytest.raises(fl.InputError, match=message):
        adapter.save(tmp_path / "tiny.safetensors", format=format)
    assert not list(tmp_path.iterdir())


def test_a_name_that_does_not_fit_the_format_is_refused(tmp_path: Path) -> None:
    adapter = adapter_of(shapes("sdxl"), "sdxl", style="kohya-original", format="kohya")
    with pytest.raises(
        fl.InputError, match=r"is one file, NAME.safetensors; change it to out.safetensors, or write a PEFT"
    ):
        adapter.save(tmp_path / "out")
    with pytest.raises(fl.InputError, match="a PEFT adapter is a directory; change it to out"):
        adapter.save(tmp_path / "out.safetensors", format="peft")


def test_a_dora_is_kept_and_converted(tmp_path: Path) -> None:
    adapter = adapter_of(chosen(shapes("sd15"), "attn1"), "sd15", style="kohya-diffusers", format="kohya")
    tensors, metadata = contents(adapter.save(tmp_path / "plain.safetensors"))
    for module, update in adapter.updates.items():
        stem = "lora_unet_" + module.replace(".", "_")
        tensors[f"{stem}.dora_scale"] = gaussian(update.shape[0], 1, seed=len(module)).abs()
    file = tmp_path / "dora.safetensors"
    save_file(tensors, file, {k: v for k, v in metadata.items() if k != "fastlora"})
    dora = fl.load(file, family="sd15")
    again, _ = contents(dora.save(tmp_path / "again.safetensors"))
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], t) for key, t in tensors.items())
    other = fl.load(dora.save(tmp_path / "other.safetensors", format="diffusers"), family="sd15")
    for module in adapter.modules:
        assert torch.equal(other.magnitude(module), dora.magnitude(module))
        assert error(fl.Adapter("x", other.updates).delta(module), adapter.delta(module)) < ROUNDED32
    made = fl.convert(file, tmp_path / "converted.safetensors", "diffusers", family="sd15")
    assert {k: t.tolist() for k, t in contents(made)[0].items()} == {
        k: t.tolist() for k, t in contents(tmp_path / "other.safetensors")[0].items()
    }
    folder = fl.load(fl.convert(dora, tmp_path / "peft", "peft"))
    assert isinstance(folder, fl.DoRA)
    back = fl.load(fl.convert(folder, tmp_path / "back.safetensors", "kohya", family="sd15"), family="sd15")
    for converted in (folder, back):
        for module in adapter.modules:
            assert torch.equal(converted.magnitude(module), dora.magnitude(module))
            assert error(fl.Adapter("x", converted.updates).delta(module), adapter.delta(module)) < ROUNDED32
    with pytest.raises(fl.InputError, match="are written as they are"):
        fl.convert(dora, tmp_path / "wide.safetensors", "kohya", uniform_rank=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_sum_of_equal_scales_has_the_bits_of_its_inputs(dtype: torch.dtype, tmp_path: Path) -> None:
    """The scale that all terms share stands in alpha, and no factor is rounded."""
    made = [adapter_of(shapes("sdxl"), "sdxl", ranks=(2,), scales=(0.375,), dtype=dtype, seed=s) for s in (0, 1)]
    total = fl.load((made[0] + made[1]).save(tmp_path / "sum.safetensors", format="kohya"), family="sdxl")
    for module, update in total.updates.items():
        parts = [a.updates[module] for a in made]
        for factor, axis in ((lambda u: u.B, 1), (lambda u: u.A, 0)):
            assert torch.equal(factor(update).stored, torch.cat([factor(p).stored for p in parts], axis))
        assert update.scaling == 0.375
