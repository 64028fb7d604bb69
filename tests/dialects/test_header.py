"""What the header of a written file says: facts of the inputs that hold, facts of the file, hashes of its tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from written_files import adapter_of, contents

import fastlora as fl
from fastlora.dialects.header import PRIVATE
from fastlora.files.earlier import is_ours

SHAPES = {f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn1.to_{n}": (640, 640) for i in (1, 2) for n in "qkv"}
GIVEN = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_training_comment": "ä café",
    "ss_network_dim": "128",
    "ss_network_args": '{"conv_dim": 4}',
    "ss_output_name": "before",
    "modelspec.title": "before",
    "modelspec.date": "2001-01-01T00:00:00",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.hash_sha256": "0xabc",
    "sshs_model_hash": "f" * 64,
    "sshs_legacy_hash": "f" * 8,
    **{key: "private" for key in PRIVATE},
}


def written(tmp_path: Path, name: str = "tiny", **more: str) -> Path:
    adapter = adapter_of(
        SHAPES, "sdxl", style="kohya-original", format="kohya", metadata=GIVEN | more, ranks=(200, 100), scales=(0.5,)
    )
    return adapter.save(tmp_path / f"{name}.safetensors")


def test_facts_are_kept_and_brought_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    file = written(tmp_path)
    _, found = contents(file)
    assert found["ss_base_model_version"] == "sdxl_base_v1-0" and found["ss_training_comment"] == "ä café"
    assert found["ss_network_module"] == "networks.lora" and "ss_network_args" not in found
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert found["ss_output_name"] == found["modelspec.title"] == "tiny"
    assert found["modelspec.date"] == "1970-01-02T00:00:00"
    assert "modelspec.hash_sha256" not in found and found["format"] == "pt"
    assert not PRIVATE & found.keys()
    assert is_ours(file) and json.loads(found["fastlora"])["provenance"]


def test_private_facts_are_kept_on_request(tmp_path: Path) -> None:
    adapter = adapter_of(SHAPES, "sdxl", style="kohya-original", format="kohya", metadata=GIVEN)
    kept = fl.convert(adapter, tmp_path / "kept.safetensors", "kohya", keep_private=True)
    left = fl.convert(adapter, tmp_path / "left.safetensors", "kohya")
    assert contents(kept)[1].keys() >= PRIVATE and not contents(left)[1].keys() & PRIVATE


def test_a_sum_keeps_what_all_agree_on(tmp_path: Path) -> None:
    one, other = (fl.load(written(tmp_path, str(i), ss_seed=str(i)), family="sdxl") for i in (1, 2))
    _, found = contents((one + other).save(tmp_path / "sum.safetensors"))
    assert "ss_seed" not in found and found["ss_base_model_version"] == "sdxl_base_v1-0"


def test_other_formats_do_not_get_facts_of_kohyas(tmp_path: Path) -> None:
    adapter = adapter_of(SHAPES, "sdxl", metadata={"software": "{}"})
    _, found = contents(adapter.save(tmp_path / "tiny.safetensors", format="diffusers"))
    assert not any(key.startswith(("ss_", "sshs_", "modelspec")) for key in found) and found["software"] == "{}"


def test_hashes_are_those_of_kohyas_scripts(tmp_path: Path) -> None:
    file = written(tmp_path)
    tensors, metadata = contents(file)
    raw = file.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert len(data) > 1 << 20
    # sd-scripts hashes a part of a file in memory that holds the ss_ facts alone.
    facts = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    whole = safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()}, facts)
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]


def test_hashes_of_a_small_file(tmp_path: Path) -> None:
    stale = {"sshs_legacy_hash": "f" * 8}
    adapter = adapter_of({next(iter(SHAPES)): (640, 640)}, "sdxl", metadata=stale)
    _, metadata = contents(adapter.save(tmp_path / "tiny.safetensors", format="kohya"))
    assert metadata["sshs_legacy_hash"] == "e3b0c442"
    both = adapter + adapter_of({next(iter(SHAPES)): (640, 640)}, "sdxl", metadata=stale, seed=1)
    _, metadata = contents(both.save(tmp_path / "sum.safetensors", format="kohya"))
    assert metadata["sshs_legacy_hash"] == "e3b0c442"


def test_files_without_hashes_get_none(tmp_path: Path) -> None:
    shapes = {next(iter(SHAPES)): (640, 640)}
    plain = adapter_of(shapes, "sdxl")
    _, metadata = contents(plain.save(tmp_path / "tiny.safetensors", format="kohya"))
    both = plain + adapter_of(shapes, "sdxl", metadata={"sshs_legacy_hash": "f" * 8}, seed=1)
    _, of_both = contents(both.save(tmp_path / "sum.safetensors", format="kohya"))
    assert not any(key.startswith("sshs_") for key in (*metadata, *of_both))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_safetensors_library_reads_what_is_written(dtype: str, tmp_path: Path) -> None:
    adapter = adapter_of(SHAPES, "sdxl")
    file = adapter.save(tmp_path / "tiny.safetensors", format="kohya", dtype=dtype)
    tensors = safetensors.torch.load_file(file)
    assert {str(t.dtype)[6:] for key, t in tensors.items() if not key.endswith("alpha")} == {dtype}
    assert all(torch.isfinite(t).all() for t in tensors.values())
