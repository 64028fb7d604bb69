"""DoRA: read, shown and kept, and refused wherever a number would need the base model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastlora as fl
from tests.dialects.files import ALPHAS, Sample, sample
from tests.tolerances import FLOAT32

REAL = Path(__file__).parents[1] / "data" / "movie_dora"


def single() -> Sample:
    """One module with magnitudes of its outputs, one of its inputs, one convolution; the others are plain."""
    file = sample("sd15", "kohya, names of diffusers", ALPHAS["half the rank"], (2,))
    stems = {m.rpartition(".")[2]: file.stems[m] for m in file.stems}
    file.tensors |= {
        f"{file.stems['up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k']}.dora_scale": torch.ones(24, 1),
        f"{stems['linear_1']}.dora_scale": torch.full((1, 24), 2.0),
        f"{stems['conv1']}.dora_scale": torch.full((1, 8, 1, 1), 3.0),
    }
    return file


def test_magnitudes_of_single_files(tmp_path: Path) -> None:
    adapter = fl.load(single().save(tmp_path / "style.safetensors"))
    assert isinstance(adapter, fl.DoRA) and len(adapter.updates) == 13
    found = {m: (v.axis, float(v.vector.flatten()[0]), v.vector.numel()) for m, v in adapter.magnitudes.items()}
    assert found == {
        "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k": ("out", 1.0, 24),
        "time_embedding.linear_1": ("in", 2.0, 24),
        "down_blocks.3.resnets.1.conv1": ("in", 3.0, 8),
    }
    assert adapter.magnitude("time_embedding.linear_1").shape == (24,)
    with pytest.raises(fl.InputError, match="has no magnitude for module 'conv_in'"):
        adapter.magnitude("conv_in")


USES: dict[str, Callable[[fl.DoRA, fl.Adapter], object]] = {
    "*": lambda dora, plain: dora * 0.5,
    "-": lambda dora, plain: plain - dora,
    "pool": lambda dora, plain: fl.Pool([dora, plain]),
    "merge": lambda dora, plain: fl.merge(fl.Pool([plain, dora])),
    "compose": lambda dora, plain: fl.compose("a + b", {"a": dora, "b": plain}),
    "compose alone": lambda dora, plain: fl.compose("a", {"a": dora}),
    "add": lambda dora, plain: fl.add([plain, dora]),
    "add alone, elementwise": lambda dora, plain: fl.add([dora], semantics="pem"),
    "negate": lambda dora, plain: fl.negate(dora),
    "compress": lambda dora, plain: fl.compress(dora, 2),
    "modulate": lambda dora, plain: fl.modulate(dora, fl.dipm.scale(0.5)),
}


@pytest.mark.parametrize("use", USES)
def test_whatever_computes_refuses_it_with_the_way_out(use: str) -> None:
    dora = fl.load(REAL)
    plain = fl.Adapter.from_tensors({"q": (torch.ones(4, 1), torch.ones(1, 4))}, name="plain")
    with pytest.raises(fl.UnsupportedAdapter, match=r"'movie_dora' is a DoRA adapter.*extract BASE MERGED --rank N"):
        USES[use](dora, plain)


def test_a_real_dora_is_kept(tmp_path: Path) -> None:
    dora = fl.load(REAL)
    assert isinstance(dora, fl.DoRA) and set(dora.magnitudes) == set(dora.updates)
    again = fl.load(dora.save(tmp_path / "kept"))
    assert isinstance(again, fl.DoRA)
    for module, update in dora.updates.items():
        other = again.updates[module]
        old, new = (u.scaling * u.B.terms[0].source.double() @ u.A.terms[0].source.double() for u in (update, other))
        torch.testing.assert_close(new, old, rtol=0, atol=FLOAT32 * float(old.abs().max()))
        assert torch.equal(dora.magnitude(module), again.magnitude(module))
    assert json.loads((tmp_path / "kept" / "adapter_config.json").read_text())["use_dora"] is True


def test_single_files_are_kept(tmp_path: Path) -> None:
    dora = fl.load(single().save(tmp_path / "style.safetensors"))
    assert isinstance(dora, fl.DoRA)
    again = fl.load(dora.save(tmp_path / "kept.safetensors"))
    assert isinstance(again, fl.DoRA) and set(again.updates) == set(dora.updates)
    assert set(again.magnitudes) == set(dora.magnitudes)
    for module, magnitude in dora.magnitudes.items():
        other = again.magnitudes[module]
        assert other.axis == magnitude.axis and torch.equal(other.vector, magnitude.vector)
    for module, update in dora.updates.items():
        kept = again.updates[module]
        assert kept.scaling == update.scaling
        for factor in ("B", "A"):
            assert torch.equal(getattr(kept, factor).stored, getattr(update, factor).stored)


def test_peft_loads_what_is_kept(tmp_path: Path) -> None:
    """The same outputs of a model, whose module is rescaled."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 8))
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        model.base_model.model[0].lora_magnitude_vector["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path / "given")
    inputs = torch.randn(3, 6)
    meant = model(inputs)
    fl.load(tmp_path / "given").save(tmp_path / "kept")
    found = peft.PeftModel.from_pretrained(model.unload(), tmp_path / "kept")(inputs)
    torch.testing.assert_close(found, meant, rtol=0, atol=FLOAT32 * 10)


def test_what_peft_does_not_have_is_not_written(tmp_path: Path) -> None:
    adapter = fl.load(single().save(tmp_path / "style.safetensors"))
    with pytest.raises(fl.InputError, match="PEFT has one magnitude for each output of every module"):
        adapter.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tensors, key: tensors.pop(key), "has no lora_magnitude_vector"),
        (lambda tensors, key: tensors.update({key: torch.ones(3)}), "needed are 384 numbers"),
        (lambda tensors, key: tensors.update({key: torch.full((384,), torch.nan)}), "holds NaN or Inf"),
    ],
)
def test_damaged_magnitudes(damage: Callable[..., object], words: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(REAL / "adapter_model.safetensors")
    damage(tensors, next(key for key in tensors if "magnitude" in key))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((REAL / "adapter_config.json").read_text())
    with pytest.raises(fl.InputError, match=words):
        fl.load(tmp_path)


def test_names_can_be_given_by_hand() -> None:
    dora = fl.load(REAL, rename={"encoder": "bert.encoder"})
    assert all(m.startswith("bert.encoder.") for m in dora.updates) and set(dora.magnitudes) == set(dora.updates)
