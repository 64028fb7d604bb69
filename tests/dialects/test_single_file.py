"""Every family in every dialect: what a file means, module by module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastlora as fl
from tests.dialects.files import ALPHAS, CASES, DIALECTS, FAMILIES, Sample, sample
from tests.tolerances import FLOAT64


def check(adapter: fl.Adapter, meant: Sample) -> None:
    """Every ``ΔW`` in float64, by hand from the stored factors."""
    assert set(adapter.updates) == set(meant.meaning)
    for module, delta in meant.meaning.items():
        update = adapter.updates[module]
        assert update.B.stored is not None and update.A.stored is not None
        found = update.scaling * update.B.stored.double() @ update.A.stored.double()
        torch.testing.assert_close(found, delta, rtol=0, atol=FLOAT64 * float(delta.abs().max()))


@pytest.mark.parametrize(("family", "dialect"), CASES)
def test_files_of_every_family_and_dialect(family: str, dialect: str, tmp_path: Path) -> None:
    numbers = list(ALPHAS.values())
    alphas = numbers[CASES.index((family, dialect)) % len(numbers)]
    meant = sample(family, dialect, alphas)
    adapter = fl.load(meant.save(tmp_path / "style.safetensors"), family=family)
    check(adapter, meant)
    form = adapter.base.form
    assert adapter.name == "style" and form is not None
    assert (form.format, form.family) == (DIALECTS[dialect].format, family)
    assert dict(form.stems) == meant.stems
    original = DIALECTS[dialect].original and family not in ("qwen_image",)
    assert ("original" in form.style or form.style.startswith("diffusion_model")) == original or family == "qwen_image"
    for update in adapter.updates.values():  # nothing is copied, but for halves that are swapped
        sources = [t.source for f in (update.B, update.A) for t in f.terms]
        assert all(s.untyped_storage().nbytes() > s.nbytes for s in sources) or update.B.length == 48


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_found(family: str, tmp_path: Path) -> None:
    meant = sample(family, "kohya, original names")
    form = fl.load(meant.save(tmp_path / "style.safetensors")).base.form
    assert form is not None and form.family == family


@pytest.mark.parametrize("alphas", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dialect", ["kohya, names of diffusers", "diffusion_model, A and B", "component"])
def test_alphas_ranks_and_dtypes(alphas: str, dtype: torch.dtype, dialect: str, tmp_path: Path) -> None:
    meant = sample("sd15", dialect, ALPHAS[alphas], (4, 8, 1), dtype)
    adapter = fl.load(meant.save(tmp_path / "style.safetensors"))
    check(adapter, meant)
    assert adapter.dtype == dtype
    told = [note for note in adapter.notes if "have no alpha while others have one" in note]
    assert bool(told) == (alphas == "every other")


@pytest.mark.parametrize("suffix", ["pt", "bin", "ckpt", "pth"])
def test_files_of_torch(suffix: str, tmp_path: Path) -> None:
    meant = sample("sdxl", "kohya, original names")
    check(fl.load(meant.save(tmp_path / f"style.{suffix}")), meant)


def test_folders_that_stand_for_a_file(tmp_path: Path) -> None:
    meant = sample("sd15", "component")
    check(fl.load(meant.save(tmp_path / "a" / "pytorch_lora_weights.safetensors").parent), meant)
    folder = meant.save(tmp_path / "b" / "style.safetensors").parent
    check(fl.load(folder), meant)
    sample("sd15", "component", ALPHAS["none"]).save(folder / "other.safetensors")
    with pytest.raises(fl.InputError):
        fl.load(folder)
    assert fl.Pool.load(folder).names == ["other", "style"]
    assert fl.load(tmp_path / "a").name == "a"


@pytest.mark.parametrize("value", [torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.bfloat16)])
def test_alphas_are_numbers_of_any_kind(value: torch.Tensor, tmp_path: Path) -> None:
    meant = sample("sd15", "kohya, names of diffusers", lambda i, rank: 3.0)
    meant.tensors |= {key: value for key in meant.tensors if key.endswith(".alpha")}
    check(fl.load(meant.save(tmp_path / "style.safetensors")), meant)


def described(**fields: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in fields.items()})}


def test_metadata_say_the_scale_where_no_alpha_does(tmp_path: Path) -> None:
    meant = sample("wan", "component", ALPHAS["none"], (2, 4))
    paths = list(meant.meaning)
    ranks = {f"^{path.replace('.', chr(92) + '.')}": 2 for path in paths[::2]}
    meant.metadata = described(r=4, lora_alpha=8, rank_pattern=ranks, alpha_pattern={paths[0]: 3})
    for path in paths:
        meant.meaning[path] *= 1.5 if path == paths[0] else 8 / (2 if path in paths[::2] else 4)
    check(fl.load(meant.save(tmp_path / "style.safetensors")), meant)
    with_alpha = sample("wan", "component", ALPHAS["each its own"], (2, 4))
    with_alpha.metadata = meant.metadata
    check(fl.load(with_alpha.save(tmp_path / "other.safetensors")), with_alpha)


def test_metadata_with_rslora(tmp_path: Path) -> None:
    meant = sample("wan", "component", ALPHAS["none"], (4,))
    meant.metadata = described(r=4, lora_alpha=8, use_rslora=True)
    meant.meaning = {path: 4.0 * delta for path, delta in meant.meaning.items()}
    check(fl.load(meant.save(tmp_path / "style.safetensors")), meant)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 16, "lora_alpha": 8}, "says rank 16 and alpha 8 of blocks.0.attn1.to_q, whose factors have rank 4"),
        ({"r": "4", "lora_alpha": 8}, 'has r = "4", needed is a whole number'),
        ({"r": 4, "lora_alpha": None}, "has lora_alpha = null"),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": [1]}, "needed are numbers by pattern"),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"(a+)+(?=b)": 2}}, "cannot be matched in bounded time"),
        ({"r": 4, "lora_alpha": 4, "use_dora": True}, "has no magnitude"),
    ],
)
def test_metadata_without_a_meaning(fields: dict[str, object], words: str, tmp_path: Path) -> None:
    meant = sample("wan", "component", ALPHAS["none"], (4,))
    meant.metadata = described(**fields)
    with pytest.raises(fl.InputError) as told:
        fl.load(meant.save(tmp_path / "style.safetensors"))
    assert words in str(told.value) and "style.safetensors" in str(told.value)


def test_metadata_of_another_rank_whose_scale_is_one(tmp_path: Path) -> None:
    meant = sample("wan", "component", ALPHAS["none"], (4,))
    meant.metadata = described(r=16, lora_alpha=16)
    check(fl.load(meant.save(tmp_path / "style.safetensors")), meant)


def test_an_alpha_in_the_header_alone_is_told(tmp_path: Path) -> None:
    meant = sample("wan", "component", ALPHAS["none"], (4,))
    meant.metadata = {"ss_network_alpha": "8"}
    adapter = fl.load(meant.save(tmp_path / "style.safetensors"))
    check(adapter, meant)
    assert "ss_network_alpha = 8 (at rank 4)" in adapter.notes[0] and "multiply the adapter by 2" in adapter.notes[0]
    assert adapter.base.form is not None and adapter.base.form.metadata == {"ss_network_alpha": "8"}
