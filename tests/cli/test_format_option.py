"""Commands on single files: results have the format and names of the first input, unless --format says otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import done, refused
from safetensors.torch import load_file
from tolerances import FLOAT32
from written_files import adapter_of, contents, error

import fastlora as fl

SHAPES = {
    f"{block}.attentions.{i}.transformer_blocks.0.{leaf}": (16, 2048 if leaf == "attn2.to_k" else 16)
    for block in ("down_blocks.1", "up_blocks.0")
    for i in (0, 1)
    for leaf in ("attn1.to_q", "attn2.to_k")
} | {"text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": (12, 12)}
"""By their names and sizes of Stable Diffusion XL."""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two files of kohya's scripts."""
    return tuple(  # type: ignore[return-value]
        adapter_of(SHAPES, "sdxl", style="kohya-original", format="kohya", seed=i, dtype=torch.float16).save(
            tmp_path / f"{name}.safetensors"
        )
        for i, name in enumerate("ab")
    )


def test_merge_writes_a_file_like_the_first(files: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = files
    found = done("merge", f"{a}:0.5", f"{b}:0.5", "--method", "cat", "-o", "c.safetensors", cwd=tmp_path)
    assert found.out.startswith("c.safetensors: 9 modules, rank ")
    assert load_file(a).keys() == load_file(tmp_path / "c.safetensors").keys()
    one, other, merged = fl.load(a), fl.load(b), fl.load(tmp_path / "c.safetensors")
    for module in SHAPES:
        meant = 0.5 * one.delta(module).double() + 0.5 * other.delta(module).double()
        assert error(merged.delta(module), meant) < 1e-3  # rounded to float16
    assert "exists" in refused("merge", a, b, "-o", "c.safetensors", cwd=tmp_path)
    done("merge", a, b, "-o", "c.safetensors", "--overwrite", cwd=tmp_path)
    assert "not written by fastlora" not in done("merge", a, b, "-o", "c.safetensors", "--overwrite", cwd=tmp_path).err


@pytest.mark.parametrize("command", ["merge", "compress", "modulate", "compose"])
def test_a_directory_is_refused_for_a_file(command: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = files
    inputs = {"merge": [a, b], "compress": [a, "--rank", 1], "modulate": [a], "compose": ["a", f"a={a}"]}[command]
    more = ["--op", "reverse"] if command == "modulate" else []
    message = refused(command, *inputs, *more, "-o", "out", cwd=tmp_path)
    assert "change it to out.safetensors, or write a PEFT directory with format='peft' (--format peft)" in message


def test_a_format_and_an_output_that_do_not_fit(files: tuple[Path, Path], tmp_path: Path) -> None:
    a, _ = files
    message = refused("compress", a, "--rank", 1, "--format", "peft", "-o", "out.safetensors", cwd=tmp_path)
    assert "--format peft is written as a directory; change --out out.safetensors" in message
    message = refused("compress", a, "--rank", 1, "--format", "kohya", "-o", "out", cwd=tmp_path)
    assert "--format kohya is written as a file, NAME.safetensors; change --out out" in message
    assert "there is no format 'gguf' to write" in refused("compress", a, "--format", "gguf", "-o", "out", cwd=tmp_path)


def test_decompose_writes_files(files: tuple[Path, Path], tmp_path: Path) -> None:
    done("decompose", *files, "--threshold", 0.5, "-o", "out", "--quiet", cwd=tmp_path)
    out = tmp_path / "out"
    assert {str(p.relative_to(out)) for p in out.rglob("*.*")} == {
        "shared.safetensors", "unique/a.safetensors", "unique/b.safetensors", "report.json"
    }  # fmt: skip
    assert load_file(out / "unique" / "a.safetensors").keys() == load_file(files[0]).keys()
    done("decompose", *files, "--format", "diffusers", "-o", "out", "--overwrite", "--quiet", cwd=tmp_path)
    assert any(key.startswith("unet.") for key in load_file(out / "unique" / "a.safetensors"))


def test_decompose_writes_directories_for_peft(files: tuple[Path, Path], tmp_path: Path) -> None:
    done("decompose", *files, "--format", "peft", "-o", "out", "--quiet", cwd=tmp_path)
    unique = fl.load(tmp_path / "out" / "unique" / "a" / "unet")
    assert set(unique.modules) == {m for m in SHAPES if not m.startswith("text")}
    assert fl.load(tmp_path / "out" / "unique" / "a" / "text_encoder_2").modules


@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfy"])
def test_convert(to: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    found = done("convert", files[0], "--to", to, "--dtype", "float32", "-o", "out.safetensors", cwd=tmp_path)
    assert found.out == "out.safetensors: 9 modules, rank 2–6\n"
    given, made = fl.load(files[0]), fl.load(tmp_path / "out.safetensors")
    assert made.modules and set(made.modules) == set(given.modules)
    assert max(error(made.delta(m), given.delta(m)) for m in given.modules) < FLOAT32
    said = done("convert", files[0], "--to", to, "--json", "-o", "out.safetensors", "--overwrite", cwd=tmp_path).json()
    assert said["modules"] == 9


def test_convert_to_peft_and_back(files: tuple[Path, Path], tmp_path: Path) -> None:
    found = done("convert", files[0], "--to", "peft", "-o", "peft", cwd=tmp_path)
    assert "PEFT adapts one model" in found.err
    done("convert", "peft/unet", "--to", "kohya", "--family", "sdxl", "-o", "back.safetensors", cwd=tmp_path)
    one, other = contents(files[0])[0], contents(tmp_path / "back.safetensors")[0]
    for key in other:
        if "lora_down" in key:
            assert torch.equal(one[key], other[key])


def test_convert_refuses(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert "is an input" in refused("convert", files[0], "--to", "kohya", "-o", files[0], "--overwrite", cwd=tmp_path)
    assert "there is no format 'onnx'" in refused("convert", files[0], "--to", "onnx", "-o", "out", cwd=tmp_path)
    assert "there is no family 'sd99'" in refused(
        "convert", files[0], "--to", "kohya", "--family", "sd99", "-o", "out.safetensors", cwd=tmp_path
    )


def test_a_dora_is_converted(tmp_path: Path) -> None:
    dora = Path(__file__).parents[1] / "data" / "movie_dora"
    found = done("convert", dora, "--to", "peft", "-o", "out", cwd=tmp_path)
    given, made = fl.load(dora), fl.load(tmp_path / "out")
    assert f"DoRA, {len(given.updates)} modules, {len(given.magnitudes)} with magnitudes" in found.out
    assert all(torch.equal(made.magnitude(m), given.magnitude(m)) for m in given.magnitudes)
    said = done("convert", dora, "--to", "peft", "--json", "-o", "out", "--overwrite", cwd=tmp_path).json()
    assert said["kind"] == "DoRA" and said["modules"] == len(given.updates)
    refused("convert", dora, "--to", "peft", "--uniform-rank", "-o", "wide", cwd=tmp_path)
