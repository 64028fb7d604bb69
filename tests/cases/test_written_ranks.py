"""Ranks of what is written: one for all modules where readers need that, and numbers that stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PREFIX, gaussian, make_config, make_factors, peft_tensors, write_peft
from in_peft import CONFIG, WEIGHTS, assert_same, changes, mixtral, run
from safetensors.torch import load_file
from tolerances import FLOAT32, SUMS32
from torch import Tensor

import fastlora as fl


def decaying(folder: Path, seed: int = 1) -> Path:
    """An adapter whose modules need different ranks for the same energy."""
    tensors = {}
    for i, decay in enumerate((0.9, 0.1)):
        for k, name in enumerate(("q_proj", "v_proj")):
            left = gaussian(16, 4, seed=10 * seed + 4 * i + k) * decay ** torch.arange(4)
            module = f"model.layers.{i}.self_attn.{name}"
            tensors |= peft_tensors({module: (left, gaussian(4, 16, seed=10 * seed + 100 + 4 * i + k))})
    return write_peft(folder, tensors, make_config(target_modules=["q_proj", "v_proj"]))


def llama_cpp_deltas(folder: Path) -> dict[str, Tensor]:
    """ΔW as a reader takes it that divides the configuration's α by a module's own rank."""
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    modules = [k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")]
    factors = {m: (tensors[f"{m}.lora_B.weight"], tensors[f"{m}.lora_A.weight"]) for m in modules}
    return {m.removeprefix(PREFIX): config["lora_alpha"] / b.shape[1] * (b @ a) for m, (b, a) in factors.items()}


WRITING: dict[str, Callable[[Path, Path, Path], Iterable[str | Path]]] = {
    "compress": lambda a, b, out: ("compress", a, "--energy", "0.9", "--out", out),
    "merge": lambda a, b, out: ("merge", a, b, "--energy", "0.9", "--out", out),
    "merge of all": lambda a, b, out: ("merge", a, b, "--method", "ties", "--energy", "0.9", "--out", out),
    "compose": lambda a, b, out: ("compose", "compress(a - 0.5*b, energy=0.9)", f"a={a}", f"b={b}", "--out", out),
    "modulate": lambda a, b, out: ("modulate", a, "--op", "reverse:0.2", "--energy", "0.9", "--out", out),
}


@pytest.mark.parametrize("command", WRITING.values(), ids=WRITING)
def test_one_rank_for_all_modules_under_every_reading(tmp_path: Path, command: Callable[..., Any]) -> None:
    a, b = decaying(tmp_path / "a"), decaying(tmp_path / "b", seed=2)
    run(*command(a, b, tmp_path / "mixed"))
    run(*command(a, b, tmp_path / "uniform"), "--uniform-rank")
    mixed, uniform = fl.load(tmp_path / "mixed"), fl.load(tmp_path / "uniform")
    assert len({u.rank for u in mixed.updates.values()}) > 1
    assert {u.rank for u in uniform.updates.values()} == {max(u.rank for u in mixed.updates.values())}
    config = json.loads((tmp_path / "uniform" / CONFIG).read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    for module, found in llama_cpp_deltas(tmp_path / "uniform").items():
        assert torch.equal(uniform.delta(module), mixed.delta(module))  # zeros add nothing
        torch.testing.assert_close(found, mixed.delta(module), rtol=0, atol=FLOAT32 * float(found.abs().max()))


def test_parts_of_a_decomposition_with_one_rank_each(tmp_path: Path) -> None:
    paths = [decaying(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2))]
    parts = fl.decompose(fl.Pool.load(paths), threshold=0.05, energy=0.7)
    parts.save(tmp_path / "mixed")
    parts.save(tmp_path / "uniform", uniform_rank=True)
    run("decompose", *paths, "--threshold", "0.05", "--energy", "0.7", "--uniform-rank", "--out", tmp_path / "command")
    for place in ("shared", "unique/a", "unique/b"):
        uniform = fl.load(tmp_path / "uniform" / place)
        assert len({u.rank for u in uniform.updates.values()}) == 1
        for other in ("mixed", "command"):
            adapter = fl.load(tmp_path / other / place)
            assert all(torch.equal(adapter.delta(m), uniform.delta(m)) for m in adapter.modules)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_filling_changes_no_stored_bit(tmp_path: Path, dtype: str) -> None:
    ranks = {"model.layers.0.self_attn.q_proj": 1, "model.layers.0.self_attn.v_proj": 3}
    factors = make_factors({m: (24, 16) for m in ranks}, rank=ranks)
    made = fl.Adapter.from_tensors(
        {m: (b.to(getattr(torch, dtype)), a.to(getattr(torch, dtype))) for m, (b, a) in factors.items()}
    )
    again = fl.load(made.save(tmp_path / "a", uniform_rank=5))
    for module, (b, a) in again.tensors().items():
        stored, r = made.tensors()[module], ranks[module]
        assert b.shape[1] == a.shape[0] == 5 and not b[:, r:].any() and not a[r:].any()
        assert torch.equal(b[:, :r], stored[0]) and torch.equal(a[:r], stored[1])
    with pytest.raises(fl.InputError, match=r"uniform_rank=2.*rank 3"):
        made.save(tmp_path / "b", uniform_rank=2)


def test_a_task_vector_has_no_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        torch.save({"q.weight": torch.full((4, 4), value)}, tmp_path / f"{name}.pt")
    files = tmp_path / "base.pt", tmp_path / "tuned.pt"
    with pytest.raises(fl.InputError, match="--uniform-rank is for an adapter"):
        run("extract", *files, "--uniform-rank", "--out", tmp_path / "t.safetensors")
    run("extract", *files, "--uniform-rank", "--rank", "2", "--out", tmp_path / "t")


def per_expert(folder: Path, ranks: Mapping[str, int] | None = None, *, zero: str = "", seed: int = 1) -> Path:
    """An adapter of a Mixtral whose experts were modules of their own, with decaying spectra."""
    tensors = {}
    for layer in range(2):
        where = f"model.layers.{layer}"
        shapes = {f"{where}.self_attn.q_proj": (16, 16)}
        for e in range(4):
            expert = f"{where}.block_sparse_moe.experts.{e}"
            shapes |= {f"{expert}.w1": (12, 16), f"{expert}.w3": (12, 16), f"{expert}.w2": (16, 12)}
        for i, (module, (n, m)) in enumerate(shapes.items()):
            own = 1000 * seed + 100 * layer + 2 * i
            decay = (0.2 + 0.6 * (i % 3) / 2) ** torch.arange(4)
            left = gaussian(n, 4, seed=own) * decay * (not zero or zero not in module)
            tensors |= peft_tensors({module: (left, gaussian(4, m, seed=own + 1))})
    return write_peft(folder, tensors, make_config(target_modules=["q_proj", "w1", "w2", "w3"], lora_dropout=0.0))


@pytest.mark.parametrize("zero", ["", "layers.0.block_sparse_moe.experts.2.w1", "layers.1.block_sparse_moe"])
def test_experts_have_one_rank_so_that_peft_can_stack_them(tmp_path: Path, zero: str) -> None:
    folder = per_expert(tmp_path / "a", zero=zero)
    run("compress", folder, "--energy", "1", "--out", tmp_path / "same")
    assert_same(changes(mixtral(), tmp_path / "same"), changes(mixtral(), folder))
    run("compress", folder, "--energy", "0.9", "--out", tmp_path / "out")
    small = fl.load(folder).compress(energy=0.9)
    assert len({u.rank for u in small.updates.values()}) > 1
    assert len({u.rank for m, u in fl.load(tmp_path / "out").updates.items() if "experts" in m}) == 1
    found = changes(mixtral(), tmp_path / "out")
    for layer in range(2):
        for e in range(4):
            where = f"model.layers.{layer}.block_sparse_moe.experts.{e}"
            expected = {
                "gate_up_proj": torch.cat([small.delta(f"{where}.w1"), small.delta(f"{where}.w3")]),
                "down_proj": small.delta(f"{where}.w2"),
            }
            for name, delta in expected.items():
                change = found.get(f"model.layers.{layer}.mlp.experts.{name}", torch.zeros(4, *delta.shape))[e]
                torch.testing.assert_close(change, delta, rtol=0, atol=SUMS32)


def test_a_merge_of_experts_that_were_modules_loads(tmp_path: Path) -> None:
    a, b = per_expert(tmp_path / "a"), per_expert(tmp_path / "b", seed=2)
    run("merge", a, b, "--method", "cat", "--out", tmp_path / "out")
    one, two = changes(mixtral(), a), changes(mixtral(), b)
    assert_same(changes(mixtral(), tmp_path / "out"), {k: one[k] + two[k] for k in one})
