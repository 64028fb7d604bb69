"""What is written loads where the input loaded, with the same numbers, and under every reading of ranks and α."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import write_peft
from in_peft import CONFIG, WEIGHTS, assert_same, changes, llama, llava, older_llava_name, renamed, run, trained
from safetensors.torch import load_file
from torch import Tensor, nn

import fastlora as fl
from fastlora.formats.peft.selection import exclude_pattern

peft = pytest.importorskip("peft")

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


class Inside(nn.Module):
    """A model in a model: the first part of a path comes again in it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [llama, Inside])
@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_add_weighted_adapter_keeps_the_modules_of_other_adapters(
    tmp_path: Path, method: str, build: Callable[[], nn.Module]
) -> None:
    first = trained(build(), tmp_path / "a", r=4, target_modules=["q_proj"])
    other = trained(build(), tmp_path / "b", seed=2, r=4, lora_alpha=4, target_modules=["v_proj"])
    made = fl.Adapter.from_tensors({m: fl.load(first).factors(m) for m in fl.load(first).modules})
    run("compress", first, "--rank", "4", "--out", tmp_path / "loaded")
    made.save(tmp_path / "made")
    for ours in ("loaded", "made"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(build(), str(tmp_path / ours), adapter_name="ours")
            model.load_adapter(str(other), adapter_name="other")
            model.add_weighted_adapter(["ours", "other"], [1.0, 1.0], "sum", combination_type=method)
            model.set_adapter("sum")
            merged = model.merge_and_unload().state_dict()
        before = build().state_dict()
        expected = changes(build(), first) | changes(build(), other)
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
