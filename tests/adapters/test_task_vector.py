"""Full fine-tunes: their changes, arithmetic on them, files, and LoRA adapters made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gaussian
from safetensors import safe_open
from safetensors.torch import save_file
from tolerances import FLOAT32, MODEL32, ROUNDED32, SUMS32
from torch import Tensor, nn

import fastlora as fl
from fastlora.adapters.task_vector import TaskVector

SHAPES = {
    "embeddings.word_embeddings.weight": (30, 8), "layers.0.q.weight": (12, 8), "layers.0.q.bias": (12,),
    "layers.0.norm.weight": (8,), "conv.weight": (6, 4, 3, 3), "scale": (),
}  # fmt: skip


def state(seed: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> dict[str, Tensor]:
    found = {
        n: spread * gaussian(math.prod(s), seed=seed + i, dtype=torch.float64).reshape(s)
        for i, (n, s) in enumerate(SHAPES.items())
    }
    return {n: t.to(dtype) for n, t in found.items()}


BASE = state(1)


def tuned(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    change = state(seed, spread=0.1)
    return {n: (BASE[n].to(dtype).float() + change[n]).to(dtype) for n in BASE}


ONE, TWO, THREE = tuned(100), tuned(200), tuned(300)


def vector(found: dict[str, Tensor], name: str) -> TaskVector:
    return fl.task_vector(BASE, found, name)


def exact(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: found[n].double() - BASE[n].double() for n in BASE}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], relative: float = FLOAT32) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert float((got[name].double() - value).norm()) <= relative * float(value.norm()), name


def test_the_change_of_every_parameter() -> None:
    one = vector(ONE, "one")
    assert_close(one.deltas, exact(ONE), ROUNDED32)
    assert one.norm == pytest.approx(math.sqrt(sum(float(d.square().sum()) for d in exact(ONE).values())))
    assert {d.dtype for d in one.deltas.values()} == {torch.float32}
    assert fl.task_vector(state(1, torch.float64), tuned(9, torch.float64)).deltas["scale"].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_applying_it_gives_the_fine_tune_back(dtype: torch.dtype) -> None:
    base, found = {n: t.to(dtype) for n, t in BASE.items()}, tuned(100, dtype)
    again = fl.task_vector(base, found).apply(base)
    eps = torch.finfo(dtype).eps
    for name, value in found.items():
        assert again[name].dtype == dtype
        assert bool(((again[name].double() - value.double()).abs() <= eps * value.double().abs().clamp(min=1e-3)).all())


def test_arithmetic() -> None:
    a, b, c = vector(ONE, "a"), vector(TWO, "b"), vector(THREE, "c")
    x, y, z = exact(ONE), exact(TWO), exact(THREE)
    assert_close((0.7 * a - 2 * b + c / 4).deltas, {n: 0.7 * x[n] - 2 * y[n] + z[n] / 4 for n in x})
    assert_close((-a).deltas, {n: -x[n] for n in x}, ROUNDED32)
    assert_close(fl.negate(a, 0.3).deltas, {n: -0.3 * x[n] for n in x})
    assert_close(fl.analogy(a, b, c, 0.6, 0.4).deltas, {n: 0.6 * x[n] + 0.4 * (y[n] - z[n]) for n in x})
    assert_close(fl.add([a, b], [1.0, 3.0], semantics="pem").deltas, {n: 0.25 * x[n] + 0.75 * y[n] for n in x})
    applied = (0.7 * a + 0.3 * b).apply(BASE)
    for n in x:
        torch.testing.assert_close(
            applied[n].double(), BASE[n].double() + 0.7 * x[n] + 0.3 * y[n], rtol=FLOAT32, atol=FLOAT32
        )


def test_parameters_that_did_not_change_count_as_zero() -> None:
    found = {**ONE, "scale": BASE["scale"]}
    assert "scale" not in vector(found, "a")
    total = vector(found, "a") + vector(TWO, "b")
    assert_close({"scale": total.deltas["scale"]}, {"scale": exact(TWO)["scale"]})
    assert torch.equal(vector(found, "a").apply(BASE)["scale"], BASE["scale"])


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_files(dtype: str | None, tmp_path: Path) -> None:
    one = vector(ONE, "one")
    path = one.save(tmp_path / "one.safetensors", dtype=dtype)
    again = fl.load(path)
    assert isinstance(again, TaskVector) and again.name == "one" and again.provenance == one.provenance
    expected = {n: d.to(getattr(torch, dtype or "float32")) for n, d in one.deltas.items()}
    assert again.deltas.keys() == expected.keys()
    assert all(torch.equal(again.deltas[n], expected[n]) for n in expected)
    with safe_open(path, "pt") as file:
        assert '"kind": "task_vector"' in file.metadata()["fastlora"]
    with pytest.raises(fl.OutputError, match="exists; choose another name"):
        one.save(path)
    one.save(path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    one = vector(ONE, "one")
    with pytest.raises(fl.OutputError, match=r"ends in \.safetensors"):
        one.save(tmp_path / "one")
    with pytest.raises(fl.OutputError, match="is a directory"):
        (tmp_path / "x.safetensors").mkdir()
        one.save(tmp_path / "x.safetensors")
    with pytest.raises(fl.OutputError, match="changes nothing"):
        fl.task_vector(BASE, BASE).save(tmp_path / "zero.safetensors")
    with pytest.raises(fl.OutputError, match="beyond the largest float16"):
        (one * 1e7).save(tmp_path / "big.safetensors", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_sources(tmp_path: Path) -> None:
    """Mappings, files of both kinds, directories of one file and of several."""
    expected = vector(ONE, "x").deltas
    for folder, found in (("base", BASE), ("v1.5", ONE)):
        (tmp_path / folder).mkdir()
        names = list(found)
        save_file({n: found[n] for n in names[:3]}, tmp_path / folder / "model-00001-of-00002.safetensors")
        save_file({n: found[n] for n in names[3:]}, tmp_path / folder / "model-00002-of-00002.safetensors")
        save_file(found, tmp_path / f"{folder}.safetensors")
        torch.save(found, tmp_path / f"{folder}.bin")
    for base, one in (("base", "v1.5"), ("base.safetensors", "v1.5.safetensors"), ("base.bin", "v1.5.bin")):
        got = fl.task_vector(tmp_path / base, tmp_path / one)
        assert got.name == "v1.5" and all(torch.equal(got.deltas[n], expected[n]) for n in expected)
    assert torch.equal(vector(ONE, "x").apply(str(tmp_path / "base"))["scale"], ONE["scale"])


def changed(name: str, value: Tensor | None) -> dict[str, Tensor]:
    return {n: t for n, t in {**ONE, name: value}.items() if t is not None}


BAD = torch.full((12, 8), math.nan)
REFUSED: dict[str, tuple[Any, str]] = {
    "lacks one": (changed("scale", None), "only one of the two models has scale, .*common_only=True"),
    "has more": (changed("head.weight", torch.ones(2)), "only one of the two models has head.weight"),
    "shape": (changed("layers.0.q.bias", torch.ones(13)), r"layers.0.q.bias is \[12\] in one and \[13\]"),
    "nan": (changed("layers.0.q.weight", BAD), "layers.0.q.weight holds NaN or Inf"),
    "no tensor": ({"a": 1}, "'a', which is no tensor"),
    "an adapter": (str(Path(__file__).parents[1] / "data" / "movie_ia3_a"), "is an adapter and no whole model"),
    "no file": ("/nowhere/model.safetensors", "no file or directory /nowhere/model.safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    found, message = REFUSED[case]
    with pytest.raises(fl.InputError, match=message):
        fl.task_vector(BASE, found)


def test_common_parameters_only() -> None:
    got = fl.task_vector(BASE, changed("head.weight", torch.ones(2)), "x", common_only=True)
    assert_close(got.deltas, exact(ONE), ROUNDED32)
    assert len(got.notes) == 1
    assert got.notes[0].startswith(
        "task vector 'x': only one of the models has head.weight, left out; what the fine-tune"
    )


def test_buffers_are_no_parameters() -> None:
    first = {**BASE, "steps": torch.tensor(3), "positions": torch.arange(4)}
    got = fl.task_vector(first, {**ONE, "steps": torch.tensor(7), "positions": torch.arange(4)}, "x")
    assert "steps" not in got and got.notes == ("task vector 'x': steps differ and are no parameters, left out",)


def test_applying_it_to_another_model_is_refused() -> None:
    one = vector(ONE, "one")
    with pytest.raises(fl.InputError, match="changes scale, which the base model does not have"):
        one.apply({n: t for n, t in BASE.items() if n != "scale"})
    with pytest.raises(fl.InputError, match=r"layers.0.q.bias is \[13\]"):
        one.apply({**BASE, "layers.0.q.bias": torch.ones(13)})


def test_hostile_files(tmp_path: Path) -> None:
    one = vector(ONE, "one")
    path = one.save(tmp_path / "one.safetensors")
    raw = path.read_bytes()
    path.write_bytes(raw[:-10])
    with pytest.raises(fl.FastloraError, match=r"one.safetensors"):
        fl.load(path)
    one.deltas["scale"] = torch.tensor(1.0)
    path.write_bytes(raw[:-4] + torch.tensor(math.nan).numpy().tobytes())
    with pytest.raises(fl.InputError, match="holds NaN or Inf"):
        fl.load(path)
    save_file(BASE, tmp_path / "model.safetensors")
    with pytest.raises(fl.UnsupportedAdapter, match=r"fl\.task_vector"):
        fl.load(tmp_path / "model.safetensors")


FACTS: dict[str, object] = {
    "a list": [1],
    "a text": "in_out",
    "unknown": {"colour": "red"},
    "names that are none": {"in_out": [1]},
    "a flag that is none": {"in_out_experts": "yes"},
    "ties to nothing": {"ties": {"a": 1}},
    "a size that is none": {"excluded": -1},
    "shapes that are none": {"still": {"a": [0, 4]}},
}


@pytest.mark.parametrize("case", FACTS)
def test_metadata_of_other_forms_are_refused(case: str, tmp_path: Path) -> None:
    data = json.dumps({"kind": "task_vector", "provenance": {}, "facts": FACTS[case]})
    save_file(BASE, tmp_path / "tau.safetensors", {"fastlora": data})
    with pytest.raises(fl.InputError, match="in a form that is not understood; make the task vector again"):
        fl.load(tmp_path / "tau.safetensors")


@pytest.mark.parametrize("fused", [True, False])
def test_metadata_cannot_ask_for_memory(fused: bool, tmp_path: Path) -> None:
    """The sizes of experts that did not change come from the file, too."""
    name = "mlp.experts.0.gate_proj"
    still = {"mlp.experts.0.up_proj": [1 << 30, 1 << 30], "mlp.experts.0.down_proj": [4, 4]}
    facts = {"fused_later": fused, "still": still}
    save_file({f"{name}.weight": torch.ones(4, 4)}, tmp_path / "tau.safetensors",
              {"fastlora": json.dumps({"kind": "task_vector", "facts": facts})})  # fmt: skip
    tau = fl.load(tmp_path / "tau.safetensors")
    assert isinstance(tau, TaskVector)
    with pytest.raises(fl.InputError, match=r"mlp\.experts\.0\.up_proj .*far larger"):
        tau.extract(1)


def planted(rank: int, seed: int = 7) -> dict[str, Tensor]:
    """A fine-tune whose changes of weights have exactly this rank."""
    found = dict(BASE)
    for i, (name, shape) in enumerate(SHAPES.items()):
        if len(shape) >= 2:
            n, m = shape[0], math.prod(shape[1:])
            change = gaussian(n, rank, seed=seed + i) @ gaussian(rank, m, seed=seed + 50 + i)
            found[name] = BASE[name] + change.reshape(shape)
    return found


def dense(adapter: fl.Adapter, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every ``ΔW`` of an adapter as the weight's change."""
    found = {}
    for module, update in adapter.updates.items():
        delta = adapter.delta(module).double()
        delta = delta.mT if update.layout.kind == "embedding" else delta
        found[f"{module}.weight"] = delta.reshape(base[f"{module}.weight"].shape)
    return found


