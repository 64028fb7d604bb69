"""DoRAs of one base model as one DoRA: against the definition on dense float64 matrices, and PEFT's merged weights."""

from __future__ import annotations

import functools
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
from tests.cli.command import done, refused

SHAPES = {"layers.0.q_proj": (24, 17), "layers.0.o_proj": (17, 24)}
BASE = {f"{m}.weight": gaussian(*s, seed=90 + i) for i, (m, s) in enumerate(SHAPES.items())}
WEIGHTS = {"one": 0.7, "two": -0.4, "plain": 0.5}


def updates(seed: int, dtype: torch.dtype = torch.float32, rank: int = 2) -> dict[str, Update]:
    found = {}
    for i, (module, (n, m)) in enumerate(SHAPES.items()):
        b, a = gaussian(n, rank, seed=seed + 3 * i), gaussian(rank, m, seed=seed + 3 * i + 1)
        found[module] = Update(Factor.of("B", b.to(dtype)), Factor.of("A", a.to(dtype)), 0.5)
    return found


def dora(name: str, seed: int, axis: str = "out", dtype: torch.dtype = torch.float32, rank: int = 2) -> fl.DoRA:
    magnitudes = {}
    for i, (module, shape) in enumerate(SHAPES.items()):
        vector = 3 + 0.3 * gaussian(1, shape[0 if axis == "out" else 1], seed=seed + 3 * i + 2)[0]
        magnitudes[module] = Magnitude(vector.to(dtype), axis)  # type: ignore[arg-type]
    return fl.DoRA(name, updates(seed, dtype, rank), magnitudes, dtype=dtype)


def dense(adapter: fl.DoRA | fl.Adapter, module: str) -> Tensor:
    update = adapter.updates[module]
    left, right = (f.terms[0].source.double() for f in (update.B, update.A))
    return update.scaling * left @ right


def defined(adapters: list[fl.DoRA | fl.Adapter], weights: dict[str, float], module: str, dim: int) -> Tensor:
    """``W'`` of the definition in float64."""
    base = BASE[f"{module}.weight"].double()
    whole, own = base.clone(), base.norm(dim=dim)
    magnitude = own.clone()
    for adapter in adapters:
        if module in adapter:
            weight, delta = weights[adapter.name], dense(adapter, module)
            whole += weight * delta
            stored = adapter.magnitudes.get(module) if isinstance(adapter, fl.DoRA) else None
            theirs = (base + delta).norm(dim=dim) if stored is None else stored.vector.double()
            magnitude += weight * (theirs - own)
    return magnitude.unsqueeze(dim) * whole / whole.norm(dim=dim, keepdim=True)


def weight_of(adapter: fl.DoRA, module: str, dim: int) -> Tensor:
    """``W'`` of a DoRA in float64."""
    left, right = (f.stored for f in (adapter.updates[module].B, adapter.updates[module].A))
    if left is None or right is None:
        plain = fl.Adapter("plain", {module: adapter.updates[module]})
        delta = plain.delta(module).double()
    else:
        delta = adapter.updates[module].scaling * left.double() @ right.double()
    whole = BASE[f"{module}.weight"].double() + delta
    return adapter.magnitude(module).unsqueeze(dim) * whole / whole.norm(dim=dim, keepdim=True)


def near(found: Tensor, expected: Tensor, tolerance: float = SUMS32) -> None:
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_is_the_definition(axis: str, dtype: torch.dtype) -> None:
    """Also with a LoRA in it, and a module that one adapter lacks."""
    two = dora("two", 50, axis, dtype, rank=3)
    lacking = "layers.0.o_proj"
    two = replace(
        two,
        updates={m: u for m, u in two.updates.items() if m != lacking},
        magnitudes={m: v for m, v in two.magnitudes.items() if m != lacking},
    )
    given: list[fl.DoRA | fl.Adapter] = [dora("one", 5, axis, dtype), two, fl.Adapter("plain", updates(70, dtype))]
    found = fl.recombine(given, WEIGHTS, base=BASE)
    assert list(found.magnitudes) == list(SHAPES) and found.updates[lacking].rank == 4
    for module in SHAPES:
        dim = 1 if axis == "out" else 0
        near(weight_of(found, module, dim), defined(given, WEIGHTS, module, dim))


