"""Inputs of modules, collected from running models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastlora as fl
from fastlora.errors import InputError, NonFiniteError, OutputError


class Block(nn.Module):
    """Queries and keys of one input, a value of another, and two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.dropout = nn.Dropout(0.5)
        self.embed = nn.Embedding(9, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.dropout(self.embed(input_ids))
        return self.v(self.q(x) * self.k(x))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 4, 3, stride=2, padding=1)
        self.two = nn.Conv2d(3, 4, (3, 2), dilation=(1, 2), padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x[:, :, 0]).sum() + self.two(x).sum()


def batches(count: int, *, padded: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(count)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 9, (4, 5), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[:, 3:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def test_rows_are_the_inputs_and_are_shared() -> None:
    model, given = Block().train(), batches(3)
    with torch.no_grad():
        inputs = torch.cat([model.embed(b["input_ids"]).reshape(-1, 6) for b in given])
    found = fl.statistics(model, {"a": given, "b": given[:1]}, ["q", "k", "v"], tokens=1000)
    own = found.of["a"]
    assert own.sites == {"q": "q", "k": "q", "v": "v"} and own.seen == {"q": 60, "v": 60}
    assert torch.equal(own.of("k"), inputs) and own.of("other") is None
    assert torch.equal(found.of["b"].of("q"), inputs[:20])
    assert model.training and model.dropout.training and not model.q._forward_pre_hooks


def test_a_sample_is_the_same_places_of_all_modules_and_even() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[0].bias.fill_(0.0)
    given = torch.arange(600.0).reshape(30, 20, 1)
    hits = torch.zeros(600)
    for seed in range(60):
        part = fl.statistics(model, list(given), ["0", "1"], tokens=60, seed=seed).of["adapter"]
        places = part.of("0").flatten()
        assert len(places) == 60 and bool((places.diff() > 0).all())
        assert torch.equal(part.of("1").flatten(), 2.0 * places)
        hits[places.long()] += 1
    # 60 draws of a tenth: 1200 ± 28 in every third of the places, and 6 ± 2.3 in each place.
    assert bool(((hits.reshape(3, 200).sum(1) - 1200).abs() < 5 * 28).all()) and float(hits.max()) < 6 + 6 * 2.3


def test_batches_may_be_cut_in_another_way() -> None:
    model, given = Block(), batches(6)
    joined = [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(given[::2], given[1::2], strict=True)]
    one, two = (fl.statistics(model, g, ["q", "v"], tokens=17, seed=3).of["adapter"] for g in (given, joined))
    assert torch.equal(one.of("q"), two.of("q"))


def test_masked_places_are_left_out() -> None:
    found = fl.statistics(Block(), batches(2, padded=True), ["q"], tokens=1000).of["adapter"]
    assert found.seen == {"q": 24} and found.of("q").shape == (24, 6)


def test_a_generator_is_enough() -> None:
    found = fl.statistics(Block(), (b for b in batches(2)), ["q"])
    assert found.of["adapter"].seen == {"q": 40}


def test_patches_of_convolutions_times_the_weight_are_the_outputs() -> None:
    model, x = Images().double(), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    found = fl.statistics(model, [x], ["one", "two"], tokens=1000).of["adapter"]
    for name, output in (("one", model.one(x[:, :, 0])), ("two", model.two(x))):
        module = getattr(model, name)
        places = output.flatten(2).mT.reshape(-1, 4)
        rebuilt = found.of(name).double() @ module.weight.flatten(1).mT + module.bias
        assert torch.allclose(rebuilt, places, atol=tolerances.FLOAT32)  # rows are kept in float32


def test_peft_models_have_the_names_of_their_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = Block()
    given = batches(2)
    plain = fl.statistics(model, given, ["q", "v"]).of["adapter"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q", "k"]))
    with torch.no_grad():
        wrapped.base_model.model.q.lora_B["default"].weight.fill_(1.0)
    found = fl.statistics(wrapped, given, ["q", "v"]).of["adapter"]
    assert torch.equal(found.of("q"), plain.of("q")) and not torch.equal(found.of("v"), plain.of("v"))


def test_a_file_holds_them(tmp_path: Path) -> None:
    model = Block().bfloat16()
    found = fl.statistics(model, {"a": batches(1), "b": batches(2)}, ["q", "k", "v"])
    assert found.of["a"].of("q").dtype == torch.bfloat16
    path = found.save(tmp_path / "s.safetensors")
    again = fl.Statistics.load(path)
    for name in "ab":
        assert again.of[name].sites == found.of[name].sites and again.of[name].seen == found.of[name].seen
        assert all(torch.equal(again.of[name].rows[s], x) for s, x in found.of[name].rows.items())
    with pytest.raises(OutputError, match="exists"):
        found.save(path)
    found.save(path, overwrite=True)
    with pytest.raises(InputError, match="another suffix"):
        found.save(tmp_path / "s.bin")
    with pytest.raises(InputError, match="'a' are given twice"):
        found | again
    one, two = (fl.Statistics({n: found.of[n]}) for n in "ab")
    assert list((one | two).of) == ["a", "b"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = fl.statistics(Block(), {"a": batches(1)}, ["q"]).save(tmp_path / "s.safetensors")
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)

    def written(tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> Path:
        save_file(tensors, tmp_path / "t.safetensors", metadata)
        return tmp_path / "t.safetensors"

    with pytest.raises(InputError, match="holds no statistics"):
        fl.Statistics.load(written(tensors, None))
    with pytest.raises(InputError, match='there are no rows of "q"'):
        fl.Statistics.load(written({"a/v": tensors["a/q"]}, metadata))
    with pytest.raises(InputError, match="belongs to no adapter"):
        fl.Statistics.load(written({**tensors, "b/q": tensors["a/q"].clone()}, metadata))
    with pytest.raises(NonFiniteError, match="NaN"):
        fl.Statistics.load(written({"a/q": torch.full_like(tensors["a/q"], torch.nan)}, metadata))
    broken = {**metadata, "fastlora": metadata["fastlora"].replace('"sites": {', '"sites": {"x": 3, ')}
    with pytest.raises(InputError, match="is not understood"):
        fl.Statistics.load(written(tensors, broken))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": ["q", "missing.q"]}, "has 1 of the 2 modules; it lacks missing.q"),
        ({"modules": []}, "no modules are named"),
        ({"modules": ["embed"]}, "'embed' is a Embedding"),
        ({"batches": []}, "no batches for 'adapter'"),
        ({"batches": {}}, "there are no batches"),
        ({"tokens": 0}, "tokens=0"),
    ],
)
def test_what_cannot_be_collected_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"batches": batches(1), "modules": ["q"], **change}
    with pytest.raises(InputError, match=message):
        fl.statistics(Block(), **arguments)


def test_an_idle_module_and_nan_are_refused() -> None:
    model = Block()
    model.idle = nn.Linear(2, 2)
    with pytest.raises(InputError, match="reached idle: 1 of 2"):
        fl.statistics(model, batches(1), ["q", "idle"])
    with torch.no_grad():
        model.embed.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="inputs of module 'q' hold NaN"):
        fl.statistics(model, batches(1), ["q"])
    assert not model.q._forward_pre_hooks