def test_extracting_what_has_low_rank() -> None:
    one = fl.task_vector(BASE, planted(2), "one")
    adapter = one.extract(rank=4)
    assert {u.rank for u in adapter.updates.values()} == {2}
    kinds = {m: u.layout.kind for m, u in adapter.updates.items()}
    assert kinds == {"embeddings.word_embeddings": "embedding", "layers.0.q": "linear", "conv": "conv"}
    weights = {n: d.double() for n, d in one.deltas.items()}
    assert_close(dense(adapter, BASE), weights, SUMS32)
    assert adapter.provenance["retained_energy"] == pytest.approx(1.0) and adapter.notes == ()


@pytest.mark.parametrize(("rank", "energy"), [(1, None), (3, None), (None, 0.5), (None, 0.9), (None, 1.0)])
def test_extracting_is_the_best_approximation(rank: int | None, energy: float | None) -> None:
    one = vector(ONE, "one")
    adapter = one.extract(rank, energy=energy)
    kept = 0.0
    for name, got in dense(adapter, BASE).items():
        matrix = one.deltas[name].double().flatten(1)
        sigma = torch.linalg.svdvals(matrix)
        used = adapter.updates[name.removesuffix(".weight")].rank
        if rank is not None:
            assert used == rank
        else:
            shares = sigma.square().cumsum(0) / sigma.square().sum()
            assert used == len(sigma) or shares[used - 1] >= energy > (shares[used - 2] if used > 1 else 0.0)
        error = float((got.flatten(1) - matrix).norm())
        assert error == pytest.approx(float(sigma[used:].norm()), abs=2 * FLOAT32)
        kept += float(sigma[:used].square().sum())
    assert adapter.provenance["retained_energy"] == pytest.approx(kept / one.norm**2)
    assert len(adapter.notes) == 1 and "the changes of 3 parameters that are no weight matrices" in adapter.notes[0]


