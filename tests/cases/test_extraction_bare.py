"""Extraction where files say less than they should: names without their first part, heads that nobody speaks of,
tables that are no parameters, models inside others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gaussian
from safetensors.torch import load_file, save_file
from test_extraction import adapted, assert_same, gpt2, llama, logits, pair, transformers
from torch import Tensor

import fastlora as fl


def rewritten(folder: Path, change: Any) -> None:
    """The file of a model, with other tensors."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


@pytest.mark.parametrize("make", [gpt2, lambda: llama(tie_word_embeddings=True)], ids=["gpt2", "llama"])
@pytest.mark.parametrize("folders", [("base",), ("tuned",), ("base", "tuned")], ids="+".join)
def test_names_without_their_first_part(folders: tuple[str, ...], make: Any, tmp_path: Path) -> None:
    """Old files, and those of the body alone, lack the first part that the class of the configuration has."""
    tuned = pair(tmp_path, make)
    prefix = tuned.base_model_prefix + "."
    for folder in folders:
        rewritten(tmp_path / folder, lambda state: {n.removeprefix(prefix): t for n, t in state.items()})
    adapter = fl.task_vector(tmp_path / "base", tmp_path / "tuned").extract(rank=4)
    assert len(adapter.notes) == 1 and f"{prefix!r} in front of" in adapter.notes[0]
    adapter.save(tmp_path / "adapter")
    assert_same(adapted(tmp_path / "base", tmp_path / "adapter"), logits(tuned))
    applied = fl.task_vector(tmp_path / "base", tmp_path / "tuned").apply(tmp_path / "base")
    assert applied.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()


def test_tables_that_one_version_stores(tmp_path: Path) -> None:
    """Masks and the like are no parameters, and need no option."""
    tuned = pair(tmp_path, gpt2)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    rewritten(tmp_path / "base", lambda state: state | masks)
    adapter = fl.task_vector(tmp_path / "base", tmp_path / "tuned").extract(rank=4)
    assert len(adapter.notes) == 1 and "which one model stores, are no parameters" in adapter.notes[0]
    assert adapter.provenance["retained_energy"] == pytest.approx(1)
    adapter.save(tmp_path / "adapter")
    rewritten(tmp_path / "base", lambda state: {n: t for n, t in state.items() if n not in masks})
    assert_same(adapted(tmp_path / "base", tmp_path / "adapter"), logits(tuned))


def test_a_head_that_nobody_speaks_of() -> None:
    base, tuned = ({"model.embed_tokens.weight": gaussian(9, 4, seed=s)} for s in (1, 2))
    silent = fl.task_vector(base, tuned).extract(rank=4)
    assert list(silent.updates) == ["model.embed_tokens"]
    assert "nothing says whether an output head is model.embed_tokens" in silent.notes[0]
    assert silent.provenance["retained_energy"] is None  # nobody knows
    without = fl.task_vector(base, tuned, tied=False).extract(rank=4)
    assert list(without.updates) == ["model.embed_tokens"] and without.notes == ()
    with_head = fl.task_vector(base, tuned, tied=True).extract(rank=4)
    assert list(with_head.updates) == ["model.embed_tokens", "lm_head"] and with_head.notes == ()
    torch.testing.assert_close(with_head.delta("lm_head"), with_head.delta("model.embed_tokens").mT)


CONFIG = {
    "architectures": ["VisionEncoderDecoderModel"],
    "decoder": {"model_type": "gpt2", "tie_word_embeddings": True},
}


def test_a_model_inside_another_one(tmp_path: Path) -> None:
    """The decoder says how its weights lie and that its head is tied; the encoder is of another kind."""
    names = ["decoder.transformer.h.0.attn.c_proj", "decoder.transformer.wte", "encoder.layer.0.attention.query"]
    base: dict[str, Tensor] = {f"{n}.weight": gaussian(8, 8, seed=i) for i, n in enumerate(names)}
    tuned = {n: t + gaussian(8, 8, seed=9 + i) for i, (n, t) in enumerate(base.items())}
    for folder, state in (("base", base), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        save_file(state, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps(CONFIG))
    adapter = fl.task_vector(tmp_path / "base", tmp_path / "tuned").extract(rank=8)
    assert list(adapter.updates) == [names[0], names[1], "decoder.lm_head", names[2]] and adapter.base.fan_in_fan_out
    change = {n: tuned[f"{n}.weight"] - base[f"{n}.weight"] for n in names}
    expected = {names[0]: change[names[0]].mT, "decoder.lm_head": change[names[1]], names[2]: change[names[2]]}
    for module, delta in expected.items():
        torch.testing.assert_close(adapter.delta(module), delta, rtol=0, atol=1e-5)


def test_norms_and_biases_are_kept_on_demand(tmp_path: Path) -> None:
    tuned = pair(tmp_path, gpt2)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if weight.dim() == 1:
                weight += 0.1 * gaussian(len(weight), 1, seed=len(name))[:, 0]
    tuned.save_pretrained(tmp_path / "tuned")
    lost = fl.task_vector(tmp_path / "base", tmp_path / "tuned").extract(rank=4)
    assert "are left out" in lost.notes[0] and float(lost.provenance["retained_energy"]) < 1  # type: ignore[arg-type]
    norms = fl.task_vector(tmp_path / "base", tmp_path / "tuned", whole=["ln_*", "*.attn.c_attn", "*.c_proj", "*.c_fc"])
    adapter = norms.extract(rank=16)
    assert adapter.notes == ()
    adapter.save(tmp_path / "adapter")
    assert_same(adapted(tmp_path / "base", tmp_path / "adapter"), logits(tuned))


def test_the_task_of_the_adapter(tmp_path: Path) -> None:
    classifier = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
        )
    )
    pair(tmp_path, lambda: classifier)
    vector = fl.task_vector(tmp_path / "base", tmp_path / "tuned", whole=["classifier"])
    adapter = vector.extract(rank=4)
    adapter.save(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier"]
    assert_same(adapted(tmp_path / "base", tmp_path / "adapter"), logits(classifier))
