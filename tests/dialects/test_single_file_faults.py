"""Damaged, doubtful and contradicting single files: refused with the tensor and the way out, or told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastlora as fl
from tests.dialects.files import ALPHAS, Sample, sample
from tests.dialects.test_single_file import check

Fault = Callable[[dict[str, Tensor]], None]
Q = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q"
CONV1 = "lora_unet_down_blocks_3_resnets_1_conv1"
MODULE = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"


def sd() -> Sample:
    return sample("sd15", "kohya, names of diffusers", ALPHAS["half the rank"], (2,))


def put(name: str, tensor: Tensor) -> Fault:
    return lambda tensors: tensors.__setitem__(name, tensor)


def without(name: str) -> Fault:
    return lambda tensors: tensors.__delitem__(name)


FAULTS: dict[str, tuple[Fault, str]] = {
    "up without down": (without(f"{Q}.lora_down.weight"), f"'{Q}.lora_up.weight' has no 'down' beside it"),
    "down without up": (without(f"{Q}.lora_up.weight"), f"'{Q}.lora_down.weight' has no 'up' beside it"),
    "alpha nan": (put(f"{Q}.alpha", torch.tensor(torch.nan)), f"'{Q}.alpha' is nan"),
    "alpha inf": (put(f"{Q}.alpha", torch.tensor(-torch.inf)), f"'{Q}.alpha' is -inf"),
    "two alphas": (put(f"{Q}.alpha", torch.ones(2)), "needed is one number"),
    "a lone alpha": (put("lora_unet_conv_out.alpha", torch.tensor(1.0)), "has no factors beside it"),
    "unknown suffix": (put(f"{Q}.weird", torch.ones(2)), f"unknown kind: '{Q}.weird'"),
    "unknown module": (
        put("lora_unet_other_thing.lora_up.weight", torch.ones(2, 2)),
        "has no 'down' beside it",
    ),
    "oft": (put(f"{Q}.oft_blocks", torch.ones(2, 2, 2)), "is OFT or BOFT"),
    "diff_m": (put(f"{Q}.diff_m", torch.ones(2)), "diff_m"),
    "another rank": (put(f"{Q}.lora_up.weight", torch.ones(24, 3)), "their ranks 2 and 3 must agree"),
    "another dtype": (put(f"{Q}.lora_up.weight", torch.ones(24, 2, dtype=torch.int8)), "is int8, needed is float32"),
    "empty": (put(f"{Q}.lora_up.weight", torch.ones(24, 0)), "is empty|must agree"),
    "twice, other numbers": (
        put("unet.conv_in.lora_A.weight", torch.ones(2, 4, 3, 3)),
        "has no 'up' beside it",
    ),
    "a bias of another size": (put(f"{Q}.diff_b", torch.ones(23)), r"needed is \[24\]"),
    "a bias with nan": (put(f"{Q}.diff_b", torch.full((24,), torch.nan)), "holds NaN or Inf"),
    "two kinds": (put(f"{Q}.diff", torch.ones(24, 24)), "several kinds"),
    "two magnitudes": (put(f"{Q}.dora_scale", torch.ones(7)), "one number for each of 24 outputs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(fault: str, tmp_path: Path) -> None:
    damage, words = FAULTS[fault]
    file = sd()
    damage(file.tensors)
    with pytest.raises(fl.InputError, match=words) as told:
        fl.load(file.save(tmp_path / "style.safetensors"))
    assert "style.safetensors" in str(told.value)


def test_an_alpha_of_zero_is_a_scale_of_zero(tmp_path: Path) -> None:
    file = sd()
    file.tensors[f"{Q}.alpha"] = torch.tensor(0.0)
    adapter = fl.load(file.save(tmp_path / "style.safetensors"))
    module = next(m for m, stem in adapter.base.form.stems.items() if stem == Q)
    assert adapter.updates[module].scaling == 0.0 and not bool(adapter.delta(module).any())
    assert any(f"1 modules have alpha 0 ({Q})" in note and "sd-scripts" in note for note in adapter.notes)
    again = fl.load(adapter.save(tmp_path / "again.safetensors"))  # zeros, which no reader scales otherwise
    assert not bool(again.delta(module).any()) and not any("alpha 0" in note for note in again.notes)


def test_names_of_no_family(tmp_path: Path) -> None:
    file = sd()
    for end in ("lora_up.weight", "lora_down.weight"):
        file.tensors[f"lora_unet_stages_0_q.{end}"] = torch.ones(2, 2)
    with pytest.raises(fl.UnsupportedAdapter, match=r"no family has modules for 'lora_unet_stages_0_q\.lora_"):
        fl.load(file.save(tmp_path / "style.safetensors"))
    with pytest.raises(fl.InputError, match="there is no family 'sd9'"):
        fl.load(sd().save(tmp_path / "style.safetensors"), family="sd9")
    with pytest.raises(fl.UnsupportedAdapter, match="the family 'flux' has no modules for"):
        fl.load(tmp_path / "style.safetensors", family="flux")


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = sd().save(tmp_path / "style.safetensors")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(fl.InputError, match="copy or download it again"):
        fl.load(path)


def test_one_module_under_two_names(tmp_path: Path) -> None:
    """Equal ones count once, others are refused."""
    file = sample("flux", "kohya, original names", ALPHAS["none"], (2,), text=False)
    stem = "lora_unet_single_blocks_7_linear2"
    for end, side in (("lora_down.weight", "A"), ("lora_up.weight", "B")):
        name = f"transformer.single_transformer_blocks.7.proj_out.lora_{side}.weight"
        file.tensors[name] = file.tensors[f"{stem}.{end}"]
    adapter = fl.load(file.save(tmp_path / "style.safetensors"))
    check(adapter, file)
    assert any("1 modules are there twice, and equal" in note for note in adapter.notes)
    file.tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    with pytest.raises(fl.InputError, match="one module under two names, with different numbers"):
        fl.load(file.save(tmp_path / "style.safetensors"))


def test_a_fused_projection_and_its_parts(tmp_path: Path) -> None:
    file = sample("flux", "kohya, original names", ALPHAS["none"], (2,), text=False)
    fused = "lora_unet_double_blocks_3_img_attn_qkv"
    part = "transformer.transformer_blocks.3.attn.to_k"
    file.tensors[f"{part}.lora_A.weight"] = file.tensors[f"{fused}.lora_down.weight"]
    file.tensors[f"{part}.lora_B.weight"] = file.tensors[f"{fused}.lora_up.weight"][24:48]
    check(fl.load(file.save(tmp_path / "style.safetensors")), file)
    file.tensors[f"{part}.lora_B.weight"] = file.tensors[f"{fused}.lora_up.weight"][:24]
    with pytest.raises(fl.InputError, match=r"is a fused projection, and .* is a part of it, with different numbers"):
        fl.load(file.save(tmp_path / "style.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_of_8_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    file = sample("sd15", "kohya, names of diffusers", lambda i, rank: 1.0, (2,), dtype)
    adapter = fl.load(file.save(tmp_path / "style.safetensors"))
    check(adapter, file)
    assert adapter.dtype == {torch.float8_e4m3fn: torch.float16, torch.float8_e5m2: torch.bfloat16}[dtype]


def test_changes_of_biases_and_norms_are_kept(tmp_path: Path) -> None:
    file = sd()
    file.tensors[f"{Q}.diff_b"] = torch.arange(24.0)
    file.tensors[f"{CONV1}.lora_B.bias"] = torch.ones(16)
    norm = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_norm1"
    file.tensors |= {f"{norm}.w_norm": torch.ones(24), f"{norm}.b_norm": 2 * torch.ones(24)}
    file.tensors["lora_unet_conv_norm_out.set_weight"] = torch.full((16,), 3.0)
    adapter = fl.load(file.save(tmp_path / "style.safetensors"))
    check(adapter, file)
    of_norm = "down_blocks.0.attentions.1.transformer_blocks.0.norm1"
    expected = {
        f"{MODULE}.bias": ("delta", torch.arange(24.0)),
        "down_blocks.3.resnets.1.conv1.bias": ("delta", torch.full((16,), 0.5)),  # by the scale, as PEFT has it
        f"{of_norm}.weight": ("delta", torch.ones(24)),
        f"{of_norm}.bias": ("delta", torch.full((24,), 2.0)),
        "conv_norm_out.weight": ("value", torch.full((16,), 3.0)),
    }
    assert set(adapter.extras) == set(expected)
    for name, (kind, tensor) in expected.items():
        assert adapter.extras[name].kind == kind and torch.equal(adapter.extras[name].tensor, tensor), name


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    file = sd()
    file.tensors |= {f"{Q}.scalar": torch.tensor(1.0), f"{CONV1}.scale": torch.tensor(0.25)}
    file.tensors["bundle_emb.cat.emb_params"] = torch.ones(2, 4)
    adapter = fl.load(file.save(tmp_path / "style.safetensors"))
    check(adapter, file)
    for words in ("scalars are left out", "A1111 takes them", CONV1, "bundle_emb.cat"):
        assert any(words in note for note in adapter.notes), words


def test_an_adapter_that_changes_nothing_is_told(tmp_path: Path) -> None:
    file = sd()
    file.tensors = {k: torch.zeros_like(t) if "lora_up" in k else t for k, t in file.tensors.items()}
    assert any("changes nothing" in n for n in fl.load(file.save(tmp_path / "style.safetensors")).notes)


def lycoris(shape: tuple[int, int], p: int) -> dict[str, Tensor]:
    """LoKr of two whole matrices."""
    generator = torch.Generator().manual_seed(p)
    w1 = torch.randn(p, p, generator=generator)
    return {"lokr_w1": w1, "lokr_w2": torch.randn(shape[0] // p, shape[1] // p, generator=generator)}


def test_lycoris_modules_in_a_file(tmp_path: Path) -> None:
    file = sd()
    small = lycoris((24, 24), 4)
    for end in ("lora_up.weight", "lora_down.weight", "alpha"):
        del file.tensors[f"{Q}.{end}"]
    file.tensors |= {f"{Q}.{name}": t for name, t in small.items()}
    file.tensors[f"{Q}.alpha"] = torch.tensor(0.125)  # of two whole matrices, it has no meaning
    file.meaning[MODULE] = torch.kron(small["lokr_w1"].double(), small["lokr_w2"].double())
    path = file.save(tmp_path / "style.safetensors")
    adapter = fl.load(path)
    check(adapter, file)
    assert any("1 modules are LoKr: they are read exactly, as updates of rank 24" in n for n in adapter.notes)
    cut = fl.load(path, rank=5)
    u, s, v = torch.linalg.svd(file.meaning[MODULE])
    best = u[:, :5] * s[:5] @ v[:5]
    torch.testing.assert_close(cut.delta(MODULE).double(), best, rtol=0, atol=1e-6 * float(s[0]))
    kept = float(s[:5].square().sum() / s.square().sum())
    assert any(f"cut to rank 5, the nearest updates of that rank: {kept:.2%}" in note for note in cut.notes)
    with pytest.raises(fl.InputError, match="rank=0: needed is a whole number"):
        fl.load(path, rank=0)


def test_a_kernel_that_lycoris_flattened_is_that_of_the_unet(tmp_path: Path) -> None:
    file = sd()
    for end in ("lora_up.weight", "lora_down.weight", "alpha"):
        del file.tensors[f"{CONV1}.{end}"]
    generator = torch.Generator().manual_seed(0)
    shapes = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 72), "hada_w2_a": (16, 2), "hada_w2_b": (2, 72)}
    w = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    file.tensors |= {f"{CONV1}.{name}": t for name, t in w.items()}
    module = "down_blocks.3.resnets.1.conv1"
    products = [w[f"hada_w{i}_a"].double() @ w[f"hada_w{i}_b"].double() for i in (1, 2)]
    file.meaning[module] = products[0] * products[1]
    adapter = fl.load(file.save(tmp_path / "style.safetensors"))
    check(adapter, file)
    assert adapter.updates[module].layout.kernel == (3, 3)


def test_what_has_no_low_rank_names_the_way_out(tmp_path: Path) -> None:
    file = sd()
    key = "lora_unet_time_embedding_linear_2"
    file.tensors |= {f"{key}.{name}": t for name, t in lycoris((320, 320), 16).items()}
    path = file.save(tmp_path / "style.safetensors")
    with pytest.raises(fl.InputError, match=rf"module '{key}' is a LoKr, an update of rank 320.*--read-rank 64"):
        fl.load(path)
    adapter = fl.load(path, rank=64)
    assert adapter.updates["time_embedding.linear_2"].rank == 64
    assert adapter.updates[MODULE].rank == 2, "plain factors are not cut"


def test_halves_of_the_original_code(tmp_path: Path) -> None:
    """Also of biases; an odd number of rows has none."""
    file = sample("flux", "kohya, original names", ALPHAS["half the rank"], (2,), text=False)
    stem = file.stems["norm_out.linear"]
    file.tensors[f"{stem}.diff_b"] = torch.arange(48.0)
    adapter = fl.load(file.save(tmp_path / "style.safetensors"))
    check(adapter, file)
    swapped = torch.cat([torch.arange(24.0, 48.0), torch.arange(24.0)])
    assert torch.equal(adapter.extras["norm_out.linear.bias"].tensor, swapped)
    file.tensors[f"{stem}.lora_up.weight"] = torch.ones(47, 2)
    del file.tensors[f"{stem}.diff_b"]
    with pytest.raises(fl.InputError, match="two halves are needed"):
        fl.load(file.save(tmp_path / "style.safetensors"))


def test_xlabs(tmp_path: Path) -> None:
    """Attention processors of Flux: image and text projections, fused; no alpha."""
    h, r = 24, 2
    table = {
        "double_blocks.0.processor.qkv_lora1": ("transformer_blocks.0.attn.to_qkv", 3 * h),
        "double_blocks.0.processor.qkv_lora2": ("transformer_blocks.0.attn.to_added_qkv", 3 * h),
        "double_blocks.0.processor.proj_lora1": ("transformer_blocks.0.attn.to_out.0", h),
        "double_blocks.0.processor.proj_lora2": ("transformer_blocks.0.attn.to_add_out", h),
        "single_blocks.1.processor.qkv_lora": ("single_transformer_blocks.1.attn.to_qkv", 3 * h),
        "single_blocks.1.processor.proj_lora": ("single_transformer_blocks.1.proj_out", h),
    }
    file = Sample({}, {}, {})
    for i, (stem, (module, out)) in enumerate(table.items()):
        generator = torch.Generator().manual_seed(i)
        down, up = torch.randn(r, h, generator=generator), torch.randn(out, r, generator=generator)
        file.tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        file.meaning[module] = up.double() @ down.double()
    adapter = fl.load(file.save(tmp_path / "style.safetensors"))
    check(adapter, file)
    assert adapter.base.form is not None and adapter.base.form.format == adapter.base.form.style == "xlabs"


def test_old_attention_processors(tmp_path: Path) -> None:
    unet, text = "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "text_model.encoder.layers.0.self_attn"
    table = {
        f"unet.{unet}.processor.to_q_lora": f"{unet}.to_q",
        f"unet.{unet}.processor.to_out_lora": f"{unet}.to_out.0",
        f"text_encoder.{text}.to_v_lora": f"text_encoder.{text}.v_proj",
        f"text_encoder.{text}.out_proj.lora_linear_layer": f"text_encoder.{text}.out_proj",
    }
    file = Sample({}, {}, {})
    for i, (name, module) in enumerate(table.items()):
        generator = torch.Generator().manual_seed(i)
        down, up = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
        file.tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
        file.meaning[module] = up.double() @ down.double()
    check(fl.load(file.save(tmp_path / "pytorch_lora_weights.safetensors")), file)


def test_a_saved_peft_model_of_an_image_model(tmp_path: Path) -> None:
    file = sample("flux", "component", ALPHAS["none"], (2,), text=False)
    file.tensors = {f"base_model.model.{k.removeprefix('transformer.')}": t for k, t in file.tensors.items()}
    check(fl.load(file.save(tmp_path / "style.safetensors")), file)
    with pytest.raises(fl.UnsupportedAdapter, match=r"has no adapter_config\.json"):  # whose alpha is not known
        fl.load(file.save(tmp_path / "adapter_model.safetensors"))


def test_ambiguous_names_are_kept_and_told(tmp_path: Path) -> None:
    """Flux and HunyuanVideo call these alike, and mean different modules."""
    file = Sample({}, {}, {})
    for stem, out in {"lora_unet_single_blocks_0_linear1": 168, "lora_unet_double_blocks_0_img_attn_qkv": 72}.items():
        file.tensors |= {f"{stem}.lora_down.weight": torch.randn(2, 24), f"{stem}.lora_up.weight": torch.randn(out, 2)}
    path = file.save(tmp_path / "style.safetensors")
    adapter = fl.load(path)
    assert adapter.base.form is not None
    if adapter.base.form.family is None and any("family=" in note for note in adapter.notes):
        assert set(adapter.updates) <= {"lora_unet_single_blocks_0_linear1", "lora_unet_double_blocks_0_img_attn_qkv"}
    assert "transformer_blocks.0.attn.to_qkv" in fl.load(path, family="flux").updates
    pool = fl.Pool.load([path], family="flux")
    assert "transformer_blocks.0.attn.to_qkv" in pool.modules