def test_biases_are_kept_on_demand() -> None:
    one = vector(ONE, "one")
    extra = one.extract(2, biases=True, embeddings=[]).extras["layers.0.q.bias"]
    assert extra.kind == "delta" and torch.equal(extra.tensor, one.deltas["layers.0.q.bias"])


def test_biases_beside_embeddings_are_refused_before_anything_is_cut() -> None:
    """PEFT has no adapter with both."""
    with pytest.raises(
        fl.InputError, match=r"changes biases \(layers.0.q.bias\) and embeddings.word_embeddings.*whole="
    ):
        vector(ONE, "one").extract(2, biases=True)


def test_extraction_settings() -> None:
    one = vector(ONE, "one")
    assert one.extract(2, embeddings=[]).updates["embeddings.word_embeddings"].layout.kind == "linear"
    flipped = one.extract(2, embeddings=[], fan_in_fan_out=True)
    assert flipped.update("layers.0.q").shape == (8, 12) and flipped.base.fan_in_fan_out
    for wrong, message in (({}, "give rank=N or energy=X"), ({"rank": 1, "energy": 0.5}, "one of the two"),
                           ({"rank": 0}, "rank=0"), ({"energy": 1.5}, "energy=1.5")):  # fmt: skip
        with pytest.raises(fl.InputError, match=message):
            one.extract(**wrong)
    with pytest.raises(fl.InputError, match="changes no weight matrix"):
        TaskVector("x", {"layers.0.norm.weight": torch.ones(8)}).extract(1)


