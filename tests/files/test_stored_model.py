"""A model as a stream: places from headers alone, and rows that are read from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastlora.errors import InputError
from fastlora.files.stored_model import read_stored_model
from fastlora.files.tile_reads import Scratch, TileReads
from tests.builders import gaussian


def tensors() -> dict[str, torch.Tensor]:
    return {
        "model.a.weight": gaussian(7, 5, seed=1, dtype=torch.bfloat16),
        "model.b.weight": gaussian(6, 4, 3, seed=2),
        "model.c.weight": gaussian(9, 2, seed=3, dtype=torch.float16),
        "model.steps": torch.tensor(3),
    }


def write_shards(folder: Path, parts: list[dict[str, torch.Tensor]], *, index: bool = True) -> Path:
    folder.mkdir()
    places = {}
    for i, part in enumerate(parts, 1):
        name = f"model-{i:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / name)
        places |= dict.fromkeys(part, name)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def split(state: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    names = list(state)
    return [{n: state[n] for n in names[:2]}, {n: state[n] for n in names[2:]}]


@pytest.mark.parametrize("form", ["folder", "shards", "no index", "file", "bin", "state dict"])
def test_every_row_is_where_the_plan_says(tmp_path: Path, form: str) -> None:
    state = tensors()
    source: object = tmp_path / "model"
    if form in ("shards", "no index"):
        write_shards(tmp_path / "model", split(state), index=form == "shards")
    elif form == "state dict":
        source = state
    else:
        (tmp_path / "model").mkdir()
        file = tmp_path / "model" / ("pytorch_model.bin" if form == "bin" else "model.safetensors")
        torch.save(state, file) if form == "bin" else save_file(state, file)
        source = file if form == "file" else source
    model = read_stored_model(source)  # type: ignore[arg-type]
    assert {n: (t.shape, t.dtype) for n, t in model.tensors.items()} == {
        n: (tuple(t.shape), t.dtype) for n, t in state.items()
    }
    assert model.size == sum(t.nbytes for t in state.values())
    scratch = Scratch()
    with TileReads() as tiles:
        for name, tensor in state.items():
            stored = model.tensors[name]
            if not tensor.dim():
                assert torch.equal(tiles.rows(stored, 0, 1), tensor)
                continue
            for start in range(0, len(tensor), 3):
                stop = min(start + 3, len(tensor))
                assert torch.equal(tiles.rows(stored, start, stop, scratch), tensor[start:stop])
            assert torch.equal(tiles.rows(stored, 2, 2), tensor[2:2])


def test_names_are_plain_and_the_stored_ones_are_kept(tmp_path: Path) -> None:
    save_file({"model._orig_mod.a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    model = read_stored_model(tmp_path)
    assert {n: t.name for n, t in model.tensors.items()} == {"model.a.weight": "model._orig_mod.a.weight"}


def test_what_a_model_lacks_is_told(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model", split(tensors()))
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    index.write_text(whole.replace("model.steps", "model.stairs"))
    with pytest.raises(InputError, match=r"lacks model\.stairs"):
        read_stored_model(folder)
    index.write_text(whole)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(InputError, match="may be cut off"):
        read_stored_model(folder)
    shard.unlink()
    with pytest.raises(InputError, match="lacks model-00002-of-00002"):
        read_stored_model(folder)


def test_a_file_that_shrinks_is_told(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    model = read_stored_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    last = max(model.tensors.values(), key=lambda t: t.offset)
    with TileReads() as tiles, pytest.raises(InputError, match="shorter than its header says"):
        tiles.rows(last, 0, last.shape[0] if last.shape else 1)


def test_codes_are_known_from_headers(tmp_path: Path) -> None:
    state = {"a.qweight": torch.zeros(4, 4, dtype=torch.int32), "b.weight": torch.ones(2, 2)}
    save_file(state, tmp_path / "model.safetensors")
    model = read_stored_model(tmp_path)
    assert model.coding.refusal("a.weight") == "GPTQ or AWQ"
    assert model.coding.refusal("b.weight") is None
