"""All operations on single files: each of two files of one kind, against dense sums of what the files mean.

Convolutions, text encoders, ragged ranks, fused projections and modules that one file lacks are among them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastlora as fl
from tests.builders import gaussian
from tests.cli.command import done, refused
from tests.dialects.files import ALPHAS, CASES, DIALECTS, Sample, sample
from tests.tolerances import SUMS32

Dense = dict[str, Tensor]
# Every format, and every family once.
CHOSEN = [
    ("sd15", "kohya, names of diffusers"),
    ("sdxl", "kohya, original names"),
    ("sd15", "component, older"),
    ("sdxl", "component"),
    ("sd15", "diffusion_model, down and up"),
    ("flux", "kohya, original names"),
    ("flux2", "diffusion_model, A and B"),
    ("sd3", "component"),
    ("wan", "lycoris_"),
    ("hunyuan_video", "kohya, original names"),
    ("qwen_image", "without a prefix"),
    ("z_image", "lora_transformer_"),
    ("ltx_video", "diffusion_model, down and up"),
]


def pair(family: str, dialect: str, folder: Path) -> tuple[list[Path], list[Sample]]:
    """Two files of one model: other ranks and alphas, and the second lacks a module."""
    first = sample(family, dialect, ALPHAS["half the rank"], (2, 4, 3))
    second = sample(family, dialect, ALPHAS["each its own"], (3, 1))
    lost = next(iter(second.stems))
    stem = second.stems[lost]
    second.tensors = {k: 0.5 * t if k.endswith(DIALECTS[dialect].B) else t for k, t in second.tensors.items()}
    second.tensors = {k: t for k, t in second.tensors.items() if not k.startswith(f"{stem}.")}
    second.meaning = {m: 0.5 * d for m, d in second.meaning.items() if m != lost}
    files = [first, second]
    return [f.save(folder / f"{name}.safetensors") for f, name in zip(files, "ab", strict=True)], files


def same(adapter: fl.Adapter, meant: Dense) -> None:
    assert set(adapter.updates) == set(meant)
    for module, delta in meant.items():
        bound = SUMS32 * max(float(delta.abs().max()), 1e-3)
        torch.testing.assert_close(adapter.delta(module).double(), delta, rtol=0, atol=bound)


def total(meant: list[Dense], weights: tuple[float, float]) -> Dense:
    modules = dict.fromkeys(m for one in meant for m in one)
    zero = torch.zeros((), dtype=torch.float64)
    return {m: sum((w * one.get(m, zero) for w, one in zip(weights, meant, strict=True)), zero) for m in modules}


@pytest.mark.parametrize(("family", "dialect"), CHOSEN)
def test_operations(family: str, dialect: str, tmp_path: Path) -> None:
    assert (family, dialect) in CASES
    paths, files = pair(family, dialect, tmp_path)
    operations(paths, [file.meaning for file in files], tmp_path / "c.safetensors", family)


def test_operations_on_folders_of_mlx(tmp_path: Path) -> None:
    query, up = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    meant, paths = list[Dense](), list[Path]()
    for i, modules in enumerate(((query, up), (query,))):
        made = fl.Adapter.from_tensors(
            {m: (gaussian(16, 2 + i, seed=i), gaussian(2 + i, 12, seed=9 + i), 20.0) for m in modules}, name=f"m{i}"
        )
        meant.append({m: made.delta(m).double() for m in modules})
        paths.append(fl.convert(made, tmp_path / f"m{i}", "mlx"))
    operations(paths, meant, tmp_path / "c", None)
    assert (tmp_path / "c" / "adapters.safetensors").exists()


def test_operations_on_files_of_xlabs(tmp_path: Path) -> None:
    """The format has the attentions of some blocks of Flux alone, without alphas."""
    fused, out = "transformer_blocks.0.attn.to_qkv", "transformer_blocks.1.attn.to_out.0"
    shapes = {fused: (96, 32), out: (32, 32)}
    meant, paths = list[Dense](), list[Path]()
    for i, modules in enumerate(((fused, out), (fused,))):
        made = fl.Adapter.from_tensors(
            {
                m: (gaussian(shapes[m][0], 2 + i, seed=i), gaussian(2 + i, shapes[m][1], seed=9 + i), 1.0)
                for m in modules
            },
            name=f"x{i}",
        )
        meant.append({m: made.delta(m).double() for m in modules})
        paths.append(made.save(tmp_path / f"x{i}.safetensors", format="xlabs"))
    operations(paths, meant, tmp_path / "c.safetensors", "flux")


def operations(paths: list[Path], meant: list[Dense], out: Path, family: str | None) -> None:
    """All operations on two adapters, the second of which lacks a module."""
    pool = fl.Pool.load(paths, family=family)
    first, second = pool.adapters
    written = (0.7 * first - second).save(out)
    same(fl.load(written, family=family), total(meant, (0.7, -1.0)))
    merged = fl.merge(pool, method="cat", weights={first.name: 0.3, second.name: 0.7})
    same(merged, total(meant, (0.3, 0.7)))
    same(fl.compose("x + 2 * y", {"x": first, "y": second}), total(meant, (1.0, 2.0)))
    small = fl.compress(first, 1)
    for module, delta in meant[0].items():
        s = torch.linalg.svdvals(delta)
        found = small.delta(module).double()
        assert small.updates[module].rank == 1
        assert abs(float(found.norm() - s[0])) <= SUMS32 * float(s[0])
    parts = fl.decompose(pool, threshold=0.8)
    for i, name in enumerate(pool.names):
        shared, unique = parts.shared_of(name), parts.unique_of(name)
        for module, delta in meant[i].items():
            both = sum(x.delta(module).double() for x in (shared, unique) if module in x)
            torch.testing.assert_close(both, delta, rtol=0, atol=SUMS32 * float(delta.abs().max()))
    assert fl.overlap(pool) is not None
    changed = fl.modulate(first, fl.dipm.scale(0.5))
    for module in meant[0]:
        assert changed.delta(module).isfinite().all()


@pytest.mark.parametrize(("family", "dialect"), CHOSEN[:2])
def test_commands(family: str, dialect: str, tmp_path: Path) -> None:
    _, files = pair(family, dialect, tmp_path)
    names = ("a.safetensors", "b.safetensors")
    same(fl.load(tmp_path / "a.safetensors"), files[0].meaning)
    assert "modules" in done("inspect", names[0], cwd=tmp_path).out
    done("merge", *names, "--family", family, "--out", "out.safetensors", cwd=tmp_path)
    done("overlap", *names, cwd=tmp_path)
    assert "there is no family" in refused("inspect", names[0], "--family", "no", cwd=tmp_path)


def test_reading_at_a_rank_on_the_command_line(tmp_path: Path) -> None:
    file = sample("sd15", "kohya, names of diffusers", text=False)
    key = "lora_unet_time_embedding_linear_2"
    file.tensors |= {f"{key}.lokr_w1": torch.randn(16, 16), f"{key}.lokr_w2": torch.randn(20, 20)}
    file.save(tmp_path / "style.safetensors")
    assert "--read-rank 64" in refused("inspect", "style.safetensors", cwd=tmp_path)
    assert "cut to rank 8" in done("overlap", "style.safetensors", "x=style.safetensors", "--read-rank", "8",
                                   cwd=tmp_path).err  # fmt: skip
    done("compress", "style.safetensors", "--rank", "4", "--out", "small.safetensors", cwd=tmp_path)
    assert fl.load(tmp_path / "small.safetensors").updates["time_embedding.linear_2"].rank == 4
    done("compose", "s", "s=style.safetensors", "--read-rank", "8", "--out", "composed.safetensors", cwd=tmp_path)


def test_dialects_mix_in_a_pool(tmp_path: Path) -> None:
    """Modules agree, whatever the files call them; also a linear one against a convolution of kernel 1."""
    paths, files = [], []
    for i, dialect in enumerate(("kohya, original names", "component", "diffusion_model, down and up")):
        file = sample("sd15", dialect, ranks=(i + 1,), text=False)
        files.append(file)
        if i == 1:
            file.tensors = {k: t.flatten(1) if t.shape[2:] == (1, 1) else t for k, t in file.tensors.items()}
        paths.append(file.save(tmp_path / f"{i}.safetensors"))
    pool = fl.Pool.load(paths)
    merged = fl.merge(pool, method="cat", weights=dict(zip(pool.names, (1.0, 2.0, 3.0), strict=True)))
    meant = {m: sum(w * f.meaning[m] for w, f in zip((1, 2, 3), files, strict=True)) for m in files[0].meaning}
    same(merged, meant)
    form = merged.base.form
    assert form is not None and (form.format, form.style) == ("kohya", "kohya-original")
    folder = (1.0 * fl.load(paths[1])).save(tmp_path / "peft", format="peft")
    assert set(fl.Pool.load([paths[0], folder]).modules) == set(files[0].meaning)