def test_one_gives_itself_none_the_base_and_order_does_not_count() -> None:
    one, two = dora("one", 5), dora("two", 50)
    same = fl.recombine([one, two], {"one": 1.0}, base=BASE)
    nothing = fl.recombine([one, two], {"one": 0.0, "two": 0.0}, base=BASE)
    assert same.notes[-1] == "two has no weight and counts 0"
    both, swapped = (fl.recombine(x, {"one": 0.5, "two": 2.0}, base=BASE) for x in ([one, two], [two, one]))
    for module in SHAPES:
        near(same.magnitude(module), one.magnitude(module), FLOAT32)
        near(weight_of(same, module, 1), defined([one], {"one": 1.0}, module, 1))
        near(weight_of(nothing, module, 1), BASE[f"{module}.weight"].double())
        near(both.magnitude(module), swapped.magnitude(module), FLOAT32)


def test_modules_without_magnitudes_are_plain_sums() -> None:
    """With the norms of the sum where a PEFT directory needs one; of columns none is made up."""
    for axis in ("out", "in"):
        one, two = (
            replace(d, magnitudes={"layers.0.q_proj": d.magnitudes["layers.0.q_proj"]})
            for d in (dora("one", 5, axis), dora("two", 50, axis))
        )
        found = fl.recombine([one, two], {"one": 2.0, "two": -1.0}, base=BASE)
        assert ("layers.0.o_proj" in found.magnitudes) == (axis == "out")
        plain = 2.0 * dense(one, "layers.0.o_proj") - dense(two, "layers.0.o_proj")
        if axis == "out":
            expected = BASE["layers.0.o_proj.weight"].double() + plain
            near(weight_of(found, "layers.0.o_proj", 1), expected)


def test_a_cut_leaves_magnitudes() -> None:
    one, two = dora("one", 5), dora("two", 50)
    whole, cut = (fl.recombine([one, two], base=BASE, rank=rank) for rank in (None, 3))
    for module in SHAPES:
        assert cut.updates[module].rank == 3 and whole.updates[module].rank == 4
        assert torch.equal(cut.magnitude(module), whole.magnitude(module))
        delta = dense(one, module) + dense(two, module)
        left = torch.linalg.svdvals(delta)[3:].norm()
        found = fl.Adapter("cut", {module: cut.updates[module]}).delta(module).double()
        assert float((found - delta).norm()) <= 1.001 * float(left)


def test_huge_and_tiny_weights_keep_their_norms() -> None:
    one = dora("one", 5)
    for scale in (1e-18, 1e18):
        base = {n: w * scale for n, w in BASE.items()}
        found = fl.recombine([one, dora("two", 50)], {"one": 0.0, "two": 0.0}, base=base)
        for module in SHAPES:
            near(found.magnitude(module), base[f"{module}.weight"].double().norm(dim=1))


def test_bad_input_is_one_sentence() -> None:
    one, columns = dora("one", 5), dora("two", 50, "in")
    with pytest.raises(fl.InputError, match="no adapter has magnitudes, so this is a sum of LoRAs"):
        fl.recombine([fl.Adapter("plain", updates(5))], base=BASE)
    with pytest.raises(fl.InputError, match=r"24 magnitudes of its outputs in 'one', and 17 of its inputs in 'two'"):
        fl.recombine([one, columns], base=BASE)
    with pytest.raises(fl.InputError, match="weights name 'three'"):
        fl.recombine([one], {"three": 1.0}, base=BASE)
    with pytest.raises(fl.InputError, match=r"adapts layers\.0\.o_proj, which .* does not have"):
        fl.recombine([one], base={k: v for k, v in BASE.items() if "q_proj" in k})
    bad = BASE["layers.0.q_proj.weight"].clone()
    bad[3, 3] = torch.nan
    with pytest.raises(fl.InputError, match="NaN or Inf in the base model"):
        fl.recombine([one], base={**BASE, "layers.0.q_proj.weight": bad})
    assert "magnitudes are 0 or negative" in fl.recombine([one], {"one": -40.0}, base=BASE).notes[-1]


