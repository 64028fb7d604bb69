"""Parameters of two models that are the same under other names."""

from __future__ import annotations

import pytest
import torch
from builders import gaussian
from torch import Tensor

import fastlora as fl
from fastlora.adapters.model_names import matched_names, tie_group
from fastlora.files.model_config import ModelConfig

PARTS = ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"]


def state(start: str, parts: list[str] = PARTS, seed: int = 0) -> dict[str, Tensor]:
    return {f"{start}{p}.weight": gaussian(4, 4, seed=seed + i) for i, p in enumerate(parts)}


def common(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, str]:
    """``{name of the second model: common name}``, which the first model's names must be, too."""
    ours, theirs, _ = matched_names(first, second)
    assert set(theirs.values()) >= set(ours.values()) or set(ours.values()) >= set(theirs.values())
    return theirs


@pytest.mark.parametrize("start", ["model.", "transformer.", "bert.", "model.decoder."])
def test_a_model_saved_without_its_head_has_the_longer_names(start: str) -> None:
    short, long = state(""), state(start) | {"lm_head.weight": gaussian(4, 4, seed=9)}
    assert common(short, long) == {n: n for n in long}
    ours, theirs, rules = matched_names(long, short)
    assert theirs == {n: start + n for n in short} and ours == {n: n for n in long} and rules == [(start, "")]


def test_parts_of_a_model_change_in_their_own_ways() -> None:
    """Versions of vision-language models move the text part and the vision part."""
    blocks = ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    old = state("model.") | state("visual.", blocks) | {"lm_head.weight": gaussian(4, 4, seed=9)}
    new = state("model.language_model.") | state("model.visual.", blocks) | {"lm_head.weight": gaussian(4, 4, seed=9)}
    expected = {n: n.replace("model.language_model.", "model.") for n in new}
    assert common(old, new) == expected
    older = state("language_model.model.")
    assert set(common(older, state("model.language_model.")).values()) == set(older)


@pytest.mark.parametrize(
    ("first", "second"),
    [("encoder.", "decoder."), ("model.", "vision_tower."), ("layers.7.", "layers.8.")],
)
def test_different_parts_stay_apart(first: str, second: str) -> None:
    with pytest.raises(fl.InputError, match="no parameter in common"):
        fl.task_vector(state(first), state(second, seed=50), common_only=True)


def test_other_names_are_not_left_out() -> None:
    """What has only other names is no reason to leave it out, so that way is not offered."""
    base = state("encoder.") | {"lm_head.weight": gaussian(4, 4, seed=9)}
    tuned = state("decoder.") | {"lm_head.weight": gaussian(4, 4, seed=8)}
    with pytest.raises(fl.InputError, match=r"ends as decoder\.layers.* of the fine-tune does") as error:
        fl.task_vector(base, tuned)
    assert "common" not in str(error.value)


def test_names_that_two_could_have_are_not_guessed() -> None:
    one, two = state(""), state("first.") | state("second.")
    ours, theirs, rules = matched_names(one, two)
    assert rules == [] and set(ours) == set(one) and all(n == m for n, m in theirs.items())


def test_a_task_vector_between_two_classes() -> None:
    base, tuned = state(""), state("model.", seed=50)
    vector = fl.task_vector(base, tuned, "tuned")
    for name, delta in vector.deltas.items():
        short = name.removeprefix("model.")
        assert torch.equal(delta, (tuned[name].double() - base[short].double()).float())
    told = "the base model was saved without 'model.' in front of its names; the result has the longer names"
    assert vector.notes == (f"task vector 'tuned': {told}",)
    applied = vector.apply(base)
    assert applied.keys() == base.keys()
    torch.testing.assert_close(applied["layers.0.mlp.up_proj.weight"], tuned["model.layers.0.mlp.up_proj.weight"])


def config(architecture: str, model_type: str) -> dict[str, object]:
    return {"architectures": [architecture], "model_type": model_type}


CONFIGS = {
    "lm_head": (config("LlamaForCausalLM", "llama"), "model.embed_tokens"),
    "proj_out": (config("WhisperForConditionalGeneration", "whisper"), "model.decoder.embed_tokens"),
    "cls.predictions.decoder": (config("BertForMaskedLM", "bert"), "bert.embeddings.word_embeddings"),
    "lm_head.decoder": (config("RobertaForMaskedLM", "roberta"), "roberta.embeddings.word_embeddings"),
}


@pytest.mark.parametrize("head", CONFIGS)
def test_heads_that_are_tied(head: str) -> None:
    values, source = CONFIGS[head]
    group = tie_group([f"{source}.weight"], [ModelConfig(values)], None)
    assert group == [f"{source}.weight", f"{head}.weight"]
    assert tie_group([f"{source}.weight"], [ModelConfig({**values, "tie_word_embeddings": False})], None) == []
    assert tie_group([f"{source}.weight"], [ModelConfig(values)], False) == []
    assert tie_group([f"{source}.weight"], [], None) == []
    # A head on another model, and the body alone, have no logits.
    body = {**values, "architectures": ["BertModel"]}
    assert tie_group([f"{source}.weight"], [ModelConfig(body)], None) == []


def test_the_tables_are_those_of_transformers() -> None:
    """What is tied in models that the installed transformers make is what the tables say."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from fastlora.core.architectures import CONV1D, HEAD_BY_TYPE
    from fastlora.core.architectures import EMBEDDING_BY_TYPE as EMBEDDINGS

    auto = transformers.models.auto.modeling_auto
    causal, masked = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    classes = {t: causal[t] for t in ("llama", "gpt2", "gptj", "bloom", "opt", "mamba", "gemma")}
    classes |= {t: masked[t] for t in ("bert", "roberta", "electra", "distilbert")}
    for model_type, name in classes.items():
        tied = getattr(transformers, name)._tied_weights_keys
        head = HEAD_BY_TYPE.get(model_type, "lm_head")
        assert tied[f"{head}.weight"] == f"{EMBEDDINGS.get(model_type, 'model.embed_tokens')}.weight", model_type
    assert set(CONV1D) <= {*transformers.CONFIG_MAPPING.keys(), "clvp_decoder"}
