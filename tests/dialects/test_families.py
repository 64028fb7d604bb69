"""The names of each family against the modules of diffusers' own models."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers_models import BUILDS, ENCODERS, modules, weighted

from fastlora.dialects.encoders import CLIP, T5
from fastlora.dialects.families import families, family_named
from fastlora.dialects.family import Family, found
from fastlora.dialects.patterns import ANY, Table, filled

FAMILIES = families()
OPTIONAL = (".conv_shortcut", ".caption_projection", "vace_blocks.#.attn2.")
"""Modules that only other configurations of a model have: a shortcut where a level changes its width, …"""


def flat(path: str) -> str:
    return path.replace(".", "_")


def columns(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[-1]


@pytest.mark.parametrize("model", BUILDS)
def test_every_module_of_a_model_has_its_names(model: str) -> None:
    family = FAMILIES[BUILDS[model][0]]
    for path, shape in modules(model).items():
        for named in (family.canonical(path), family.from_flat(flat(path))):
            assert named is not None and (named.module, named.original, named.swapped) == (path, False, False)
        original = family.original(path, columns(shape))
        if original is not None:
            dotted, swapped = original
            for named in (family.canonical(dotted, columns(shape)), family.from_flat(flat(dotted), columns(shape))):
                assert named is not None and (named.path, named.swapped) == (path, swapped)
                assert named.original == (flat(dotted) != flat(path))


@pytest.mark.parametrize("model", BUILDS)
def test_parts_of_a_fused_projection_are_modules_of_the_model(model: str) -> None:
    family, own = FAMILIES[BUILDS[model][0]], modules(model)
    wholes = {whole for path in own for whole in family.wholes(path)}
    assert wholes or not family.fused
    for whole in wholes:
        parts = family.parts(whole)
        assert parts is not None and set(parts) <= own.keys() and len({own[p][1] for p in parts}) == 1
        lengths = tuple(own[part][0] for part in parts)
        assert family.rows(whole, sum(lengths), own[parts[0]][1]) == lengths
        assert all(whole in family.wholes(part) for part in parts)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_table_has_no_module_that_no_model_has(name: str) -> None:
    family = FAMILIES[name]
    met = {
        known.pattern
        for model, (of, _) in BUILDS.items()
        if of == name
        for path in modules(model)
        if (known := found(family, path, False))
    }
    extra = [p for p in family.names if p not in met and p not in family.fused]
    assert not [p for p in extra if not any(optional in f".{p}" for optional in OPTIONAL)]


def spelled(table: Table, family: Family) -> dict[str, set[str]]:
    """All flat names that a family knows, of blocks 0 to 12, and what they stand for."""
    meant: dict[str, set[str]] = {}
    rows = [*family.names.items(), *((also, canonical) for also, canonical in family.also_read.items())]
    for i in range(13):
        for canonical, original in rows:
            target = family.also_read.get(canonical, canonical)
            for text in {canonical, original} - {""} - (set() if canonical in family.names else {original}):
                path = filled(text, [str(i)] * text.count(ANY))
                meant.setdefault(flat(path), set()).add(filled(target, [str(i)] * target.count(ANY)))
    return meant


@pytest.mark.parametrize("name", FAMILIES)
def test_no_two_modules_have_one_flat_name(name: str) -> None:
    family = FAMILIES[name]
    meant = spelled(family.table, family)
    assert not {text: targets for text, targets in meant.items() if len(targets) > 1}
    assert all(family.from_flat(text).path == next(iter(targets)) for text, targets in meant.items())


def test_text_encoders_have_the_names_of_transformers() -> None:
    for path in weighted(ENCODERS["clip"]):
        written = path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"
        for known in (CLIP.dotted(path), CLIP.dotted(written), CLIP.flat(flat(written))):
            assert known is not None and known.path == written
    for path in weighted(ENCODERS["t5"]):
        for known in (T5.dotted(path), T5.flat(flat(path))):
            assert known is not None and known.path == path


def test_the_conditioner_of_anima_has_its_names() -> None:
    ((component, table),) = FAMILIES["cosmos"].text_encoders["text_conditioner"]
    assert component == "text_conditioner"
    for path in weighted(ENCODERS["conditioner"]):
        assert table.dotted(path).path == table.flat(flat(path)).path == path


@pytest.mark.parametrize(
    "text",
    [
        "double_blocks_00_img_attn_qkv",
        "double_blocks_01_img_attn_qkv",
        "double_blocks__img_attn_qkv",
        "double_blocks_#_img_attn_qkv",
        "double_blocks_12345_img_attn_qkv",
        "double_blocks_1_img_attn_qkv_",
        "_double_blocks_1_img_attn_qkv",
        "double.blocks.1.img.attn.qkv",
        "double_blocks_1_img_mlp_1",
        "double_blocks_²_img_attn_qkv",
        "double_blocks_-1_img_attn_qkv",
        "",
    ],
)
def test_damaged_names_are_no_names(text: str) -> None:
    flux = FAMILIES["flux"]
    assert flux.from_flat("double_blocks_1_img_attn_qkv") is not None
    assert flux.from_flat(text) is None and flux.canonical(text) is None


def test_the_flat_spelling_is_none_of_dotted_names() -> None:
    flux = FAMILIES["flux"]
    assert flux.canonical("double_blocks.1.img_attn.qkv") is not None
    assert flux.canonical("double_blocks_1_img_attn_qkv") is None


def test_halves_are_swapped_only_where_the_original_code_has_them_so() -> None:
    sd3, last = FAMILIES["sd3"], "joint_blocks.23.context_block.adaLN_modulation.1"
    assert sd3.canonical(last, (2 * 1536, 1536)).swapped and not sd3.canonical(last, (6 * 1536, 1536)).swapped
    assert sd3.original("transformer_blocks.23.norm1_context.linear", (3072, 1536)) == (last, True)
    assert FAMILIES["flux"].original("norm_out.linear") == ("final_layer.adaLN_modulation.1", True)
    assert FAMILIES["flux"].canonical("norm_out.linear") is not None
    assert not FAMILIES["flux"].canonical("norm_out.linear").swapped


def test_rows_that_cannot_be_cut_are_none() -> None:
    flux, lumina = FAMILIES["flux"], FAMILIES["lumina2"]
    assert flux.rows("transformer_blocks.0.attn.to_qkv", 9217, 3072) is None
    assert flux.rows("single_transformer_blocks.0.attn.to_qkv_mlp_proj", 9216, 3072) is None
    assert flux.rows("transformer_blocks.0.attn.to_q", 3072, 3072) is None
    assert lumina.rows("layers.0.attn.to_qkv", 3840, 2304) == (2304, 768, 768)
    assert lumina.rows("layers.0.attn.to_qkv", 2304, 2304) is None


def test_single_blocks_of_flux2_have_no_parts() -> None:
    assert FAMILIES["flux2"].parts("single_transformer_blocks.0.attn.to_qkv_mlp_proj") is None
    assert FAMILIES["flux"].whole("single_transformer_blocks.0.proj_mlp") == (
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    )


def test_families_have_other_names() -> None:
    assert family_named("sd2") is FAMILIES["sd15"] and family_named("kontext") is FAMILIES["flux"]
    assert family_named("sd9") is None
    names = [alias for family in FAMILIES.values() for alias in (family.name, *family.aliases)]
    assert len(names) == len(set(names))


def test_the_documentation_lists_every_family() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    section = page.partition("\n## Families of image and video models\n")[2].partition("\n## ")[0]
    cells = [row.split(" | ")[0] for row in section.splitlines() if row.startswith("| `")]
    assert sorted(name.strip("|` ") for cell in cells for name in cell.split(",")) == sorted(FAMILIES)
