"""``fastlora check`` as a user runs it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from builders import gaussian
from command import done, refused, run
from rich.cells import cell_len
from safetensors.torch import save_file

PREFIX = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_"
SD15 = {"ss_base_model_version": "sd_v1"}


def save(folder: Path, alphas: dict[str, float | None], prefix: str = PREFIX, metadata: dict[str, str] = SD15) -> Path:
    """A file of kohya's scripts with these alphas by module; all ranks are 4."""
    tensors = {}
    for i, (module, alpha) in enumerate(alphas.items()):
        tensors[f"{prefix}{module}.lora_down.weight"] = gaussian(4, 8, seed=2 * i)
        tensors[f"{prefix}{module}.lora_up.weight"] = gaussian(8, 4, seed=2 * i + 1)
        if alpha is not None:
            tensors[f"{prefix}{module}.alpha"] = torch.tensor(alpha)
    save_file(tensors, folder / "lora.safetensors", metadata)
    return folder / "lora.safetensors"


@pytest.fixture
def one_alpha(tmp_path: Path) -> Path:
    return save(tmp_path, {"to_q": 2.0, "to_k": 2.0, "to_v": 2.0})


@pytest.fixture
def alphas(tmp_path: Path) -> Path:
    return save(tmp_path, {"to_q": 2.0, "to_k": 1.0, "to_v": 2.0, "to_out_0": 8.0})


def test_a_file_that_all_read_alike_ends_with_0(one_alpha: Path) -> None:
    found = done("check", one_alpha.name, cwd=one_alpha.parent)
    assert "Stable Diffusion 1 or 2, 3 modules" in found.out and found.out.count("right") == 3
    assert "way out" not in found.out and not found.err


def test_findings_end_with_1(alphas: Path) -> None:
    found = run("check", alphas.name, cwd=alphas.parent)
    assert found.code == 1 and not found.err
    text = " ".join(found.out.split())
    assert "2 of 4 scaled otherwise (× 2, 0.25): it gives the module an alpha of 2, the most common one" in text
    assert "`fastlora convert lora.safetensors --to kohya --out FILE.safetensors`" in text
    assert done("check", alphas.name, "--for", "comfy, sd-scripts", cwd=alphas.parent).code == 0
    assert run("check", alphas.name, "--quiet", cwd=alphas.parent).out == ""


def test_json_has_every_finding(alphas: Path) -> None:
    found = run("check", alphas.name, "--json", "--for", "diffusers", cwd=alphas.parent)
    data = found.json()
    assert found.code == 1 and data["clean"] is False and data["family"] == "sd15" and data["modules"] == 4
    (reader,) = data["readers"].values()
    assert (reader["verdict"], reader["read"], reader["scaled"], reader["lost"]) == ("differs", 2, 2, 0)
    by_key = {
        f["key"].removeprefix(PREFIX): (f["factor"], f["scale_meant"], f["scale_read"]) for f in reader["findings"]
    }
    assert by_key == {"to_k": (2.0, 0.25, 0.5), "to_out_0": (0.25, 2.0, 0.5)}
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
    assert module in {f["module"] for f in reader["findings"]}


def test_csv_and_all_have_every_module(alphas: Path) -> None:
    found = run("check", alphas.name, "--csv", "x.csv", "--all", cwd=alphas.parent, env={"COLUMNS": "160"})
    table = found.out.partition("\ndiffusers:\n")[2]
    assert [f"{PREFIX}{name}" in table for name in ("to_q", "to_k", "to_v", "to_out_0")] == [False, True, False, True]
    with (alphas.parent / "x.csv").open(newline="", encoding="utf-8") as file:
        heading, *rows = csv.reader(file)
    assert heading[:5] == ["reader", "module", "key", "fault", "factor"]
    assert [(row[0], row[2].removeprefix(PREFIX), float(row[4])) for row in rows] == [
        ("diffusers", "to_k", 2.0),
        ("diffusers", "to_out_0", 0.25),
    ]


@pytest.mark.parametrize("width", [60, 80, 140])
def test_it_fits_the_terminal_and_shows_names_escaped(width: int, tmp_path: Path) -> None:
    save(tmp_path, {"to_q": 2.0, "to_k": 1.0}, metadata=SD15)
    (tmp_path / "lora.safetensors").rename(tmp_path / "a\x1b[31mb.safetensors")
    found = run("check", "a\x1b[31mb.safetensors", "--all", cwd=tmp_path, env={"COLUMNS": str(width)})
    assert "\x1b" not in found.out and "a\\x1b[31mb.safetensors" in found.out
    lines = [line for line in found.out.splitlines() if max(map(len, line.split()), default=0) < 41]
    assert max(map(cell_len, lines)) <= width and len(lines) > 8


def test_what_is_refused_ends_with_2(one_alpha: Path, tmp_path: Path) -> None:
    assert "no rules for a reader 'comfyui'" in refused("check", one_alpha, "--for", "comfyui", cwd=tmp_path)
    assert "there is no family 'sd9'" in refused("check", one_alpha, "--family", "sd9", cwd=tmp_path)
    path = save(tmp_path, {"attn_add_q_proj": 2.0}, "lora_unet_transformer_blocks_3_", {})
    assert "--family" in refused("check", path, cwd=tmp_path)
    path = save(tmp_path, {"somewhere": 2.0}, "lora_unet_nowhere_", {})
    assert "'lora_unet_nowhere_somewhere" in refused("check", path, cwd=tmp_path)
    one_alpha.write_bytes(b"\xff" * 40)
    assert "no readable safetensors file" in refused("check", one_alpha, cwd=tmp_path)


def test_inspect_tells_of_the_file_too(alphas: Path) -> None:
    found = done("inspect", alphas, cwd=alphas.parent)
    assert "file: kohya (kohya-diffusers), for Stable Diffusion 1 or 2" in found.out
    data = done("inspect", alphas, "--json", cwd=alphas.parent).json()
    assert data["file"]["alphas"] == {"2": 2, "1": 1, "8": 1} and data["file"]["ranks"] == {"4": 4}
    assert data["file"]["adapted"]["denoiser"]["kinds"] == {"attention": 4} and data["file"]["odd"] == []
