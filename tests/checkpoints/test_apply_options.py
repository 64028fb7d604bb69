"""What can be applied, and how the output is: methods, expressions, task vectors, dtypes, cards, ties."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import gaussian
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored_models import adapter, model_file
from tolerances import FLOAT32, SUMS32
from torch import Tensor

import fastlora as fl
from fastlora.core.factors import Factor
from fastlora.core.updates import Layout, Update

Q, K, V = (f"l.0.self_attn.{p}_proj" for p in "qkv")


def pool_of(modules: dict[str, tuple[int, int]]) -> fl.Pool:
    return fl.Pool([adapter("x", modules, 1), adapter("y", modules, 30), adapter("z", modules, 60)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.4, "scope": "model"}),
        ("dare", {"density": 0.5, "seed": 3}),
        ("della", {"density": 0.5}),
        ("magnitude", {"density": 0.3}),
        ("sce", {"select_topk": 0.5}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())),
)
def test_methods_on_elements_keep_their_full_rank(
    method: str, parameters: dict[str, object], dtype: torch.dtype, tmp_path: Path
) -> None:
    """As the low rank that is full: onto weights, transposed ones, rows of a fused one, and parts of one."""
    pool = pool_of({"a": (24, 16), Q: (8, 8), K: (8, 8), V: (8, 8), "h.0.attn.c_attn": (24, 8)})
    names = {"a.weight": (24, 16), "l.0.self_attn.qkv_proj.weight": (24, 8), "h.0.attn.c_attn.weight": (8, 24)}
    stored = model_file(tmp_path / "m.safetensors", names, dtype)
    weights = {"x": 1.0, "y": 0.5, "z": -0.25}
    fl.apply(tmp_path / "m.safetensors", weights, tmp_path / "o.safetensors", pool=pool, method=method, **parameters)
    found = load_file(tmp_path / "o.safetensors")
    merged = fl.merge(pool, weights, method=method, rank=16, **parameters)
    wanted = {
        "a.weight": merged.delta("a").double(),
        "l.0.self_attn.qkv_proj.weight": torch.cat([merged.delta(m).double() for m in (Q, K, V)]),
        "h.0.attn.c_attn.weight": merged.delta("h.0.attn.c_attn").double().mT,
    }
    eps = torch.finfo(dtype).eps
    for name, change in wanted.items():
        exact = stored[name].double() + change
        error = (found[name].double() - exact).abs()
        assert float(change.abs().max()) > 0.1
        assert bool((error <= 0.51 * eps * exact.abs() + SUMS32).all())


def test_a_cut_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    pool = pool_of({"a": (24, 16)})
    stored = model_file(tmp_path / "m.safetensors", {"a.weight": (24, 16)})
    given = {"density": 0.5, "rank": 3, "min_energy": 0.0}
    fl.apply(tmp_path / "m.safetensors", pool, tmp_path / "o.safetensors", method="ties", **given)
    change = load_file(tmp_path / "o.safetensors")["a.weight"].double() - stored["a.weight"].double()
    merged = fl.merge(pool, method="ties", **given)
    torch.testing.assert_close(change, merged.delta("a").double(), rtol=0, atol=SUMS32)
    assert int((torch.linalg.svdvals(change) > 1e-4).sum()) == 3
    fl.apply(tmp_path / "m.safetensors", pool, tmp_path / "p.safetensors", method="tsv", rank=4)
    change = load_file(tmp_path / "p.safetensors")["a.weight"].double() - stored["a.weight"].double()
    torch.testing.assert_close(change, fl.merge(pool, method="tsv", rank=4).delta("a").double(), rtol=0, atol=SUMS32)


def test_methods_refuse_what_they_refuse_elsewhere(tmp_path: Path) -> None:
    pool = pool_of({"a": (24, 16)})
    base, out = tmp_path / "m.safetensors", tmp_path / "o.safetensors"
    model_file(base, {"a.weight": (24, 16)})
    for method, given, message in (
        ("ties", {"density": 2.0}, "density"),
        ("ties", {"nothing": 1}, "does not take nothing"),
        ("none", {}, "does not exist"),
        (None, {"density": 0.5}, "give method="),
    ):
        with pytest.raises(fl.InputError, match=message):
            fl.apply(base, pool, out, method=method, **given)
    with pytest.raises(fl.InputError, match="pool has no adapter 'w'"):
        fl.apply(base, {"w": 1.0}, out, pool=pool)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_task_vectors(tmp_path: Path) -> None:
    names = {"a.weight": (24, 16), "b.weight": (5, 7), "c": (3,), "e": (2, 4, 6)}
    base = model_file(tmp_path / "base.safetensors", names)
    tuned = {n: t + 0.1 * gaussian(*t.shape, seed=90) for n, t in base.items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    task = fl.task_vector(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    fl.apply(tmp_path / "base.safetensors", task, tmp_path / "o.safetensors")
    found = load_file(tmp_path / "o.safetensors")
    for name, tensor in tuned.items():
        torch.testing.assert_close(found[name], tensor, rtol=FLOAT32, atol=FLOAT32)
    one = adapter("x", {"a": (24, 16)})
    pool = {"t": task, "x": one}
    fl.apply(tmp_path / "base.safetensors", {"t": 0.5, "x": 2.0}, tmp_path / "p.safetensors", pool=pool)
    found = load_file(tmp_path / "p.safetensors")
    wanted = (
        base["a.weight"] + 0.5 * (tuned["a.weight"] - base["a.weight"]) + 2 * adapter("x", {"a": (24, 16)}).delta("a")
    )
    torch.testing.assert_close(found["a.weight"], wanted, rtol=SUMS32, atol=SUMS32)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("target", ["float16", "bfloat16", "float32"])
def test_another_dtype(source: torch.dtype, target: str, tmp_path: Path) -> None:
    """Of all tensors that are floats; each is rounded once."""
    folder = tmp_path / "base"
    folder.mkdir()
    names = {"a.weight": (24, 16), "b.weight": (5, 7), "c": (3,), "scalar": (), "conv.weight": (2, 3, 3, 3)}
    stored = model_file(folder / "model.safetensors", names, source)
    whole = {**stored, "ids": torch.arange(5), "mask": torch.tensor([True, False])}
    save_file(whole, folder / "model.safetensors")
    config = {"model_type": "llama", "torch_dtype": "float32", "text_config": {"dtype": "float32"}}
    (folder / "config.json").write_text(json.dumps(config))
    one = adapter("x", {"a": (24, 16)})
    fl.apply(folder, one, tmp_path / "out", dtype=target)
    found = load_file(tmp_path / "out" / "model.safetensors")
    dtype = getattr(torch, target)
    for name, tensor in stored.items():
        exact = tensor.double() + (one.delta("a").double() if name == "a.weight" else 0.0)
        assert found[name].dtype == dtype and found[name].shape == tensor.shape
        error = (found[name].double() - exact).abs()
        assert bool((error <= 0.501 * torch.finfo(dtype).eps * exact.abs() + FLOAT32).all())
        if name != "a.weight":
            assert torch.equal(found[name], tensor.to(dtype))
    assert torch.equal(found["ids"], whole["ids"]) and torch.equal(found["mask"], whole["mask"])
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["torch_dtype"] == target and said["text_config"]["dtype"] == target


def test_an_index_counts_the_bytes_of_another_dtype(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for i in (1, 2):
        model_file(folder / f"model-0000{i}-of-00002.safetensors", {f"l.{i}.q_proj.weight": (8, 6)})
    places = {f"l.{i}.q_proj.weight": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    index = {"metadata": {"total_size": 384}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fl.apply(folder, adapter("x", {"l.1.q_proj": (8, 6)}), tmp_path / "out", dtype="bfloat16")
    said = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert said == {"metadata": {"total_size": 192}, "weight_map": places}
    assert load_file(tmp_path / "out/model-00002-of-00002.safetensors")["l.2.q_proj.weight"].dtype == torch.bfloat16


def folder_model(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    model_file(folder / "model.safetensors", {"a.weight": (24, 16), "b.weight": (5, 7)})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_other_files_and_the_card(tmp_path: Path) -> None:
    folder = folder_model(tmp_path)
    (folder / "README.md").write_text("# The base\n")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"old weights")
    (folder / "original" / "params.json").write_text("{}")
    (folder / ".gitattributes").write_text("*")
    given = replace(adapter("x", {"a": (24, 16)}), base=replace(adapter("x", {}).base, model="org/base"))
    notes = fl.apply(folder, {"x": 0.5}, tmp_path / "out", pool={"x": given})
    out = tmp_path / "out"
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == {
        "README.md", "README.base.md", "config.json", "model.safetensors", "original/params.json", "tokenizer.json",
    }  # fmt: skip
    assert (out / "README.base.md").read_text() == "# The base\n"
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card and 'base_model: "org/base"' in card
    assert "base_model_relation: merge" in card and "Adapters in the weights of `org/base`" in card
    assert any("original/consolidated.00.pth" in note and "without the adapters" in note for note in notes)
    assert any("README.base.md" in note for note in notes)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["fastlora"])
    assert told["apply"] == {"base": "base", "of": [{"weight": 0.5, "of": {"adapter": "x"}}]}
    # Once more on what came out: its own card is kept, too.
    fl.apply(out, given, tmp_path / "twice")
    assert (tmp_path / "twice" / "README.base.2.md").read_text() == card


def test_overwriting(tmp_path: Path) -> None:
    """What an earlier run made or copied is replaced; what anybody has added or changed is not."""
    folder, one = folder_model(tmp_path), adapter("x", {"a": (24, 16)})
    out = tmp_path / "out"
    fl.apply(folder, one, out)
    before = load_file(out / "model.safetensors")["a.weight"]
    with pytest.raises(fl.OutputError, match="--overwrite"):
        fl.apply(folder, one, out)
    fl.apply(folder, one * 2, out, overwrite=True)
    assert not torch.equal(load_file(out / "model.safetensors")["a.weight"], before)
    (out / "tokenizer.json").write_text('{"mine": 1}')
    with pytest.raises(fl.OutputError, match=r"tokenizer\.json"):
        fl.apply(folder, one, out, overwrite=True)
    assert (out / "tokenizer.json").read_text() == '{"mine": 1}'
    fl.apply(folder, one, out, overwrite="force")
    assert torch.equal(load_file(out / "model.safetensors")["a.weight"], before)
    assert not list(tmp_path.glob(".*"))
    single = tmp_path / "s.safetensors"
    fl.apply(folder / "model.safetensors", one, single)
    fl.apply(folder / "model.safetensors", one * 2, single, overwrite=True)
    model_file(single, {"mine": (2, 2)})
    with pytest.raises(fl.OutputError, match="not written by fastlora"):
        fl.apply(folder / "model.safetensors", one, single, overwrite=True)
    for where in (folder, folder / "inside", tmp_path):
        with pytest.raises(fl.OutputError, match="one inside the other"):
            fl.apply(folder, one, where, overwrite="force")


def tied_folder(tmp_path: Path, *, both: bool) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path / "base"
    folder.mkdir()
    stored = model_file(folder / "model.safetensors", {"model.embed_tokens.weight": (20, 8), "norm": (8,)})
    if both:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
        save_file(stored, folder / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, stored


def tied_adapter(change: float, *, turned: bool) -> fl.Adapter:
    """An embedding ``ΔWᵀ`` and a head ``ΔW``, which differ by ``change``; the factors of one may be mixed."""
    L, R = gaussian(20, 3, seed=1), gaussian(3, 8, seed=2)
    mix = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]) if turned else torch.eye(3)
    head = Update(Factor.of("B", L @ mix), Factor.of("A", torch.linalg.solve(mix, R) * (1 + change)), 0.5)
    embedding = Update(Factor.of("B", R.mT.contiguous()), Factor.of("A", L.mT.contiguous()), 0.5, Layout("embedding"))
    return fl.Adapter("x", {"model.embed_tokens": embedding, "lm_head": head})


@pytest.mark.parametrize("turned", [False, True], ids=["same factors", "other factors"])
@pytest.mark.parametrize("both", [False, True], ids=["one is stored", "both are stored"])
def test_tied_matrices_that_change_alike_stay_tied(both: bool, turned: bool, tmp_path: Path) -> None:
    folder, stored = tied_folder(tmp_path, both=both)
    fl.apply(folder, tied_adapter(0.0, turned=turned), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    change = 0.5 * gaussian(20, 3, seed=1).double() @ gaussian(3, 8, seed=2).double()
    for name in stored.keys() - {"norm"}:
        wanted = stored[name].double() + change
        torch.testing.assert_close(found[name].double(), wanted, rtol=0, atol=SUMS32)
    with pytest.raises(fl.InputError, match="not alike"):
        fl.apply(folder, tied_adapter(1e-3, turned=turned), tmp_path / "apart")
    only = fl.Adapter("x", {"lm_head": tied_adapter(0.0, turned=False).updates["lm_head"]})
    with pytest.raises(fl.InputError, match=r"ties to model\.embed_tokens"):
        fl.apply(folder, only, tmp_path / "apart")


def test_the_memory_bound_changes_no_bit(tmp_path: Path) -> None:
    stored = {"a.weight": (300, 200), "b.weight": (200, 300)}
    model_file(tmp_path / "m.safetensors", stored, torch.bfloat16)
    one = adapter("x", {"a": (300, 200), "b": (200, 300)})
    one.save(tmp_path / "x")
    fl.apply(tmp_path / "m.safetensors", fl.load(tmp_path / "x"), tmp_path / "a.safetensors")
    fl.apply(tmp_path / "m.safetensors", fl.load(tmp_path / "x"), tmp_path / "b.safetensors", memory="1GiB")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_tensors_that_the_index_does_not_name_stay(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    stored = model_file(folder / "model-00001-of-00001.safetensors", {"a.weight": (24, 16), "unnamed": (5, 7)})
    places = {"a.weight": "model-00001-of-00001.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    fl.apply(folder / "model.safetensors.index.json", adapter("x", {"a": (24, 16)}), tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out/model-00001-of-00001.safetensors")["unnamed"], stored["unnamed"])
