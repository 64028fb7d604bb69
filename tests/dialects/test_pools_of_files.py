"""Files of one model in two dialects in one pool: kohya's with fused projections, and diffusers' with their parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from builders import gaussian
from safetensors.torch import load_file, save_file
from tolerances import SUMS32
from torch import Tensor

import fastlora as fl

H = 32
FLUX, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0"
# By family: kohya's name, rows and columns, and the diffusers modules of its rows with their lengths.
FUSED: Mapping[str, Mapping[str, tuple[int, Mapping[str, int]]]] = {
    "flux": {
        "double_blocks_0_img_attn_qkv": (H, {f"{FLUX}.to_{x}": H for x in "qkv"}),
        "double_blocks_0_txt_attn_qkv": (H, {f"{FLUX}.add_{x}_proj": H for x in "qkv"}),
        "single_blocks_0_linear1": (
            H, {**{f"{SINGLE}.attn.to_{x}": H for x in "qkv"}, f"{SINGLE}.proj_mlp": 4 * H},
        ),
        "single_blocks_0_linear2": (5 * H, {f"{SINGLE}.proj_out": H}),
        "double_blocks_0_img_mod_lin": (H, {"transformer_blocks.0.norm1.linear": 6 * H}),
        # Its two halves have the other order in diffusers.
        "final_layer_adaLN_modulation_1": (H, {"norm_out.linear": 2 * H}),
    },
    "sd3": {
        "joint_blocks_0_x_block_attn_qkv": (H, {f"{FLUX}.to_{x}": H for x in "qkv"}),
        "joint_blocks_0_context_block_attn_qkv": (H, {f"{FLUX}.add_{x}_proj": H for x in "qkv"}),
        "joint_blocks_0_context_block_adaLN_modulation_1": (H, {"transformer_blocks.0.norm1_context.linear": 6 * H}),
        "joint_blocks_1_context_block_adaLN_modulation_1": (H, {"transformer_blocks.1.norm1_context.linear": 2 * H}),
    },
    "lumina2": {
        "layers_0_attention_qkv": (
            24, {"layers.0.attn.to_q": 24, "layers.0.attn.to_k": 8, "layers.0.attn.to_v": 8},
        ),
        "layers_0_adaLN_modulation_1": (24, {"layers.0.norm1.linear": 96}),
    },
}  # fmt: skip


def write_files(family: str, folder: Path) -> tuple[Path, Path, dict[str, Tensor], dict[str, Tensor]]:
    """Both files, and what they change of each diffusers module, in float64."""
    kohya, split, meant = dict[str, Tensor](), dict[str, Tensor](), (dict[str, Tensor](), dict[str, Tensor]())
    for i, (name, (columns, parts)) in enumerate(FUSED[family].items()):
        rows = sum(parts.values())
        up, down = gaussian(rows, 4, seed=3 * i), gaussian(4, columns, seed=3 * i + 1)
        kohya |= {f"lora_unet_{name}.lora_up.weight": up, f"lora_unet_{name}.lora_down.weight": down}
        kohya[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
        delta = 0.5 * up.double() @ down.double()
        if parts.keys() & {"norm_out.linear", "transformer_blocks.1.norm1_context.linear"}:
            delta = torch.cat(delta.chunk(2)[::-1])
        meant[0].update(zip(parts, delta.split(list(parts.values())), strict=True))
        for j, (part, length) in enumerate(parts.items()):
            if j % 2 == 0:  # q and v, not k
                B, A = gaussian(length, 3, seed=100 * i + j), gaussian(3, columns, seed=100 * i + j + 50)
                split |= {f"transformer.{part}.lora_B.weight": B, f"transformer.{part}.lora_A.weight": A}
                meant[1][part] = B.double() @ A.double()
    paths = folder / "kohya.safetensors", folder / "split.safetensors"
    for path, tensors in zip(paths, (kohya, split), strict=True):
        save_file(tensors, path)
    return *paths, *meant


@pytest.mark.parametrize("family", FUSED)
def test_files_of_two_dialects_are_merged_exactly(family: str, tmp_path: Path) -> None:
    kohya, split, one, two = write_files(family, tmp_path)
    expected = {part: one[part] + 2 * two.get(part, 0) for part in one}
    for order in ((kohya, split), (split, kohya)):
        pool = fl.Pool.load(order)
        merged = fl.merge(pool, {"kohya": 1.0, "split": 2.0}, method="cat")
        assert merged.base.form.family == family
        fused = {m: parts for m in merged.modules if (parts := _parts(m))}
        assert bool(fused) == (order[0] is kohya)
        found: dict[str, Tensor] = {}
        for module in merged.modules:
            delta, parts = merged.delta(module).double(), fused.get(module, (module,))
            lengths = [len(expected[part]) for part in parts]
            found |= dict(zip(parts, delta.split(lengths), strict=True))
        assert found.keys() == expected.keys()
        for part, delta in expected.items():
            torch.testing.assert_close(found[part], delta, rtol=0, atol=SUMS32 * float(delta.abs().max()))


def test_changes_of_biases_go_with_their_rows(tmp_path: Path) -> None:
    kohya, split, *_ = write_files("flux", tmp_path)
    whole, part = gaussian(3 * H, seed=900), gaussian(H, seed=901)
    fused, parts = load_file(kohya), load_file(split)
    save_file(fused | {"lora_unet_double_blocks_0_img_attn_qkv.diff_b": whole}, kohya)
    save_file(parts | {f"transformer.{FLUX}.to_v.diff_b": part}, split)
    expected = whole.clone()
    expected[2 * H :] += part
    for order in ((kohya, split), (split, kohya)):
        merged = fl.merge(fl.Pool.load(order), {"kohya": 1.0, "split": 1.0}, method="cat")
        names = [f"{FLUX}.to_qkv.bias"] if order[0] is kohya else [f"{FLUX}.to_{x}.bias" for x in "qkv"]
        found = torch.cat([merged.extras[name].tensor for name in names])
        assert merged.extras.keys() == {*names} and torch.equal(found, expected)


def _parts(module: str) -> tuple[str, ...] | None:
    """The diffusers modules whose rows a fused one has."""
    block, _, leaf = module.rpartition(".")
    if leaf == "to_qkv_mlp_proj":
        return (*(f"{block}.to_{x}" for x in "qkv"), f"{block.rpartition('.')[0]}.proj_mlp")
    ends = {"to_qkv": "to_{}", "to_added_qkv": "add_{}_proj"}
    return tuple(f"{block}.{ends[leaf].format(x)}" for x in "qkv") if leaf in ends else None
