"""A model with learned coefficients against the merged adapter that peft loads into it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import SUMS32
from torch import nn

import fastlora as fl

peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'fastlora[peft]')")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=3,
        )
    )


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )


@pytest.mark.parametrize(("make", "targets"), [
    (bert, ["query", "value", "dense", "word_embeddings"]), (gpt2, ["c_attn", "c_proj", "wte"]),
], ids=["bert", "gpt2"])  # fmt: skip
@pytest.mark.parametrize("per", ["task", "layer"])
def test_equal_to_the_merged_adapter_in_peft(
    make: Callable[[], nn.Module], targets: list[str], per: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = make().eval()
    ids = torch.randint(0, 60, (3, 9))
    paths = []
    for i, rank in enumerate((2, 4)):
        config = peft.LoraConfig(
            r=rank, lora_alpha=6, target_modules=targets, use_rslora=bool(i), init_lora_weights=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(
                tmp_path / str(i), save_embedding_layers=False
            )
        paths.append(tmp_path / str(i))
    pool = fl.Pool.load({"a": str(paths[0]), "b": str(paths[1])})
    merge = fl.LearnedMerge(copy.deepcopy(base), pool, per=per)
    losses = merge.fit([{"input_ids": ids}], steps=5, lr=0.05)
    assert losses[-1] < losses[0]
    merge.adapter().save(tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "merged").eval()
    with torch.no_grad():
        expected, found, plain = (m(input_ids=ids).logits for m in (loaded, merge, base))
    assert float((expected - plain).norm()) > 0.05 * float(plain.norm())
    assert float((found - expected).norm()) <= SUMS32 * float(expected.norm())


def test_real_adapters_with_shared_parts_of_pairs(tmp_path: Path) -> None:
    """DeVec's setting: adapters and the shared parts of all pairs, on the architecture that they were trained on."""
    root = Path(__file__).parents[2] / "examples" / "adapters"
    pool = fl.Pool.load([str(root / n) for n in ("trec_r16", "trec_rslora", "spam")])
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    base = transformers.BertModel(config).eval()
    ids = torch.randint(0, 50, (2, 7))
    merge = fl.LearnedMerge(base, fl.decompose(pool, 0.3, mode="pairs"), per="layer")
    assert merge.coefficients.shape == (18, 6)
    merge.fit([{"input_ids": ids}], lambda out, _: out.last_hidden_state.square().mean(), steps=3, lr=0.05)
    merge.adapter().save(tmp_path / "merged")
    with torch.no_grad():
        found = merge(input_ids=ids).last_hidden_state
    merge.close()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = base(input_ids=ids).last_hidden_state
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "merged").eval()
        expected = loaded(input_ids=ids).last_hidden_state
    assert float((expected - plain).norm()) > 0.01 * float(plain.norm())
    assert float((found - expected).norm()) <= SUMS32 * float(expected.norm())
