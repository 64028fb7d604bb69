"""A DoRA as a LoRA on its base model: against PEFT's merged weights, and against the formula in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import gaussian
from safetensors.torch import save_file
from tolerances import FLOAT32, SUMS32
from torch import Tensor, nn

import fastlora as fl
from fastlora.core.data import Magnitude
from fastlora.core.factors import Factor
from fastlora.core.updates import Update
from fastlora.engine import low_rank
from tests.cli.command import done, refused


def dora(shapes: dict[str, tuple[int, int]], axis: str = "out", seed: int = 5) -> fl.DoRA:
    updates, magnitudes = {}, {}
    for i, (module, (n, m)) in enumerate(shapes.items()):
        b, a = gaussian(n, 2, seed=seed + 3 * i), gaussian(2, m, seed=seed + 3 * i + 1)
        updates[module] = Update(Factor.of("B", b), Factor.of("A", a), 0.5)
        length = n if axis == "out" else m
        magnitudes[module] = Magnitude(1 + 0.1 * gaussian(1, length, seed=seed + 3 * i + 2)[0], axis)  # type: ignore[arg-type]
    return fl.DoRA("dora", updates, magnitudes)


def change(adapter: fl.DoRA, module: str, weight: Tensor) -> Tensor:
    """``m · V / ‖V‖ − W`` in float64."""
    update, magnitude = adapter.updates[module], adapter.magnitudes[module]
    left, right = (f.terms[0].source.double() for f in (update.B, update.A))
    whole = weight.double() + update.scaling * left @ right
    dim = 1 if magnitude.axis == "out" else 0
    vector = adapter.magnitude(module).unsqueeze(dim)
    return vector * whole / whole.norm(dim=dim, keepdim=True) - weight.double()


SHAPES = {"layers.0.q_proj": (24, 16), "layers.0.o_proj": (16, 24)}
BASE = {f"{m}.weight": gaussian(*s, seed=90 + i) for i, (m, s) in enumerate(SHAPES.items())}


@pytest.mark.parametrize("axis", ["out", "in"])
def test_all_of_it_is_the_formula(axis: str) -> None:
    adapter = dora(SHAPES, axis)
    found = fl.to_lora(adapter, BASE, energy=1.0)
    for module in SHAPES:
        expected = change(adapter, module, BASE[f"{module}.weight"])
        assert float((found.delta(module).double() - expected).norm()) <= SUMS32 * float(expected.norm())
    assert found.details["retained_energy"] == pytest.approx(dict.fromkeys(SHAPES, 1.0))


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("side", [0, 1024], ids=["range finder", "exact"])
def test_a_rank_is_the_best_of_it(axis: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "EXACT_SIDE", side)
    shapes = {"q": (160, 120)}
    adapter, weight = dora(shapes, axis), gaussian(160, 120, seed=4)
    found = fl.to_lora(adapter, {"q.weight": weight}, rank=6)
    expected = change(adapter, "q", weight)
    sigma = torch.linalg.svdvals(expected)
    error = float((found.delta("q").double() - expected).norm())
    assert found.updates["q"].rank == 6 and error <= 1.01 * float(sigma[6:].norm())
    shares = found.details["retained_energy"]
    assert isinstance(shares, dict)
    assert shares["q"] == pytest.approx(1 - error**2 / float(expected.square().sum()), abs=SUMS32)
    assert "which keeps" in found.notes[-1]


def test_names_of_the_base_model_are_matched_and_others_told() -> None:
    adapter = dora(SHAPES)
    wrapped = {f"model.{n}": t for n, t in BASE.items()}
    same = fl.to_lora(adapter, wrapped, rank=3)
    assert list(same.updates) == list(SHAPES)
    assert torch.equal(same.delta("layers.0.q_proj"), fl.to_lora(adapter, BASE, rank=3).delta("layers.0.q_proj"))
    with pytest.raises(fl.InputError, match=r"adapts layers\.0\.o_proj, which .* does not have"):
        fl.to_lora(adapter, {k: v for k, v in BASE.items() if "q_proj" in k})
    with pytest.raises(fl.InputError, match=r"float32 \[3, 3\]; the adapter needs \[24, 16\]"):
        fl.to_lora(adapter, {**BASE, "layers.0.q_proj.weight": torch.ones(3, 3)})
    for wrong in ({"rank": 0}, {"energy": 1.5}):
        with pytest.raises(fl.InputError, match=r"to_lora: (rank=0|energy=1\.5)"):
            fl.to_lora(adapter, BASE, **wrong)
    bad = BASE["layers.0.q_proj.weight"].clone()
    bad[3, 3] = torch.nan
    with pytest.raises(fl.InputError, match="NaN or Inf in the base model or in"):
        fl.to_lora(adapter, {**BASE, "layers.0.q_proj.weight": bad})


def test_plain_modules_and_plain_adapters_stay() -> None:
    adapter = dora(SHAPES)
    some = replace(adapter, magnitudes={"layers.0.q_proj": adapter.magnitudes["layers.0.q_proj"]})
    found = fl.to_lora(some, BASE)
    assert found.updates["layers.0.o_proj"] is adapter.updates["layers.0.o_proj"]
    assert fl.to_lora(found, BASE) is found


def test_the_weights_that_peft_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "lin": nn.Linear(6, 8),
            "c_fc": pytorch_utils.Conv1D(8, 5),
            "conv": nn.Conv2d(3, 4, 3),
            "emb": nn.Embedding(9, 6),
        }
    )
    for name, turned in (("lin", False), ("c_fc", True), ("conv", False), ("emb", False)):
        base = {n: t.clone() for n, t in model.state_dict().items()}
        config = peft.LoraConfig(
            r=2, lora_alpha=3, target_modules=[name], use_dora=True, init_lora_weights=False, fan_in_fan_out=turned
        )
        adapted = peft.get_peft_model(nn.ModuleDict(dict(model.items())), config)
        layer = adapted.base_model.model[name]
        with torch.no_grad():
            layer.lora_magnitude_vector["default"].weight.mul_(1.5)
        adapted.save_pretrained(tmp_path / name)
        loaded = fl.load(tmp_path / name)
        assert isinstance(loaded, fl.DoRA)
        delta = fl.to_lora(loaded, base, energy=1.0).delta(name).double()
        layer.merge()
        merged = layer.base_layer.weight.detach().double()
        expected = merged - base[f"{name}.weight"].double()
        got = delta.mT if name in ("c_fc", "emb") else delta
        assert float((got.reshape(expected.shape) - expected).norm()) <= 10 * FLOAT32 * float(merged.norm()), name
        model[name] = layer.base_layer
        model.load_state_dict(base)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, seed in (("one", 5), ("two", 50)):
        dora(SHAPES, seed=seed).save(tmp_path / name)
    save_file(BASE, tmp_path / "base.safetensors")
    return tmp_path


COMMANDS = {
    "merge": ["one:1", "two:0.5"],
    "decompose": ["one", "two"],
    "compose": ["one + 0.5*two", "one=one", "two=two"],
    "compress": ["one", "--rank", "3"],
    "modulate": ["one", "--op", "reverse:0.5"],
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_commands_take_it_with_its_base(verb: str, folder: Path) -> None:
    message = refused(verb, *COMMANDS[verb], "-o", "out", cwd=folder)
    assert "is a DoRA adapter" in message and "--base BASE" in message
    done(verb, *COMMANDS[verb], "--base", "base.safetensors", "-o", "out", "-q", cwd=folder)
    if verb == "merge":
        found = fl.load(folder / "out")
        assert isinstance(found, fl.Adapter)
        one, two = (fl.load(folder / n) for n in ("one", "two"))
        for module in SHAPES:
            weight = BASE[f"{module}.weight"]
            assert isinstance(one, fl.DoRA) and isinstance(two, fl.DoRA)
            expected = change(one, module, weight) + 0.5 * change(two, module, weight)
            assert float((found.delta(module).double() - expected).square().sum()) <= 0.02 * float(
                expected.square().sum()
            )


def test_overlap_and_folders_take_it_with_its_base(folder: Path) -> None:
    assert "overlap" in done("overlap", "one", "two", "--base", "base.safetensors", cwd=folder).out.lower()
    (folder / "all").mkdir()
    for name in ("one", "two"):
        (folder / name).rename(folder / "all" / name)
    data = done("overlap", "all", "--base", "base.safetensors", "--json", cwd=folder).json()
    assert "one" in str(data) and "two" in str(data)
