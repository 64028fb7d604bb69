"""Models and adapters that cannot be brought together: one sentence each, and nothing is left."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_models import adapter, llama, model_file
from torch import Tensor

import fastlora as fl
from fastlora.checkpoints import streaming
from fastlora.runtime import system

Q = "model.layers.0.self_attn.q_proj"


def test_refusals(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    model_file(file, {"l.0.self_attn.q_proj.weight": (8, 8), "l.0.self_attn.k_proj.weight": (8, 8)})
    right, out = adapter("x", {"l.0.self_attn.q_proj": (8, 8)}), tmp_path / "out.safetensors"
    for given, message in (
        (adapter("x", {"l.0.other": (8, 8)}), "does not have; the nearest names"),
        (adapter("x", {"l.0.self_attn.q_proj": (8, 9)}), "another base model"),
    ):
        with pytest.raises(fl.InputError, match=message):
            fl.apply(file, given, out)
    with pytest.raises(fl.OutputError, match=r"NAME\.safetensors"):
        fl.apply(file, right, tmp_path / "folder")
    with pytest.raises(fl.OutputError, match="exists"):
        fl.apply(file, right, file)
    with pytest.raises(fl.InputError, match="not finite"):
        fl.apply(file, {"x": float("nan")}, out, pool={"x": right})
    broken = adapter("x", {"l.0.self_attn.q_proj": (8, 8)})
    broken.updates["l.0.self_attn.q_proj"].A.terms[0].source[0, 0] = torch.nan
    with pytest.raises(fl.InputError, match="NaN or Inf"):
        fl.apply(file, broken, out)
    content = file.read_bytes()
    file.write_bytes(content[:-40])
    with pytest.raises(fl.InputError):
        fl.apply(file, right, out)
    assert not list(tmp_path.glob(".*")) and not out.exists()


def test_tied_matrices_and_missing_shards(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    with pytest.raises(fl.InputError, match="ties to"):
        fl.apply(tmp_path / "base", adapter("x", {"lm_head": (50, 32)}), tmp_path / "out")
    right = adapter("x", {"model.layers.0.self_attn.q_proj": (32, 32)})
    next(iter((tmp_path / "base").glob("*.safetensors"))).unlink()
    with pytest.raises(fl.InputError, match=r"shard|missing|not there"):
        fl.apply(tmp_path / "base", right, tmp_path / "out")
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "out").exists()


FLOAT8 = torch.float8_e4m3fn
CODED: dict[str, tuple[dict[str, Tensor], dict[str, object], str]] = {
    "gptq": (
        {"qweight": torch.zeros(1, 8, dtype=torch.int32), "qzeros": torch.zeros(1, 1, dtype=torch.int32),
         "scales": torch.ones(1, 8).half(), "g_idx": torch.zeros(8, dtype=torch.int32)},
        {"quant_method": "gptq", "bits": 4}, "GPTQ",
    ),
    "awq": (
        {"qweight": torch.zeros(8, 1, dtype=torch.int32), "qzeros": torch.zeros(1, 1, dtype=torch.int32),
         "scales": torch.ones(1, 8).half()},
        {"quant_method": "awq", "bits": 4}, "AWQ",
    ),
    "bitsandbytes, 4 bit": (
        {"weight": torch.zeros(32, 1, dtype=torch.uint8), "weight.absmax": torch.zeros(1),
         "weight.quant_map": torch.zeros(16),
         "weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)},
        {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bit",
    ),
    "bitsandbytes, 8 bit": (
        {"weight": torch.zeros(8, 8, dtype=torch.int8), "SCB": torch.ones(8)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bit",
    ),
    "fp8 with block scales": (
        {"weight": torch.ones(8, 8).to(FLOAT8), "weight_scale_inv": torch.ones(1, 1)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]}, "float8 with a scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("coded", CODED)
def test_quantised_models(coded: str, tmp_path: Path) -> None:
    """Told by name, with the way out; with another dtype, too, and in the command."""
    tensors, quantisation, name = CODED[coded]
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({f"{Q}.{n}": t for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantisation}))
    given = adapter("x", {Q: (8, 8)})
    with pytest.raises(fl.InputError, match=f"is quantised .*{name}.* Merge the adapters into one") as found:
        fl.apply(folder, given, tmp_path / "out")
    assert Q in str(found.value)
    with pytest.raises(fl.InputError, match="is quantised"):
        fl.apply(folder, given, tmp_path / "out", dtype="bfloat16")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_other_files_of_models(tmp_path: Path) -> None:
    given, out = adapter("x", {Q: (8, 8)}), tmp_path / "out.safetensors"
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    torch.save({f"{Q}.weight": torch.zeros(8, 8)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "folder").mkdir()
    torch.save({f"{Q}.weight": torch.zeros(8, 8)}, tmp_path / "folder" / "pytorch_model.bin")
    for base, message in (
        ("model.gguf", "GGUF file, whose weights are quantised"),
        ("pytorch_model.bin", "save it again as safetensors"),
        ("nothing", "no file or directory"),
    ):
        with pytest.raises(fl.InputError, match=message):
            fl.apply(tmp_path / base, given, out)
    with pytest.raises(fl.InputError, match="save it again as safetensors"):
        fl.apply(tmp_path / "folder", given, tmp_path / "out")
    assert not out.exists() and not list(tmp_path.glob(".*"))


def shards(tmp_path: Path) -> tuple[Path, fl.Adapter]:
    folder = tmp_path / "base"
    folder.mkdir()
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    places = {f"{name}.weight": f"model-0000{i + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for name, file in places.items():
        model_file(folder / file, {name: (8, 8)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder, adapter("x", dict.fromkeys(names, (8, 8)))


def missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def absent_tensor(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def file_elsewhere(folder: Path) -> None:
    text = (folder / "model.safetensors.index.json").read_text()
    (folder / "model.safetensors.index.json").write_text(text.replace("model-00002", "../model-00002"))


def cut_off(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def other_shape(folder: Path) -> None:
    model_file(folder / "model-00002-of-00002.safetensors", {"model.layers.1.self_attn.q_proj.weight": (8, 10)})


def false_shape(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes().replace(b"[8,8]", b"[8,9]"))


def no_numbers(folder: Path) -> None:
    save_file(
        {"model.layers.1.self_attn.q_proj.weight": torch.full((8, 8), torch.nan)},
        folder / "model-00002-of-00002.safetensors",
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_shard, "lacks model-00002-of-00002.safetensors"),
        (absent_tensor, "lacks model.norm.weight"),
        (file_elsewhere, "not in its own directory"),
        (cut_off, "cut off"),
        (other_shape, "of another base model"),
        (false_shape, "no readable safetensors file"),
        (no_numbers, "would hold NaN or infinity"),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_damaged_models(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder, given = shards(tmp_path)
    damage(folder)
    with pytest.raises((fl.InputError, fl.OutputError), match=message):
        fl.apply(folder, given, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_model_that_is_cut_off_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, given = shards(tmp_path)
    do = streaming.do

    def cutting(*arguments: object) -> None:
        for file in folder.glob("*.safetensors"):
            os.truncate(file, 100)
        do(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(streaming, "do", cutting)
    with pytest.raises(fl.InputError, match="shorter than its header says"):
        fl.apply(folder, given, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_full_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before any work where the system can tell; later, what is finished stays for another run."""
    folder, given = shards(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(system.os, "posix_fallocate", full)
        with pytest.raises(fl.OutputError, match="the disk is full; free some space"):
            fl.apply(folder, given, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    do, calls = streaming.do, []

    def filling(*arguments: object) -> None:
        calls.append(1)
        if len(calls) > 1:
            full()
        do(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(streaming, "do", filling)
        with pytest.raises(fl.OutputError, match="the disk is full"):
            fl.apply(folder, given, tmp_path / "out")
    assert (tmp_path / ".out.unfinished").exists() and not (tmp_path / "out").exists()
    fl.apply(folder, given, tmp_path / "out", resume=True)
    fl.apply(folder, given, tmp_path / "whole")
    for file in folder.glob("*.safetensors"):
        a, b = (load_file(tmp_path / f / file.name) for f in ("out", "whole"))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_read_only_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, given = shards(tmp_path)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", read_only)
        with pytest.raises(fl.OutputError, match="read-only; write elsewhere"):
            fl.apply(folder, given, tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(fl.OutputError, match="is not writable; write elsewhere"):
        fl.apply(folder, given, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