def test_fused_beside_parts_names_the_way_out() -> None:
    parts = {f"layers.0.self_attn.{p}_proj": (8, 6) for p in "qkv"}
    fused = {"layers.0.self_attn.qkv_proj": (24, 6)}

    def of(name: str, shapes: dict[str, tuple[int, int]]) -> fl.DoRA:
        found = {
            m: Update(Factor.of("B", gaussian(n, 2, seed=i)), Factor.of("A", gaussian(2, k, seed=9)), 1.0)
            for i, (m, (n, k)) in enumerate(shapes.items())
        }
        return fl.DoRA(name, found, {m: Magnitude(torch.ones(n), "out") for m, (n, _) in shapes.items()})

    base = {f"{m}.weight": gaussian(*s, seed=3) for m, s in parts.items()}
    with pytest.raises(fl.InputError, match=r"stored in another form.*fl\.to_lora\(adapter, BASE\)"):
        fl.recombine([of("one", parts), of("two", fused)], base=base)


def test_peft_merges_what_is_written(tmp_path: Path) -> None:
    """Linear modules, GPT-2's, convolutions and embeddings: the merged weights are those of the definition."""
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
        base = model[name].weight.detach().clone()
        config = peft.LoraConfig(
            r=2, lora_alpha=3, target_modules=[name], use_dora=True, init_lora_weights=False, fan_in_fan_out=turned
        )
        merged, paths = [], []
        for i in range(2):
            adapted = peft.get_peft_model(nn.ModuleDict({name: model[name]}), config)
            layer = adapted.base_model.model[name]
            with torch.no_grad():
                layer.lora_magnitude_vector["default"].weight.mul_(1.2 + i)
            paths.append(tmp_path / f"{name}{i}")
            adapted.save_pretrained(paths[-1])
            layer.merge()
            merged.append(layer.base_layer.weight.detach().double())
            model[name] = layer.base_layer
            model[name].weight.data.copy_(base)
        weights = {f"{name}0": 0.6, f"{name}1": 0.3}
        given = [fl.load(p) for p in paths]
        result = fl.recombine(given, weights, base={f"{name}.weight": base})  # type: ignore[arg-type]
        result.save(tmp_path / name)
        loaded = peft.PeftModel.from_pretrained(nn.ModuleDict({name: model[name]}), tmp_path / name)
        layer = loaded.base_model.model[name]
        layer.merge()
        found = layer.base_layer.weight.detach().double()
        norms = [d for d in range(base.dim()) if d != (1 if name in ("c_fc", "emb") else 0)]
        length = functools.partial(torch.linalg.vector_norm, dim=norms, keepdim=True)
        own = length(base.double())
        whole, magnitude = base.double(), own.clone()
        for adapter, after in zip(given, merged, strict=True):
            assert isinstance(adapter, fl.DoRA)
            delta = dense(adapter, name)
            delta = delta.mT if name in ("c_fc", "emb") else delta
            whole = whole + weights[adapter.name] * delta.reshape(base.shape)
            magnitude += weights[adapter.name] * (length(after) - own)
        expected = magnitude * whole / length(whole)
        near(found, expected, 10 * FLOAT32)
        model[name] = layer.base_layer
        model[name].weight.data.copy_(base)


def test_the_command(tmp_path: Path) -> None:
    one, two = dora("one", 5), dora("two", 50)
    for adapter in (one, two):
        adapter.save(tmp_path / adapter.name)
    save_file(BASE, tmp_path / "base.safetensors")
    whole = ("--base", "base.safetensors", "--dora", "recombine")
    printed = done("merge", "one:0.7", "two:0.3", *whole, "-o", "out", cwd=tmp_path)
    assert "out: DoRA, 2 modules, 2 with magnitudes" in printed.out
    found = fl.load(tmp_path / "out")
    assert isinstance(found, fl.DoRA)
    for module in SHAPES:
        near(weight_of(found, module, 1), defined([one, two], {"one": 0.7, "two": 0.3}, module, 1))
    data = done("merge", "one", "two", *whole, "-o", "free", "--json", cwd=tmp_path).json()
    assert data["kind"] == "DoRA" and any("weight of one" in note for note in data["notices"])
    assert "give --base MODEL" in refused("merge", "one", "two", "--dora", "recombine", "-o", "x", cwd=tmp_path)
    assert "leave out --method" in refused("merge", "one", *whole, "--method", "ties", "-o", "x", cwd=tmp_path)
    assert "there are nearest, recombine" in refused(
        "merge", "one", "--base", "base.safetensors", "--dora", "add", "-o", "x", cwd=tmp_path
    )
    assert not (tmp_path / "x").exists()
    done("merge", "one", "two", *whole[:2], "--dora", "nearest", "-o", "lora", "-q", cwd=tmp_path)
    assert isinstance(fl.load(tmp_path / "lora"), fl.Adapter)
