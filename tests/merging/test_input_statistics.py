"""Inputs of modules, collected from running models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastlora as fl
from fastlora.errors import InputError, NonFiniteError, OutputError
from fastlora.merging.site_factors import RIDGE


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


def wide(seed: int, out: int = 64) -> Any:
    """A model with inputs of 64 numbers, of which 8 rows for each of two adapters are few, and batches for it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, out))
    return model, {n: [torch.randn(8, 64)] for n in "ab"}


def pool_for(model: Any, names: str = "ab") -> fl.Pool:
    pairs = {m: (torch.randn(len(model[int(m)].weight), 2), torch.randn(2, 64)) for m in "02"}
    return fl.Pool([fl.Adapter.from_tensors(pairs, name=n) for n in names])


@pytest.mark.parametrize("names", ["ab", "ba"])
@pytest.mark.parametrize("memory", [None, 2**28])
def test_products_are_collected_and_saved_with_their_rows(
    names: str, memory: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastlora.merging import input_rows

    model, given = wide(0)
    pool = pool_for(model, names)
    data = fl.statistics(model, given, pool.modules)
    fresh = fl.decompose(pool, inputs=fl.Statistics(data.of))
    loaded = fl.Statistics.load(data.save(tmp_path / "s.safetensors"))
    second = fl.Statistics.load(loaded.save(tmp_path / "again.safetensors"))
    monkeypatch.setattr(input_rows, "row_grams", lambda sites: [None for _ in sites] if sites else [])
    monkeypatch.setattr(torch.linalg, "cholesky_ex", None)
    for statistics in (data, loaded, second):
        found = fl.decompose(pool, inputs=statistics, memory=memory)
        for name in names:
            for module in pool.modules:
                wanted = fresh.unique_of(name).delta(module)
                assert torch.equal(found.unique_of(name).delta(module), wanted)


def test_products_larger_than_their_rows_are_left_for_later(tmp_path: Path) -> None:
    model, given = wide(1)
    small = fl.statistics(model, given, ["0", "2"])
    large = fl.statistics(model, {n: [*b, torch.randn(1, 64)] for n, b in given.items()}, ["0", "2"])
    few, more = (s.save(tmp_path / f"{i}.safetensors") for i, s in enumerate((small, large)))
    rows = 2 * 2 * 8 * 64 * 4
    assert len(load_file(more)) == 4 and len(load_file(few)) == 4 + 2 * 2
    assert sum(x.nbytes for x in load_file(few).values()) == 2 * rows, "they take no more than the rows"
    fl.decompose(pool_for(model), inputs=large)
    large.save(more, overwrite=True)
    assert len(load_file(more)) == 4, "also when they are there"


def test_products_of_one_adapter_stay_where_statistics_are_joined() -> None:
    model, given = wide(2)
    parts = [fl.statistics(model, {n: given[n]}, ["0", "2"]) for n in "ab"]
    joined = parts[0] | parts[1]
    one = joined.places(["0"], ["b"])
    assert list(one) == [(("b", "0"),)] and torch.equal(*(s.grams(list(one))[0] for s in (joined, parts[1])))
    assert joined.grams(list(one))[0] is parts[1].grams(list(one))[0]
    (inverse, _), (wanted, _) = (s.kept(*one)[RIDGE] for s in (joined, parts[1]))
    assert inverse is wanted is not None


def test_zero_rows_have_products_and_no_inverse(tmp_path: Path) -> None:
    model, given = wide(3)
    data = fl.statistics(model, {n: [torch.zeros_like(x) for x in b] for n, b in given.items()}, ["0"])
    again = fl.Statistics.load(data.save(tmp_path / "s.safetensors"))
    (places,) = again.places(["0"], list("ab"))
    assert float(again.grams([places])[0].norm()) == 0.0 and not again.kept(places)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, _: t.update({"/0/products": t["/0/products"][:-1].contiguous()}), "do not belong to its rows"),
        (lambda t, _: t.update({"/0/inverse": t["/0/inverse"].float()}), "do not belong to its rows"),
        (lambda t, _: t.pop("/0/inverse"), "do not belong to its rows"),
        (lambda t, _: t["/0/products"].fill_(torch.nan), "products of its rows hold NaN"),
        (lambda _, d: d["products"][0]["places"].append(["c", "0"]), "do not belong to its rows"),
        (lambda _, d: d["products"][0].update(epsilon=-1.0), "do not belong to its rows"),
        (lambda _, d: d["products"].insert(0, 3), "do not belong to its rows"),
        (lambda _, d: d.update(products={}), "holds no statistics"),
        (lambda _, d: d.pop("products"), "'/0/inverse' belongs to no adapter"),
    ],
    ids=["fewer", "float32", "no inverse", "nan", "unknown", "epsilon", "number", "table", "untold"],
)
def test_damaged_products_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    model, given = wide(4)
    path = fl.statistics(model, given, ["0"]).save(tmp_path / "s.safetensors")
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, told = dict(load_file(path)), json.loads(metadata["fastlora"])
    change(tensors, told)
    save_file(tensors, tmp_path / "t.safetensors", {**metadata, "fastlora": json.dumps(told)})
    with pytest.raises((InputError, NonFiniteError), match=message):
        fl.Statistics.load(tmp_path / "t.safetensors")


def test_files_without_products_are_read(tmp_path: Path) -> None:
    """As they were written before there were any."""
    model, given = wide(5)
    data = fl.statistics(model, given, ["0", "2"])
    from safetensors import safe_open

    with safe_open(data.save(tmp_path / "s.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    told = json.loads(metadata["fastlora"])
    del told["products"]
    rows = {k: x for k, x in load_file(tmp_path / "s.safetensors").items() if not k.startswith("/")}
    save_file(rows, tmp_path / "old.safetensors", {**metadata, "fastlora": json.dumps(told)})
    pool = pool_for(model)
    one, two = (fl.decompose(pool, inputs=s) for s in (data, fl.Statistics.load(tmp_path / "old.safetensors")))
    assert torch.equal(one.unique_of("a").delta("0"), two.unique_of("a").delta("0"))
