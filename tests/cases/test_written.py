"""What is written loads where the input loaded, with the same numbers, and under every reading of ranks and α."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PREFIX, gaussian, make_config, make_factors, peft_tensors, write_peft
from safetensors.torch import load_file
from tolerances import FLOAT32, SUMS32
from torch import Tensor, nn

import fastlora as fl
from fastlora.cli.app import app
from fastlora.formats.peft.selection import exclude_pattern

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def run(*arguments: str | Path) -> None:
    """A command that must succeed."""
    app([str(a) for a in arguments], standalone_mode=False)


def llava() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8, projection_dim=16),
        text_config=transformers.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=64),
        image_token_index=63,
    )
    return transformers.LlavaForConditionalGeneration(config)  # type: ignore[no-any-return]


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=64))  # type: ignore[no-any-return]


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZES | {"intermediate_size": 12}, num_key_value_heads=2, vocab_size=60, num_local_experts=4
    )
    return transformers.MixtralForCausalLM(config)  # type: ignore[no-any-return]


def older_llava_name(key: str) -> str:
    """The name that older model code gave a tensor."""
    return key.replace("model.language_model.", "language_model.model.").replace(
        "model.vision_tower.", "vision_tower.vision_model."
    )


def trained(
    model: nn.Module, folder: Path, seed: int = 1, keep: Callable[[str], bool] = lambda key: True, **config: Any
) -> Path:
    """An adapter that peft saved, with random factors; under the names ``keep`` leaves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
        rng = torch.Generator().manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=rng) * keep(name)
        adapted.save_pretrained(folder)
    return folder


def renamed(folder: Path, rename: Callable[[str], str]) -> Path:
    """The adapter under other names of its tensors; the configuration stays."""
    tensors = {PREFIX + rename(k.removeprefix(PREFIX)): t for k, t in load_file(folder / WEIGHTS).items()}
    return write_peft(folder.with_name(folder.name + "-renamed"), tensors, json.loads((folder / CONFIG).read_text()))


def changes(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What an adapter that peft loads changes in the weights of a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).merge_and_unload()
    before = model.state_dict()
    return {k: w - before[k] for k, w in merged.state_dict().items() if not torch.equal(w, before[k])}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=0, atol=SUMS32 * float(change.abs().max()))


QV = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """An adapter of both towers of a LLaVA model, under the names of older code."""
    return renamed(trained(llava(), tmp_path / "a", **QV), older_llava_name)


def test_names_of_older_code_still_load(tmp_path: Path, older: Path) -> None:
    expected = changes(llava(), older)
    assert len(expected) == 8
    run("compress", older, "--rank", "4", "--out", tmp_path / "out")
    assert_same(changes(llava(), tmp_path / "out"), expected)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"] and "exclude_modules" not in config


def test_names_of_older_code_load_with_ranks_that_differ(tmp_path: Path, older: Path) -> None:
    adapter = fl.load(older)
    ranks = {m: 1 + i % 4 for i, m in enumerate(adapter.modules)}
    parts = {m: adapter.compress(rank=r).factors(m) for m, r in ranks.items()}
    mixed = replace(fl.Adapter.from_tensors(parts), base=adapter.base)
    expected = changes(llava(), mixed.save(tmp_path / "whole", uniform_rank=True))
    assert_same(changes(llava(), mixed.save(tmp_path / "mixed")), expected)


def test_names_of_older_code_load_where_a_module_is_zero(tmp_path: Path) -> None:
    def keep(name: str) -> bool:
        return "language_model.layers.1.self_attn.q_proj" not in name

    folder = renamed(trained(llava(), tmp_path / "a", keep=keep, **QV), older_llava_name)
    expected = changes(llava(), folder)
    assert len(expected) == 7
    run("compress", folder, "--energy", "1", "--out", tmp_path / "out")
    assert_same(changes(llava(), tmp_path / "out"), expected)


def test_one_tower_under_older_names_and_a_subset_of_its_modules(tmp_path: Path) -> None:
    def keep(name: str) -> bool:
        return "vision" not in name and "layers.1.self_attn.q_proj" not in name

    folder = renamed(trained(llava(), tmp_path / "a", keep=keep, **QV), older_llava_name)
    tensors = {k: t for k, t in load_file(folder / WEIGHTS).items() if "vision" not in k}
    config = json.loads((folder / CONFIG).read_text()) | {"target_modules": r".*language_model.*(q|v)_proj"}
    text = write_peft(tmp_path / "text", tensors, config)
    expected = changes(llava(), text)
    run("merge", text, "--method", "cat", "--out", tmp_path / "out")
    assert_same(changes(llava(), tmp_path / "out"), expected)


def test_a_sum_of_adapters_under_older_names(tmp_path: Path, older: Path) -> None:
    other = renamed(trained(llava(), tmp_path / "b", seed=2, r=2, target_modules=["k_proj"]), older_llava_name)
    run("merge", f"{older}:0.5", f"{other}:2", "--method", "cat", "--out", tmp_path / "out")
    expected = {k: 0.5 * t for k, t in changes(llava(), older).items()} | {
        k: 2 * t for k, t in changes(llava(), other).items()
    }
    assert len(expected) == 12
    assert_same(changes(llava(), tmp_path / "out"), expected)


