"""Modulated adapters as peft loads them: the outputs of a model with the dense ΔW' in its weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pools
import pytest
import torch
from tolerances import SUMS32
from torch import Tensor, nn

import fastlora as fl
from fastlora.reference import dipm as dense

peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'fastlora[peft]')")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def base() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture
def pool(tmp_path: Path) -> fl.Pool:
    """A LoRA, an rsLoRA and one with ranks of its own in some modules, saved by peft."""
    targets = ["query", "value", "dense", "word_embeddings"]
    for i, fields in enumerate(
        ({}, {"use_rslora": True}, {"rank_pattern": {"query": 5}, "alpha_pattern": {"query": 1}})
    ):
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, **fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(base(), config)
            model.save_pretrained(tmp_path / "abc"[i], save_embedding_layers=False)
    return fl.Pool.load([str(tmp_path / n) for n in "abc"])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24).reshape(2, 12)).logits


@pytest.mark.parametrize("granularity", ["column", "component", "matrix"])
@pytest.mark.parametrize("rank", [None, 4])
def test_a_modulated_adapter_in_peft(granularity: str, rank: int | None, pool: fl.Pool, tmp_path: Path) -> None:
    a, b, c = pool.adapters
    operators = [fl.dipm.shift(b, c, 0.4), fl.dipm.interpolate(c, 0.2), fl.dipm.scale(1.5)]
    result = fl.modulate(a, operators, granularity=granularity, rank=rank)
    result.save(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "out").eval()
    merged = copy.deepcopy(base())
    for path, update in result.updates.items():
        module = merged.get_submodule(path)
        deltas = [pools.exact(x.updates[path]) for x in (a, b, c)]
        delta = pools.exact(update) if rank else _dense(deltas, granularity)
        weight: Tensor = module.weight  # type: ignore[assignment]
        with torch.no_grad():
            weight += (delta.mT if isinstance(module, nn.Embedding) else delta).float()
    found, expected, plain = logits(loaded), logits(merged), logits(base())
    assert float((expected - plain).norm()) > 0.05 * float(plain.norm())
    assert float((found - expected).norm()) <= SUMS32 * float(expected.norm())


def _dense(deltas: list[Tensor], granularity: str) -> Tensor:
    """The same operators on dense updates."""
    if granularity == "component":
        ranks = [int((torch.linalg.svdvals(x) > 1e-6).sum()) for x in deltas]
        found = [dense.components(x, "product", r)[0] for x, r in zip(deltas, ranks, strict=True)]
        most = max(ranks)
        vectors = [torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in found]
    else:
        vectors = [x.mT if granularity == "column" else x[None] for x in deltas]
    own, source, target = (dense.decouple(v) for v in vectors)
    now = dense.scale(dense.interpolate(dense.shift(own, source, target, 0.4), target, 0.2), 1.5)
    result = dense.recombine(now)
    return result.mT if granularity == "column" else result.sum(0)
