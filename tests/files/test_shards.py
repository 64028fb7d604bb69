"""Which files of a directory are the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastlora as fl
from fastlora.files.checkpoint import read_checkpoint

ONE, TWO = {"a.weight": torch.ones(2, 2)}, {"b.weight": torch.ones(3, 3)}
STALE = {"a.weight": torch.zeros(2, 2), "own.weight": torch.zeros(1)}


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".bin":
        torch.save(dict(tensors), path)
    else:
        save_file(dict(tensors), path)


def index(path: Path, places: object, key: str = "weight_map") -> None:
    path.write_text(json.dumps({"metadata": {}, key: places}))


def assert_is_model(path: Path) -> tuple[str, ...]:
    """The model is the one that is meant; the notes of reading it."""
    found = read_checkpoint(path)
    assert found.tensors.keys() == {"a.weight", "b.weight"}
    assert torch.equal(found.tensors["a.weight"], ONE["a.weight"])
    return found.notes


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("stem", ["model", "pytorch_model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("indexed", [True, False])
def test_shards_beside_other_files(indexed: bool, stem: str, ending: str, tmp_path: Path) -> None:
    if (stem == "model") != (ending == "safetensors") and stem != "diffusion_pytorch_model":
        pytest.skip("no library calls its files so")
    names = [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    for name, tensors in zip(names, (ONE, TWO), strict=True):
        save(tmp_path / name, tensors)
    save(tmp_path / "consolidated.safetensors", STALE)
    save(tmp_path / "optimizer.bin", STALE)
    if indexed:
        index(tmp_path / f"{stem}.{ending}.index.json", {"a.weight": names[0], "b.weight": names[1]})
        save(tmp_path / f"{stem}-00001-of-00001.{ending}", STALE)
        assert_is_model(tmp_path / f"{stem}.{ending}.index.json")
    note = assert_is_model(tmp_path)[0]
    assert "consolidated.safetensors" in note and "beside the model's files, not read" in note


def test_one_file_before_others(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", ONE | TWO)
    save(tmp_path / "pytorch_model.bin", STALE)
    save(tmp_path / "model-00001-of-00002.safetensors", STALE)
    save(tmp_path / "lora_weights.safetensors", STALE)
    notes = assert_is_model(tmp_path)
    assert "lora_weights.safetensors, model-00001-of-00002.safetensors beside" in notes[0]


def test_an_index_before_a_file_that_it_does_not_name(tmp_path: Path) -> None:
    save(tmp_path / "part.safetensors", ONE | TWO | {"unnamed.weight": torch.ones(1)})
    index(tmp_path / "model.safetensors.index.json", dict.fromkeys(["a.weight", "b.weight"], "part.safetensors"))
    save(tmp_path / "model.safetensors", STALE)
    assert "model.safetensors beside" in assert_is_model(tmp_path)[0]


def test_links_of_a_cache_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "blobs" / "one.safetensors", ONE | TWO)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "x.safetensors").symlink_to("../blobs/one.safetensors")
    index(
        tmp_path / "snapshot" / "model.safetensors.index.json", dict.fromkeys(["a.weight", "b.weight"], "x.safetensors")
    )
    assert_is_model(tmp_path / "snapshot")


def refused(path: Path, message: str) -> None:
    with pytest.raises(fl.InputError, match=message):
        read_checkpoint(path)


def test_incomplete_models_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "model-00001-of-00003.safetensors", ONE)
    save(tmp_path / "model-00003-of-00003.safetensors", TWO)
    refused(tmp_path, r"lacks shard number 2 of 3 \(model-…-of-….safetensors\)")
    refused(tmp_path / "model-00001-of-00003.safetensors", "is shard 1 of 3, a part of a model; pass its directory")
    file = tmp_path / "model.safetensors.index.json"
    index(file, {"a.weight": "model-00001-of-00003.safetensors", "b.weight": "model-00002-of-00003.safetensors"})
    refused(tmp_path, "lacks model-00002-of-00003.safetensors, which model.safetensors.index.json names")
    index(file, {"a.weight": "model-00001-of-00003.safetensors", "c.weight": "model-00003-of-00003.safetensors"})
    refused(tmp_path, "model-00003-of-00003.safetensors lacks c.weight, which the index of .* says it holds")
    file.unlink()
    save(tmp_path / "model-00002-of-00003.safetensors", {"c": torch.ones(1)})
    save(tmp_path / "model-00001-of-00002.safetensors", ONE)
    refused(tmp_path, "shards of models in 2 and in 3 files, and no model.safetensors.index.json says which")


def test_shards_of_other_names_are_complete_too(tmp_path: Path) -> None:
    save(tmp_path / "weights.fp16-00001-of-00002.safetensors", ONE)
    refused(tmp_path, "lacks shard number 2 of 2")
    save(tmp_path / "weights.fp16-00002-of-00002.safetensors", TWO)
    assert assert_is_model(tmp_path) == ()


@pytest.mark.parametrize("place", ["../out.safetensors", "/out.safetensors", "sub/out.safetensors", "..", "a\\b"])
def test_an_index_stays_in_its_directory(place: str, tmp_path: Path) -> None:
    save(tmp_path / "out.safetensors", ONE)
    (tmp_path / "model").mkdir()
    index(tmp_path / "model" / "model.safetensors.index.json", {"a.weight": place})
    refused(tmp_path / "model", "which is not in its own directory")


@pytest.mark.parametrize("places", [{}, [], {"a": 1}, None])
def test_damaged_indices_are_refused(places: object, tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", ONE)
    index(tmp_path / "model.safetensors.index.json", places)
    refused(tmp_path, "has no 'weight_map'")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "holds no model.safetensors and no pytorch_model.bin.*pass a model's directory or file")
    (tmp_path / "model_index.json").write_text("{}")
    refused(tmp_path, "pipeline of several models: pass one of its folders")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "model.gguf", "is a GGUF file")
    save(tmp_path / "other.safetensors", ONE)
    save(tmp_path / "another.safetensors", ONE)
    refused(tmp_path, "several files hold 'a.weight'; pass the file that is meant")
    save(tmp_path / "peft" / "model.safetensors", {"q.base_layer.weight": torch.ones(2, 2)})
    refused(tmp_path / "peft", "holds 'q.base_layer.weight', a part of a model with adapters")


def test_wrappers_in_names(tmp_path: Path) -> None:
    for start in ("_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module."):
        state = {start + name: tensor for name, tensor in (ONE | TWO).items()}
        assert read_checkpoint(state).tensors.keys() == {"a.weight", "b.weight"}
    with pytest.raises(fl.InputError, match="two names that differ by wrappers alone"):
        read_checkpoint({"a.weight": torch.ones(1), "_orig_mod.a.weight": torch.ones(1)})