def test_decompose_works_on_what_was_extracted() -> None:
    """Fine-tunes that share a direction: it is found, and the parts add up to the approximation."""
    common = {n: gaussian(s[0], 1, seed=31 + i) for i, (n, s) in enumerate(SHAPES.items()) if len(s) >= 2}
    found = []
    for k in range(2):
        changes = dict(BASE)
        for i, (n, left) in enumerate(common.items()):
            own = gaussian(left.shape[0], 1, seed=400 * (k + 1) + i)
            right = gaussian(2, math.prod(SHAPES[n][1:]), seed=900 * (k + 1) + i)
            changes[n] = BASE[n] + (torch.cat([left, own], 1) @ right).reshape(SHAPES[n])
        found.append(fl.task_vector(BASE, changes, f"task{k}").extract(rank=2, embeddings=[]))
    parts = fl.decompose(fl.Pool(found), 0.99)
    assert {u.rank for u in parts.shared.updates.values()} == {1}
    for module in found[0].modules:
        whole = parts.shared_of("task0").delta(module) + parts.unique_of("task0").delta(module)
        torch.testing.assert_close(whole, found[0].delta(module), rtol=MODEL32, atol=SUMS32)


def test_peft_loads_what_was_extracted(tmp_path: Path) -> None:
    """The base model with the adapter computes what the fine-tune does."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'fastlora[peft]')")

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 12), nn.Linear(12, 4))

    base, fine = model(), model()
    with torch.no_grad():
        for parameter in fine.parameters():
            if parameter.dim() == 2:
                parameter += gaussian(parameter.shape[0], 2, seed=1) @ gaussian(2, parameter.shape[1], seed=2)
    adapter = fl.task_vector(base.state_dict(), fine.state_dict(), "x").extract(rank=2, embeddings=["0"])
    adapter.save(tmp_path / "x")
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "x"))
    tokens = torch.arange(30)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens), fine(tokens), rtol=MODEL32, atol=MODEL32)
