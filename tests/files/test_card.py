"""Model cards: what they say, what they leave out, and that whoever edits one keeps it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import make_adapter

import fastlora as fl
from fastlora.core.card import is_card, plain, recipe_yaml
from fastlora.core.data import Scaling
from fastlora.errors import OutputError
from fastlora.files.earlier import is_ours


def adapter(name: str, seed: int, base: str | None = None) -> fl.Adapter:
    g = torch.Generator().manual_seed(seed)
    modules = {f"layers.{i}.q_proj": (torch.randn(12, 3, generator=g), torch.randn(3, 8, generator=g)) for i in (0, 1)}
    return fl.Adapter.from_tensors(modules, name=name, base=base)


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def front(text: str) -> dict[str, Any]:
    """The fields in front, as the Hub parses them."""
    _, fields, _ = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    loaded = yaml.safe_load(fields)
    assert isinstance(loaded, dict)
    return loaded


def recipe(text: str) -> str:
    match = re.search(r"^(`{3,})yaml\n(.*?)^\1$", text, flags=re.MULTILINE | re.DOTALL)
    assert match is not None
    return match[2]


def test_the_fields_of_a_merge(tmp_path: Path) -> None:
    pool = fl.Pool([adapter("legal", 1, "org/model-7b"), adapter("med", 2, "org/model-7b")])
    fl.merge(pool, {"legal": 0.7, "med": 0.3}, method="svd", rank=2).save(tmp_path / "out")
    text = card(tmp_path / "out")
    assert front(text) == {
        "library_name": "peft",
        "tags": ["lora", "merge", "fastlora"],
        "base_model": "org/model-7b",
        "base_model_relation": "adapter",
    }
    assert "| modules | 2 |" in text and "| rank | 2 |" in text and "| energy kept | " in text
    hub = pytest.importorskip("huggingface_hub", reason="the Hub's own parser is not installed")
    data = hub.ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.base_model == "org/model-7b" and data.tags == ["lora", "merge", "fastlora"]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("cat", {}),
        ("svd", {"rank": 2}),
        ("ties", {"rank": 3, "min_energy": 0.0, "density": 0.5}),
        ("tsv", {"spectrum": "rms"}),
        ("dare", {"density": 0.7, "rank": 3, "min_energy": 0.0, "seed": 5}),
        ("matched_norm", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_recipe_makes_the_result_again(tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    folders = [make_adapter(tmp_path / name, seed=i) for i, name in enumerate("ab")]
    merged = fl.merge(fl.Pool.load(folders), {"a": 0.75, "b": 0.5}, method=method, **parameters)
    merged.save(tmp_path / "out")
    text = recipe(card(tmp_path / "out"))
    assert str(tmp_path) not in text
    (tmp_path / "again.yaml").write_text(re.sub(r"model: (\w)\b", rf"model: {tmp_path}/\1", text))
    fl.Recipe.load(tmp_path / "again.yaml").merge().save(tmp_path / "again")
    name = "adapter_model.safetensors"
    first, second = (fl.load(tmp_path / folder) for folder in ("out", "again"))
    assert first.modules == second.modules
    assert all(
        torch.equal(x, y) for m in first.modules for x, y in zip(first.factors(m), second.factors(m), strict=True)
    )
    assert name in {p.name for p in (tmp_path / "again").iterdir()}


def test_no_path_of_this_machine_is_told(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        make_adapter(tmp_path / name, seed=i, base_model_name_or_path=str(tmp_path / "secret-model"))
    (tmp_path / "r.yaml").write_text(
        f"merge_method: linear\nmodels:\n- model: {tmp_path}/a\n- model: {tmp_path}/b\n", encoding="utf-8"
    )
    fl.Recipe.load(tmp_path / "r.yaml").merge().save(tmp_path / "out")
    text = card(tmp_path / "out")
    assert str(tmp_path) not in text and "base_model" not in front(text)
    assert "merge_method: linear" in text
    assert str(tmp_path).encode() not in (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert plain("see /home/me/models/x.bin, and ../y") == "see x.bin, and y"


def test_names_from_files_are_no_markup(tmp_path: Path) -> None:
    name = "x<script>alert(1)</script>`|```](http://e) ---\u2028\x1b[31m"
    (0.5 * adapter(name.replace("/", "").replace("\x1b", ""), 1) - adapter("b", 2)).save(tmp_path / "out")
    text = card(tmp_path / "out")
    outside = re.sub(r"^(`{3,})yaml\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<" not in outside and "\u2028" not in outside and "](" not in outside
    assert front(text)["tags"] == ["lora", "merge", "fastlora"]
    assert plain("a|b\nc") == r"a\|b c"


def test_a_fence_is_longer_than_what_it_holds(tmp_path: Path) -> None:
    fl.merge(fl.Pool([adapter("a````b", 1), adapter("c", 2)]), method="mean").save(tmp_path / "out")
    assert yaml.safe_load(recipe(card(tmp_path / "out")))["models"][0]["model"] == "a````b"


def test_every_part_and_kind_has_one(tmp_path: Path) -> None:
    fl.decompose(fl.Pool([adapter("a", 1), adapter("b", 2)]), threshold=0.5).save(tmp_path / "parts")
    for config in (tmp_path / "parts").rglob("adapter_config.json"):
        assert "devec: " in card(config.parent) and front(card(config.parent))["library_name"] == "peft"
    vectors = {"q_proj": Scaling(torch.full((6, 1), 1.5), feedforward=False)}
    fl.IA3("scale", vectors).save(tmp_path / "ia3")
    assert front(card(tmp_path / "ia3"))["tags"] == ["ia3", "fastlora"]
    adapter("a", 1).save(tmp_path / "mlx", format="mlx")
    assert front(card(tmp_path / "mlx"))["library_name"] == "mlx"


def test_only_cards_that_nobody_edited_are_replaced(tmp_path: Path) -> None:
    one, out = adapter("a", 1), tmp_path / "out"
    one.save(out)
    file = out / "README.md"
    assert is_ours(file) and is_card(file.read_bytes())
    one.save(out, overwrite=True)
    file.write_text(card(out) + "\nTrained on my notes.\n", encoding="utf-8")
    assert not is_ours(file)
    with pytest.raises(OutputError, match=r"README\.md, which fastlora did not write"):
        one.save(out, overwrite=True)
    assert "Trained on my notes" in card(out)
    one.save(out, overwrite="force")
    assert "Trained on my notes" not in card(out)


@pytest.mark.parametrize("content", [b"", b"---\n", b"---\n# Card by fastlora, sha256 ", b"# Card\n"])
def test_what_is_no_card(content: bytes) -> None:
    assert not is_card(content)


def test_long_recipes_are_cut_and_deep_ones_end(tmp_path: Path) -> None:
    fl.merge(fl.Pool([adapter(f"a{i}", i) for i in range(150)]), method="mean").save(tmp_path / "wide")
    text = card(tmp_path / "wide")
    assert text.count("\n") < 240 and "lines more, in the metadata of the tensors" in text
    deep = adapter("a", 1)
    for _ in range(60):
        deep = fl.negate(deep, 0.5)
    deep.save(tmp_path / "deep")
    assert "…" in card(tmp_path / "deep")


DATA = {
    "one value": {"devec": "shared"},
    "values": {"a": 1, "b": None, "c": True, "d": 1e-7, "e": "yes", "f": "- x", "g": "a\nb", "h": "ünï '"},
    "lists": {"a": [1, 2], "b": [], "c": {}, "d": "long " * 40},
    "merge": {"merge_method": "svd", "models": [{"model": "x", "parameters": {"w": 0.5}}], "parameters": {"r": 8}},
    "pairs": {"devec": "unique_of(a)", "τ": 0.85, "pool": {"a0": "a0", "b: c": "x, {y}"}, "c": {"a": None, "1": 1.0}},
    "equal": {"a": [1], "b": {"x": 1, "y": True, "z": 1.0, "v": "1"}, "c": {"x": True, "z": 1}, "d": {"x": 1.0}},
    "signs": {"a": [], "b": 0.0, "c": -0.0, "d": {"x": 0.0}, "e": {"x": -0.0}, "f": True, "g": 1, "h": "true"},
    "wider": {"pool": {"a" * 20: "b" * 30, "c" * 20: "d" * 30, "e" * 20: "f" * 30}},
    "wide": {"pool": {"a" * 20: "b" * 30, "c" * 20: "d" * 30}, "odd": {"a\nb": "c\nd", "e": ""}, "k" * 130: {"a": "b"}},
    "deep": {"a": {"b": {"c": [1, {"d": 2}]}}, "e": [[1], [2, [3]]]},
}  # fmt: skip


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_fields_are_written_as_the_whole_would_be(data: dict[str, object]) -> None:
    text = recipe_yaml(data)
    assert yaml.safe_load(text) == data
    whole = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None)
    assert text.splitlines() == whole.splitlines()


def test_values_that_are_equal_are_not_taken_for_one_another() -> None:
    for value in (1, True, 1.0, 0.0, -0.0):
        test_fields_are_written_as_the_whole_would_be({"list": [], "value": value, "pool": {"value": value}})
