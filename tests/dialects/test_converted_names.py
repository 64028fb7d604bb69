"""Names of adapters in the dialects of trainers against what diffusers makes of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import diffusers.loaders.lora_conversion_utils as lora
import pytest
import torch
from diffusers_models import BUILDS, ENCODERS, modules, weighted
from torch import Tensor

from fastlora.dialects.detect import identify
from fastlora.dialects.families import families

State = dict[str, Tensor]


def marked(number: int, rows: int) -> Tensor:
    """``B`` of rank 1 in which every row of every module is another number."""
    return torch.arange(1, rows + 1, dtype=torch.float32).add(number * 2**16).reshape(-1, 1)


def down_up(stem: str, down: Tensor, up: Tensor) -> State:
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}


def a_b(stem: str, down: Tensor, up: Tensor) -> State:
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}


def bare(stem: str, down: Tensor, up: Tensor) -> State:
    return {f"{stem}.down.weight": down, f"{stem}.up.weight": up}


@dataclass(frozen=True)
class Case:
    """``model``: of ``BUILDS``. ``wanted``: the canonical modules in the file. ``prefix``: before each; flat if it ends
    so. ``original``: whether under original names, fused. ``more``: further stems with their shapes."""

    model: str
    prefix: str
    write: Callable[[str, Tensor, Tensor], State]
    convert: Callable[[State], State]
    original: bool
    wanted: str = ""
    more: tuple[tuple[str, tuple[int, int]], ...] = ()


def conditioner() -> Iterable[tuple[str, tuple[int, int]]]:
    for path, shape in weighted(ENCODERS["conditioner"]).items():
        if len(shape) == 2 and "embed" not in path:
            yield f"diffusion_model.llm_adapter.{path}", (shape[0], shape[1])


XLABS = tuple(
    (f"{kind}_blocks.{i}.processor.{name}", (rows, 3072))
    for i in range(2)
    for kind, names in (
        ("double", ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2")),
        ("single", ("qkv_lora", "proj_lora")),
    )
    for name in names
    for rows in [9216 if "qkv" in name else 3072]
)
BLOCKS = r"(single_)?transformer_blocks\."
CASES = {
    "flux, kohya": Case("flux", "lora_unet_", down_up, lora._convert_kohya_flux_lora_to_diffusers, True, BLOCKS),
    "flux, XLabs": Case("flux", "", bare, lora._convert_xlabs_flux_lora_to_diffusers, True, "(nothing)", XLABS),
    "flux2, kohya": Case("flux2", "lora_unet_", down_up, lora._convert_kohya_flux2_lora_to_diffusers, True, BLOCKS),
    "wan, musubi": Case("wan", "lora_unet_", down_up, lora._convert_musubi_wan_lora_to_diffusers, True, r"blocks\."),
    "wan, ComfyUI": Case(
        "wan", "diffusion_model.", a_b, lora._convert_non_diffusers_wan_lora_to_diffusers, True, "(?!patch)"
    ),
    "hunyuan_video, ComfyUI": Case(
        # Of the other modules diffusers cuts A, or swaps halves of its rank.
        "hunyuan_video", "diffusion_model.", a_b, lora._convert_hunyuan_video_lora_to_diffusers, True, BLOCKS
    ),
    "qwen_image, kohya": Case(
        "qwen_image", "lora_unet_", down_up, lora._convert_non_diffusers_qwen_lora_to_diffusers, False
    ),
    "z_image, kohya": Case(
        "z_image", "lora_unet_", down_up, lora._convert_non_diffusers_z_image_lora_to_diffusers, False, r"layers\."
    ),
    "lumina2, ComfyUI": Case(
        "lumina2", "diffusion_model.", a_b, lora._convert_non_diffusers_lumina2_lora_to_diffusers, True,
        r"(layers|noise_refiner|context_refiner)\.",
    ),
    "ltx2, ComfyUI": Case("ltx2", "diffusion_model.", a_b, lora._convert_non_diffusers_ltx2_lora_to_diffusers, True),
    "ideogram4, ComfyUI": Case(
        "ideogram4", "diffusion_model.", a_b, lora._convert_non_diffusers_ideogram4_lora_to_diffusers, True,
        r"layers\.",
    ),
    "ideogram4, kohya": Case(
        "ideogram4", "diffusion_model.", down_up, lora._convert_non_diffusers_ideogram4_lora_to_diffusers, True,
        r"layers\.",
    ),
    "krea2, ComfyUI": Case(
        "krea2", "diffusion_model.", a_b, lora._convert_non_diffusers_krea2_lora_to_diffusers, True,
    ),
    "krea2, ai-toolkit": Case(
        "krea2", "base_model.model.", a_b, lora._convert_non_diffusers_krea2_lora_to_diffusers, True,
    ),
    "anima, ComfyUI": Case(
        "cosmos", "diffusion_model.", a_b, lora._convert_non_diffusers_anima_lora_to_diffusers, True, "",
        tuple(conditioner()),
    ),
}  # fmt: skip


def stems_of(case: Case) -> dict[str, tuple[int, int]]:
    """The file's names of modules, with the shapes of the weights."""
    family = families()[BUILDS[case.model][0]]
    found: dict[str, tuple[int, int]] = {}
    shapes = {p: s for p, s in modules(case.model).items() if len(s) > 1 and re.match(case.wanted, p)}
    for path, shape in shapes.items():
        name, rows = path, shape[0]
        if case.original and (named := family.original(path)) is None:
            whole = family.whole(path)
            parts, named = family.parts(whole), family.original(whole)
            rows = sum(modules(case.model)[part][0] for part in parts)
        if case.original:
            name = named[0]
        found[case.prefix + (name.replace(".", "_") if case.prefix.endswith("_") else name)] = (rows, shape[-1])
    return found | dict(case.more)


@pytest.mark.parametrize("name", CASES)
def test_diffusers_gives_the_same_modules_the_same_rows(name: str) -> None:
    case = CASES[name]
    family = families()[BUILDS[case.model][0]]
    stems = stems_of(case)
    found = identify(stems, family=family.name)
    assert not found.unmatched and len(stems) > 10
    state: State = {}
    expected: State = {}
    for i, (stem, (rows, columns)) in enumerate(stems.items()):
        up, named = marked(i, rows), found.modules[stem]
        state |= case.write(stem, torch.ones(1, columns), up)
        parts = family.parts(named.module)
        cut = up.split(family.rows(named.path, rows, columns)) if parts else (up,)
        component = "" if named.component else "transformer."
        expected |= {f"{component}{part}": piece for part, piece in zip(parts or (named.module,), cut, strict=True)}
    converted = {k.removesuffix(".lora_B.weight"): v for k, v in case.convert(state).items() if k.endswith("B.weight")}
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[module], piece) for module, piece in expected.items())
