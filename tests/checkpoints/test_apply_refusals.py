"""Models and adapters that cannot be brought together: one sentence each, and nothing is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from damaged_models import CODED, DAMAGES, Q, quantised, shards
from safetensors.torch import load_file
from stored_models import adapter, llama, model_file

import fastlora as fl
from fastlora.checkpoints import streaming
from fastlora.runtime import system


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


@pytest.mark.parametrize("coded", CODED)
def test_quantised_models(coded: str, tmp_path: Path) -> None:
    """Told by name, with the way out; with another dtype, too, and in the command."""
    folder, name = tmp_path / "base", CODED[coded][2]
    quantised(folder, coded)
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


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models(damage: str, tmp_path: Path) -> None:
    folder, given = shards(tmp_path)
    DAMAGES[damage][0](folder)
    with pytest.raises((fl.InputError, fl.OutputError), match=DAMAGES[damage][1]):
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
