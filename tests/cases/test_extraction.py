"""An adapter that is extracted from two models gives, on the base model, the logits of the fine-tune."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gaussian
from command import done, refused
from tolerances import MODEL32, ROUNDED32
from torch import Tensor, nn

import fastlora as fl

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (pip install 'fastlora[peft]')"
)
peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'fastlora[peft]')")

TOKENS = torch.arange(1, 11)[None] * 7 % 40
LAYERS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}
BLOCKS: dict[str, Any] = {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 40, "n_positions": 16}


def llama(**options: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**LAYERS, "tie_word_embeddings": False, **options})
    )


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**BLOCKS))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**LAYERS, num_local_experts=3))


def gpt_oss() -> nn.Module:
    """Experts in one tensor, ``[experts, in, out]``."""
    config = transformers.GptOssConfig(**LAYERS, num_local_experts=3, num_experts_per_tok=2, head_dim=8)
    return transformers.GptOssForCausalLM(config)


def bigcode() -> nn.Module:
    """Names as GPT-2 has them, on weights that lie as usual."""
    return transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**BLOCKS))


def qwen2_moe() -> nn.Module:
    """Experts one by one in files and in one tensor in the model, which PEFT does not translate."""
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = transformers.Qwen2MoeConfig(**LAYERS, **experts, shared_expert_intermediate_size=8)
    return transformers.Qwen2MoeForCausalLM(config)


def deepseek() -> nn.Module:
    """Dense layers and shared experts, whose names PEFT takes for those of experts."""
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    heads = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "q_lora_rank": 8}
    sizes = {"moe_intermediate_size": 8, "first_k_dense_replace": 1}
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**LAYERS, **experts, **heads, **sizes))


def llama4() -> nn.Module:
    """A router of a class of its own."""
    experts = {"num_local_experts": 3, "num_experts_per_tok": 1, "intermediate_size_mlp": 24}
    config = transformers.Llama4TextConfig(**LAYERS, **experts, head_dim=8, attention_chunk_size=8)
    return transformers.Llama4ForCausalLM(config)


def neox() -> nn.Module:
    """A head that the model calls otherwise than its files."""
    config = {k: v for k, v in LAYERS.items() if k != "num_key_value_heads"}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**config))


def t5() -> nn.Module:
    """One matrix is three embeddings and the head."""
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40)
    return transformers.T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
    "gpt_bigcode": bigcode,
    "gpt_neox": neox,
    "qwen2_moe": qwen2_moe,
    "deepseek_v3": deepseek,
    "llama4": llama4,
    "t5": t5,
}


def changed(model: nn.Module, names: Callable[[str], bool] = lambda name: True) -> None:
    """Adds a change of rank 2 to every weight matrix of a model, and to every expert."""
    with torch.no_grad():
        for i, (name, weight) in enumerate(model.named_parameters()):
            if weight.dim() >= 2 and not name.endswith("bias") and names(name):
                left = gaussian(*weight.shape[:-1], 2, seed=2 * i)
                right = gaussian(*weight.shape[:-2], 2, weight.shape[-1], seed=2 * i + 1)
                weight += 0.05 * left @ right


def pair(path: Path, make: Callable[[], nn.Module], names: Callable[[str], bool] = lambda name: True) -> nn.Module:
    """Saves a model as ``base`` and its fine-tune as ``tuned``; the fine-tune."""
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(path / "base")
    changed(model, names)
    model.save_pretrained(path / "tuned")
    return model


def logits(model: nn.Module) -> Tensor:
    is_pair = getattr(model.config, "is_encoder_decoder", False)
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS, **({"decoder_input_ids": TOKENS} if is_pair else {})).logits
    return found


def adapted(base: Path | nn.Module, adapter: Path) -> Tensor:
    """The logits of a base model with an adapter, as peft loads it."""
    model = base
    if isinstance(base, Path):
        architecture = json.loads((base / "config.json").read_text())["architectures"][0]
        model = getattr(transformers, architecture).from_pretrained(base)
    return logits(peft.PeftModel.from_pretrained(model, str(adapter)).eval())


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=MODEL32)


@pytest.mark.parametrize("name", MODELS)
def test_the_adapter_has_the_logits_of_the_fine_tune(name: str, tmp_path: Path) -> None:
    tuned = pair(tmp_path, MODELS[name])
    adapter = fl.task_vector(tmp_path / "base", tmp_path / "tuned").extract(rank=4)
    adapter.save(tmp_path / "adapter")
    assert_same(adapted(tmp_path / "base", tmp_path / "adapter"), logits(tuned))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (name == "gpt2")
    assert config["task_type"] == ("SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM")
    assert adapter.notes == () and adapter.provenance["retained_energy"] == pytest.approx(1)
    again = fl.load(tmp_path / "adapter")
    assert isinstance(again, fl.Adapter) and set(again.updates) == set(adapter.updates)
    for module in adapter.updates:
        torch.testing.assert_close(again.delta(module), adapter.delta(module), rtol=0, atol=ROUNDED32)


def test_one_expert_of_several(tmp_path: Path) -> None:
    """Readers that stack experts get all of them, with zeros for those that did not change."""
    tuned = pair(tmp_path, mixtral, lambda name: "self_attn" in name)
    with torch.no_grad():  # one of the two halves of one expert, which lie in one tensor here
        tuned.model.layers[1].mlp.experts.gate_up_proj[2, :24] += (
            0.1 * gaussian(24, 1, seed=1) @ gaussian(1, 16, seed=2)
        )
    tuned.save_pretrained(tmp_path / "tuned")
    adapter = fl.task_vector(tmp_path / "base", tmp_path / "tuned").extract(rank=3)
    adapter.save(tmp_path / "adapter")
    assert_same(adapted(tmp_path / "base", tmp_path / "adapter"), logits(tuned))


def test_the_command_says_nothing_where_nothing_is_lost(tmp_path: Path) -> None:
    tuned = pair(tmp_path, gpt2)
    found = done("extract", "base", "tuned", "--rank", 4, "--base-model", "org/name", "-o", "adapter", cwd=tmp_path)
    assert found.err == "" and "100.00 % of the energy kept" in found.out
    assert_same(adapted(tmp_path / "base", tmp_path / "adapter"), logits(tuned))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name"


def test_a_task_vector_keeps_what_the_models_said(tmp_path: Path) -> None:
    """Layout and ties are in the file of a task vector, and in sums."""
    tuned = pair(tmp_path, gpt2)
    fl.task_vector(tmp_path / "base", tmp_path / "tuned").save(tmp_path / "tau.safetensors")
    tau = fl.load(tmp_path / "tau.safetensors")
    assert isinstance(tau, fl.TaskVector)
    (0.5 * tau + 0.5 * tau).extract(rank=4).save(tmp_path / "adapter")
    assert_same(adapted(tmp_path / "base", tmp_path / "adapter"), logits(tuned))
    applied = tau.apply(tmp_path / "base")
    assert set(applied) == set(fl.task_vector(tmp_path / "base", tmp_path / "tuned").apply(tmp_path / "base"))
    state = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base").state_dict()
    both = tau.apply(state)
    torch.testing.assert_close(both["lm_head.weight"], both["transformer.wte.weight"], rtol=0, atol=0)
    torch.testing.assert_close(both["lm_head.weight"], tuned.lm_head.weight.detach(), rtol=0, atol=MODEL32)


@pytest.mark.parametrize("written", ["base", "tuned", "both", "head alone"])
def test_a_tied_head_that_is_also_written_out(written: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tuned = pair(tmp_path, lambda: llama(tie_word_embeddings=True))
    for folder in ("base", "tuned"):
        file = tmp_path / folder / "model.safetensors"
        state = load_file(file)
        if written in (folder, "both"):
            state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        elif written == "head alone":
            state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
        save_file(state, file, {"format": "pt"})
    adapter = fl.task_vector(tmp_path / "base", tmp_path / "tuned").extract(rank=4)
    adapter.save(tmp_path / "adapter")
    assert_same(adapted(tmp_path / "base", tmp_path / "adapter"), logits(tuned))
    assert adapter.notes == ()


def test_a_fine_tune_that_untied_its_head(tmp_path: Path) -> None:
    """The base model has one matrix, the fine-tune two: each changes in its own way."""
    pair(tmp_path, lambda: llama(tie_word_embeddings=True))
    tuned = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "tuned")
    untied = llama()
    untied.load_state_dict({k: v.clone() for k, v in tuned.state_dict().items()})
    changed(untied, lambda name: name == "lm_head.weight")
    untied.save_pretrained(tmp_path / "tuned")
    fl.task_vector(tmp_path / "base", tmp_path / "tuned").extract(rank=8).save(tmp_path / "adapter")
    assert_same(adapted(tmp_path / "base", tmp_path / "adapter"), logits(untied))


def test_tied_inside_the_text_configuration(tmp_path: Path) -> None:
    tuned = pair(tmp_path, lambda: llama(tie_word_embeddings=True))
    for folder in ("base", "tuned"):
        path = tmp_path / folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({"text_config": config, "architectures": config["architectures"]}))
    vector = fl.task_vector(tmp_path / "base", tmp_path / "tuned")
    assert vector.facts.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head" in vector.extract(rank=4).updates
    assert logits(tuned) is not None


def test_bare_files_say_what_was_assumed(tmp_path: Path) -> None:
    """Without a configuration the biases tell how weights lie; where they do not, a note and an option."""
    tuned = pair(tmp_path, gpt2)
    for folder in ("base", "tuned"):
        (tmp_path / folder / "config.json").rename(tmp_path / f"{folder}.json")
    adapter = fl.task_vector(tmp_path / "base", tmp_path / "tuned", tied=True).extract(rank=4)
    assert adapter.notes == () and adapter.base.fan_in_fan_out
    adapter.save(tmp_path / "adapter")
    (tmp_path / "base.json").rename(tmp_path / "base" / "config.json")
    assert_same(adapted(tmp_path / "base", tmp_path / "adapter"), logits(tuned))

    base, fine = ({"h.attn.c_proj.weight": gaussian(8, 8, seed=s)} for s in (1, 2))
    assumed = fl.task_vector(base, fine).extract(rank=8)
    assert "h.attn.c_proj lie" in assumed.notes[0] and "--fan-in-fan-out" in assumed.notes[0]
    delta = fine["h.attn.c_proj.weight"] - base["h.attn.c_proj.weight"]
    torch.testing.assert_close(assumed.delta("h.attn.c_proj"), delta, rtol=0, atol=MODEL32)
    told = fl.task_vector(base, fine).extract(rank=8, fan_in_fan_out=True)
    assert told.notes == () and told.base.fan_in_fan_out
    torch.testing.assert_close(told.delta("h.attn.c_proj"), delta.mT, rtol=0, atol=MODEL32)


def test_a_base_saved_without_its_head(tmp_path: Path) -> None:
    """The names of one model are shorter, and it lacks the head."""
    tuned = pair(tmp_path, llama, lambda name: name != "lm_head.weight")
    whole = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    whole.model.save_pretrained(tmp_path / "bare")
    message = refused("extract", "bare", "tuned", "--rank", 4, "-o", "adapter", cwd=tmp_path)
    assert "lm_head.weight" in message and "--whole" in message
    found = done("extract", "bare", "tuned", "--rank", 4, "--common-only", "-o", "adapter", cwd=tmp_path)
    assert "saved without 'model.' in front" in found.err and "lm_head.weight, left out" in found.err
    assert "%" not in found.out
    assert_same(adapted(tmp_path / "base", tmp_path / "adapter"), logits(tuned))
    done("extract", "bare", "tuned", "--rank", 4, "--whole", "lm_head", "-o", "whole", "-q", cwd=tmp_path)
    torch.manual_seed(5)
    headless = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "bare")
    assert_same(adapted(headless, tmp_path / "whole"), logits(tuned))


class TestVocabularies:
    @pytest.fixture(params=["grown", "padded"])
    def models(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, nn.Module, int]:
        """A fine-tune with other rows than its base model, whose common rows are the same."""
        tuned = pair(tmp_path, llama, lambda name: "embed" not in name and "head" not in name)
        rows = 43 if request.param == "grown" else 37
        tuned.resize_token_embeddings(rows)
        tuned.save_pretrained(tmp_path / "tuned")
        return tmp_path, tuned, rows

    def test_the_refusal_names_the_rows_and_ways_that_work(self, models: tuple[Path, nn.Module, int]) -> None:
        path, tuned, rows = models
        message = refused("extract", "base", "tuned", "--rank", 4, "-o", "adapter", cwd=path)
        assert ("rows 40 to 42 were added" if rows == 43 else "rows 37 to 39 were removed") in message
        assert "lm_head.weight, model.embed_tokens.weight" in message
        assert all(way in message for way in ("--common-only", "--whole lm_head --whole embed_tokens", "--exclude"))
        tables = ("--exclude", "lm_head", "--exclude", "embed_tokens")
        done("extract", "base", "tuned", "--rank", 4, *tables, "-o", "left", "-q", cwd=path)
        first = min(rows, 40)
        assert_same(adapted(path / "base", path / "left")[..., :first], logits(tuned)[..., :first])

    def test_common_rows(self, models: tuple[Path, nn.Module, int]) -> None:
        path, tuned, rows = models
        found = done("extract", "base", "tuned", "--rank", 4, "--common-only", "-o", "adapter", cwd=path)
        assert "the change is that of the" in found.err and "common rows" in found.err
        first = min(rows, 40)
        assert_same(adapted(path / "base", path / "adapter")[..., :first], logits(tuned)[..., :first])

    def test_whole_matrices(self, models: tuple[Path, nn.Module, int]) -> None:
        path, tuned, rows = models
        tables = ("--whole", "lm_head", "--whole", "embed_tokens")
        done("extract", "base", "tuned", "--rank", 4, *tables, "-o", "adapter", "-q", cwd=path)
        base = transformers.LlamaForCausalLM.from_pretrained(path / "base")
        base.resize_token_embeddings(rows)
        assert_same(adapted(base, path / "adapter"), logits(tuned))


def test_a_grown_vocabulary_of_a_tied_model(tmp_path: Path) -> None:
    """The head follows the embedding, whole or in its common rows."""
    tuned = pair(tmp_path, lambda: llama(tie_word_embeddings=True))
    tuned.resize_token_embeddings(43)
    tuned.save_pretrained(tmp_path / "tuned")
    vector = fl.task_vector(tmp_path / "base", tmp_path / "tuned", whole=["embed_tokens"])
    assert set(vector.values) == {"model.embed_tokens.weight", "lm_head.weight"}
    vector.extract(rank=4).save(tmp_path / "whole")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(43)
    assert_same(adapted(base, tmp_path / "whole"), logits(tuned))
    common = fl.task_vector(tmp_path / "base", tmp_path / "tuned", common_only=True).extract(rank=4)
    common.save(tmp_path / "common")
    assert_same(adapted(tmp_path / "base", tmp_path / "common"), logits(tuned)[..., :40])
    assert common.provenance["retained_energy"] is None