def test_a_zero_under_older_names_still_loads(tmp_path: Path, older: Path) -> None:
    adapter = fl.load(older)
    zero = 0.0 * adapter
    assert not any(u.rank for u in zero.updates.values())
    assert changes(llava(), zero.save(tmp_path / "zero")) == {}


SELECTIONS: dict[str, dict[str, Any]] = {
    "ends": {"target_modules": ["q_proj", "mlp.up_proj"]},
    "a pattern": {"target_modules": r".*\.1\.mlp\..*_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "exclusions": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_the_selection_of_the_input_is_kept(tmp_path: Path, selection: dict[str, Any]) -> None:
    folder = trained(llama(), tmp_path / "a", r=4, **selection)
    before = json.loads((folder / CONFIG).read_text())
    run("compress", folder, "--rank", "2", "--out", tmp_path / "out")
    run("compress", folder, "--rank", "4", "--out", tmp_path / "same")
    after = json.loads((tmp_path / "out" / CONFIG).read_text())
    for key in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        found, expected = after.get(key), before.get(key)
        assert (sorted(found) if isinstance(found, list) else found) == (
            sorted(expected) if isinstance(expected, list) else expected
        ), key
    assert_same(changes(llama(), tmp_path / "same"), changes(llama(), folder))


def test_ends_that_select_too_much_become_paths(tmp_path: Path) -> None:
    folder = trained(llama(), tmp_path / "a", keep=lambda name: "layers.1.self_attn.q" not in name, **QV)
    run("compress", folder, "--energy", "1", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["target_modules"] == ["v_proj", "layers.0.self_attn.q_proj"] and "exclude_modules" not in config
    assert_same(changes(llama(), tmp_path / "out"), changes(llama(), folder))


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_add_weighted_adapter_keeps_the_modules_of_other_adapters(tmp_path: Path, method: str) -> None:
    first = trained(llama(), tmp_path / "a", r=4, target_modules=["q_proj"])
    other = trained(llama(), tmp_path / "b", seed=2, r=4, lora_alpha=4, target_modules=["v_proj"])
    made = fl.Adapter.from_tensors({m: fl.load(first).factors(m) for m in fl.load(first).modules})
    run("compress", first, "--rank", "4", "--out", tmp_path / "loaded")
    made.save(tmp_path / "made")
    for ours in ("loaded", "made"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(llama(), str(tmp_path / ours), adapter_name="ours")
            model.load_adapter(str(other), adapter_name="other")
            model.add_weighted_adapter(["ours", "other"], [1.0, 1.0], "sum", combination_type=method)
            model.set_adapter("sum")
            merged = model.merge_and_unload().state_dict()
        before = llama().state_dict()
        expected = changes(llama(), first) | changes(llama(), other)
        assert_same({k: w - before[k] for k, w in merged.items() if not torch.equal(w, before[k])}, expected)


def test_an_exclusion_beside_full_paths_is_not_kept(tmp_path: Path) -> None:
    folder = trained(llama(), tmp_path / "a", **QV)
    config = json.loads((folder / CONFIG).read_text())
    paths = {"target_modules": fl.load(folder).modules, "exclude_modules": r"model|.+\.(?:model)(?:\..*)?"}
    (folder / CONFIG).write_text(json.dumps(config | paths))
    expected = changes(llama(), folder)
    run("compress", folder, "--rank", "4", "--out", tmp_path / "out")
    after = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert "exclude_modules" not in after and after["target_modules"] == paths["target_modules"]
    assert_same(changes(llama(), tmp_path / "out"), expected)


class Nested(nn.Module):
    """A module whose path is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.ModuleDict({"query": nn.Linear(16, 8)})
        self.y = nn.ModuleDict({"x": nn.ModuleDict({"query": nn.Linear(16, 8)})})

    def forward(self, x: Tensor) -> Tensor:
        return self.x["query"](x)


def test_a_path_that_would_take_another_along_is_guarded(tmp_path: Path) -> None:
    folder = trained(Nested(), tmp_path / "a", keep=lambda name: ".y." not in name, r=4, target_modules=["query"])
    run("compress", folder, "--energy", "1", "--out", tmp_path / "out")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(Nested(), str(tmp_path / "out"))
    assert [n for n, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)] == [
        "x.query"
    ]
    assert not [w for w in said if "missing" in str(w.message) or "exclude" in str(w.message)]


@pytest.mark.parametrize("modules", [["lm_head"], ["model.layers.0.self_attn.q_proj", "lm_head"], ["a.b.c"]], ids=repr)
def test_no_exclusion_that_nobody_needs(tmp_path: Path, modules: list[str]) -> None:
    made = fl.Adapter.from_tensors({m: (torch.randn(8, 2), torch.randn(2, 6)) for m in modules})
    config = json.loads((made.save(tmp_path / "a") / CONFIG).read_text())
    assert "exclude_modules" not in config and config["target_modules"] == modules


def test_an_exclusion_names_only_what_is_longer() -> None:
    assert exclude_pattern(["x.query"], ["x.query", "z.x.query"]) == r"x|z|(?!(?:z\.x\.query)$).+\.(?:x\.query)"


# -- ranks ------------------------------------------------------------------------------------------------------------


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


# -- experts with factors of their own --------------------------------------------------------------------------------


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
