"""Weights in scaled float8 are multiplied out; other codes are refused by name, whatever is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import gaussian
from safetensors.torch import save_file
from tolerances import FLOAT64
from torch import Tensor

import fastlora as fl
from fastlora.files.checkpoint import read_checkpoint

NAME = "model.layers.0.mlp.up_proj.weight"
MODULE = NAME.removesuffix(".weight")
E4M3 = torch.float8_e4m3fn


def value(
    weight: Tensor, scale: Tensor, name: str, config: dict[str, object] | None = None, path: Path | None = None
) -> Tensor:
    """What a scaled weight stands for."""
    state = {NAME: weight, name: scale}
    if path is None:
        return read_checkpoint(state).value(NAME)
    save_file({k: v.contiguous() for k, v in state.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return read_checkpoint(path).value(NAME)


def expanded(scale: Tensor, rows: int, columns: int, shape: tuple[int, int]) -> Tensor:
    """The formula: entry (i, j) has the scale of its block."""
    full = torch.empty(shape, dtype=torch.float64)
    for i in range(shape[0]):
        for j in range(shape[1]):
            full[i, j] = scale[i // rows, j // columns].double()
    return full


NAMES = [f"{NAME}_scale_inv", f"{NAME}_scale", f"{MODULE}.scale_weight", f"{MODULE}.scale", f"{MODULE}.weight_scales"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1), (1, 8)])
@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2], ids=str)
def test_one_scale_or_one_a_row(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = gaussian(6, 8, seed=1).to(dtype)
    scale = gaussian(6, 8, seed=2).abs()[tuple(slice(n) for n in shape)] if len(shape) == 2 else torch.rand(shape) + 1
    full = scale.double().reshape(-1, 1) if shape == (6,) else scale.double()
    torch.testing.assert_close(value(weight, scale, name), weight.double() * full, rtol=FLOAT64, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_blocks(dtype: torch.dtype, tmp_path: Path) -> None:
    """Sizes from the configuration, also where the last blocks are shorter; without one, from the shapes."""
    weight = gaussian(20, 24, seed=3).to(E4M3)
    scale = (gaussian(3, 3, seed=4).abs() + 0.1).to(dtype)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 10]}}
    found = value(weight, scale, NAMES[0], config, tmp_path)
    expected = weight.double() * expanded(scale, 8, 10, (20, 24))
    torch.testing.assert_close(found, expected, rtol=FLOAT64, atol=0)
    even = value(weight[:16], scale[:2], NAMES[0])
    torch.testing.assert_close(even, weight[:16].double() * expanded(scale[:2], 8, 8, (16, 24)), rtol=FLOAT64, atol=0)
    with pytest.raises(fl.InputError, match=r"is \[20, 24\] in float8 and its scale \[2, 3\], and nothing says"):
        value(weight, scale[:2], NAMES[0])
    with pytest.raises(fl.InputError, match="nothing says which entries share a scale"):
        value(weight, scale, NAMES[0], {"quantization_config": {"weight_block_size": [4, 4]}}, tmp_path)


def test_experts_in_one_tensor() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight = gaussian(2 * 16, 8, seed=5).reshape(2, 16, 8).to(E4M3)
    scale = torch.rand(2, 2, 1) + 1
    found = read_checkpoint({name: weight, f"{name}_scale_inv": scale}).value(name)
    expected = torch.stack([weight[e].double() * expanded(scale[e], 8, 8, (16, 8)) for e in range(2)])
    torch.testing.assert_close(found, expected, rtol=FLOAT64, atol=0)


BASE = {NAME: gaussian(16, 16, seed=6).bfloat16(), "model.norm.weight": torch.ones(16)}
ONES = torch.ones(16)
CODES = torch.randint(0, 100, (16, 16), dtype=torch.uint8)
QUANTISED: dict[str, tuple[dict[str, Tensor], str]] = {
    "bitsandbytes 8 bit": ({NAME: CODES.to(torch.int8), f"{MODULE}.SCB": torch.ones(16)}, "bitsandbytes, 8 bit"),
    "bitsandbytes 4 bit": (
        {NAME: CODES.reshape(-1, 1), f"{NAME}.absmax": ONES, f"{NAME}.quant_state.bitsandbytes__nf4": CODES[0]},
        "bitsandbytes, 4 bit",
    ),
    "gptq": ({f"{MODULE}.qweight": CODES.int(), f"{MODULE}.qzeros": CODES.int(), f"{MODULE}.scales": ONES}, "GPTQ"),
    "packed": ({f"{MODULE}.weight_packed": CODES.int(), f"{MODULE}.weight_scale": ONES[:, None]}, "compressed-tensors"),
    "whole numbers": ({NAME: CODES.to(torch.int8), f"{NAME}_scale": torch.ones(16, 1)}, "int8 with weight_scale"),
    "whole numbers alone": ({NAME: CODES}, "uint8 without a scale"),
    "unknown scale": ({NAME: BASE[NAME].to(E4M3), f"{MODULE}.my_scales": ONES}, "float8_e4m3fn with my_scales"),
    "two scales": (
        {NAME: BASE[NAME].to(E4M3), f"{NAME}_scale": torch.ones(1), f"{NAME}_scale_inv": torch.ones(1)},
        "weight_scale_inv, weight_scale beside it",
    ),
    "codes in bfloat16": ({NAME: BASE[NAME], f"{NAME}_scale": torch.ones(1)}, "bfloat16 with weight_scale"),
    "scale alone": ({f"{NAME}_scale_inv": torch.ones(1)}, "weight_scale_inv without its weight"),
    "hqq": ({f"{MODULE}.W_q": CODES, f"{MODULE}.meta": torch.ones(1)}, "HQQ"),
    "mxfp4": (
        {"model.experts.gate_up_proj_blocks": CODES.reshape(2, 4, 2, 16), "model.experts.gate_up_proj_scales": CODES},
        "MXFP4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("common_only", [False, True])
@pytest.mark.parametrize("side", ["base", "tuned", "both"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_codes_are_never_compared(kind: str, side: str, common_only: bool) -> None:
    codes, message = QUANTISED[kind]
    plain = BASE | (
        {"model.experts.gate_up_proj": gaussian(32, 32, seed=7).reshape(2, 16, 32)} if kind == "mxfp4" else {}
    )
    coded = {"model.norm.weight": BASE["model.norm.weight"], **codes}
    base, tuned = (plain if side == "tuned" else coded), (plain if side == "base" else coded)
    with pytest.raises(fl.InputError, match="is quantised") as error:
        fl.task_vector(base, tuned, common_only=common_only)
    assert message in str(error.value) and "common_only" not in str(error.value)


def test_what_is_left_out_may_be_quantised() -> None:
    codes, _ = QUANTISED["bitsandbytes 8 bit"]
    other = {"lm_head.weight": gaussian(4, 4, seed=8)}
    base, tuned = BASE | other, {**BASE, **codes, "lm_head.weight": gaussian(4, 4, seed=9)}
    vector = fl.task_vector(base, tuned, exclude=["up_proj"])
    assert list(vector.deltas) == ["lm_head.weight"]


def test_scales_of_activations_are_no_parameters() -> None:
    scale = torch.tensor([[0.5]])
    weight = (BASE[NAME].float() / 0.5).to(E4M3)
    beside = {f"{MODULE}.input_scale": torch.ones(1), "scaled_fp8": torch.zeros(2).to(E4M3), f"{MODULE}.k_scale": scale}
    vector = fl.task_vector(BASE, {**BASE, NAME: weight, f"{NAME}_scale_inv": scale, **beside}, "tuned")
    expected = 0.5 * weight.double() - BASE[NAME].double()
    torch.testing.assert_close(vector.deltas[NAME].double(), expected, rtol=FLOAT64, atol=1e-7)
    assert len(vector.notes) == 1 and "bfloat16 in the base model and float8_e4m3fn" in vector.notes[0]


def test_plain_float8_is_a_rounding(tmp_path: Path) -> None:
    tuned = {**BASE, NAME: BASE[NAME].to(E4M3)}
    expected = tuned[NAME].double() - BASE[NAME].double()
    torch.testing.assert_close(fl.task_vector(BASE, tuned).deltas[NAME].double(), expected, rtol=FLOAT64, atol=1e-7)
    save_file(tuned, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(fl.InputError, match=r"quantised \(fp8, float8_e4m3fn without a scale\)"):
        fl.task_vector(BASE, tmp_path)


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2], ids=str)
def test_a_scale_that_is_kept_elsewhere(dtype: torch.dtype) -> None:
    """Entries that fill the range of float8 were scaled, whatever the scale is called."""
    weight = (gaussian(16, 16, seed=9) * torch.finfo(dtype).max / 5).to(dtype)
    with pytest.raises(fl.InputError, match="without a scale"):
        fl.task_vector(BASE, {**BASE, NAME: weight}, common_only=True)


def test_a_quantised_base_cannot_be_written_back() -> None:
    vector = fl.task_vector(BASE, {**BASE, NAME: BASE[NAME] + 1})
    base = {**BASE, NAME: BASE[NAME].to(E4M3), f"{NAME}_scale": torch.ones(1)}
    with pytest.raises(fl.InputError, match="its values cannot be written back"):
        vector.apply(base)
