"""Files whose tensor names still carry the adapter's name, as the state of a running model does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PREFIX, gaussian, make_config, make_factors, peft_tensors, write_peft
from torch import Tensor

import fastlora as fl
from fastlora.errors import InputError, UnsupportedAdapter

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
MODULES = {Q: (8, 6), UP: (10, 6)}
FACTOR = re.compile(r"(lora_[AB]|lora_embedding_[AB]|ia3_l)")


def named(tensors: dict[str, Tensor], name: str = "default") -> dict[str, Tensor]:
    return {FACTOR.sub(rf"\1.{name}", key): tensor for key, tensor in tensors.items()}


def linear() -> dict[str, Tensor]:
    return peft_tensors(make_factors(MODULES, seed=1))


def same(one: fl.Adapter, two: fl.Adapter) -> bool:
    assert set(one) == set(two) and one.extras.keys() == two.extras.keys()
    scalings = [one.updates[m].scaling == two.updates[m].scaling for m in one]
    return all(scalings) and all(torch.equal(one.delta(m), two.delta(m)) for m in one)


@pytest.mark.parametrize("name", ["default", "legal-v2", "A", "weights", "lora"])
def test_any_name_is_read(name: str, tmp_path: Path) -> None:
    config = make_config(rank_pattern={"up_proj": 4}, alpha_pattern={Q: 16}, target_modules=["q_proj", "up_proj"])
    plain = fl.load(write_peft(tmp_path / "plain", linear(), config))
    found = fl.load(write_peft(tmp_path / "found", named(linear(), name), config))
    assert same(found, plain) and found.updates[Q].scaling == 4.0 and found.notes == ()


def test_pickled_files_and_embeddings(tmp_path: Path) -> None:
    embedding = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": gaussian(4, 20, seed=2),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": gaussian(6, 4, seed=3),
    }
    plain = fl.load(write_peft(tmp_path / "plain", linear() | embedding))
    path = write_peft(tmp_path / "named", linear())
    (path / "adapter_model.safetensors").unlink()
    torch.save(named(linear() | embedding), path / "adapter_model.bin")
    assert same(fl.load(path), plain)
    only = fl.load(write_peft(tmp_path / "only", linear() | named(embedding)))  # each module says it in one way
    assert same(only, plain)


def test_wrappers_and_names_together(tmp_path: Path) -> None:
    plain = fl.load(write_peft(tmp_path / "plain", linear()))
    tensors = {f"module._orig_mod.{key}": t for key, t in named(linear()).items()}
    found = fl.load(write_peft(tmp_path / "named", tensors))
    assert same(found, plain) and len(found.notes) == 1


def test_vectors(tmp_path: Path) -> None:
    config = {
        "peft_type": "IA3",
        "feedforward_modules": ["up_proj"],
        "target_modules": ["q_proj", "up_proj"],
        "modules_to_save": ["score"],
    }
    vectors = {
        f"{PREFIX}{Q}.ia3_l": gaussian(8, 1, seed=1),
        f"{PREFIX}{UP}.ia3_l": gaussian(1, 6, seed=2),
    }
    beside = {f"{PREFIX}score.weight": gaussian(2, 6, seed=3)}
    plain = fl.load(write_peft(tmp_path / "plain", vectors | beside, config))
    held = {f"{PREFIX}score.modules_to_save.mine.weight": beside[f"{PREFIX}score.weight"]}
    found = fl.load(write_peft(tmp_path / "named", named(vectors, "mine") | held, config))
    assert isinstance(plain, fl.IA3) and isinstance(found, fl.IA3)
    assert all(torch.equal(plain.vector(m), found.vector(m)) for m in plain) and plain.modules == found.modules
    assert torch.equal(found.extras["score.weight"].tensor, plain.extras["score.weight"].tensor)


@pytest.mark.parametrize("second", ["lora", "modules_to_save"])
def test_two_adapters_in_one_file_are_listed(second: str, tmp_path: Path) -> None:
    other = named(linear(), "two")
    if second == "modules_to_save":
        other = {f"{PREFIX}score.modules_to_save.two.weight": gaussian(2, 6, seed=3)}
    path = write_peft(tmp_path / "both", named(linear(), "one") | other, make_config(modules_to_save=["score"]))
    with pytest.raises(InputError, match=r"the tensors of 2 adapters \('one', 'two'\).*selected_adapters"):
        fl.load(path)


def test_factors_of_one_module_with_and_without_a_name_are_refused(tmp_path: Path) -> None:
    mixed = linear() | {k: t for k, t in named(linear()).items() if Q in k}
    with pytest.raises(InputError, match=r"carries the name of an adapter, 'default'"):
        fl.load(write_peft(tmp_path / "mixed", mixed))


def whole_state(**config: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a small model: factors under their name, and all of its own weights."""
    state = named(linear())
    for i, (module, (n, m)) in enumerate(MODULES.items()):
        state[f"{PREFIX}{module}.base_layer.weight"] = gaussian(n, m, seed=10 + i)
        state[f"{PREFIX}{module}.base_layer.bias"] = gaussian(n, seed=20 + i)
    state[f"{PREFIX}model.embed_tokens.weight"] = gaussian(20, 6, seed=30)
    state[f"{PREFIX}model.norm.weight"] = gaussian(6, seed=31)
    state[f"{PREFIX}model.norm.bias"] = gaussian(6, seed=32)
    state[f"{PREFIX}score.original_module.weight"] = gaussian(2, 6, seed=33)
    state[f"{PREFIX}score.modules_to_save.default.weight"] = gaussian(2, 6, seed=34)
    return state, make_config(modules_to_save=["score"], **config)


BIASES = [f"{Q}.bias", f"{UP}.bias"]


@pytest.mark.parametrize("bias, kept", [("none", []), ("lora_only", BIASES), ("all", [*BIASES, "model.norm.bias"])])
def test_the_state_of_a_whole_model(bias: str, kept: list[str], tmp_path: Path) -> None:
    state, config = whole_state(bias=bias)
    plain = fl.load(write_peft(tmp_path / "plain", linear()))
    found = fl.load(write_peft(tmp_path / "state", state, config))
    assert same(found.without_extras(), plain)
    assert set(found.extras) == {"score.weight", *kept}
    assert torch.equal(found.extras["score.weight"].tensor, state[f"{PREFIX}score.modules_to_save.default.weight"])
    left = len(state) - 4 - 1 - len(kept)
    [note] = found.notes
    assert note.startswith(f"adapter 'state': {left} tensors beside it are weights of the base model")


def test_what_was_picked_beside_factors_may_be_trained(tmp_path: Path) -> None:
    """Without the base model's weights of the adapted modules, somebody chose what is in the file."""
    state, config = whole_state()
    picked = {k: t for k, t in state.items() if ".base_layer." not in k and ".original_module." not in k}
    with pytest.raises(UnsupportedAdapter, match=r"unknown kind: .*model\.norm\.weight"):
        fl.load(write_peft(tmp_path / "picked", picked, config))


def test_what_a_running_model_of_peft_holds(tmp_path: Path) -> None:
    """The state dict of a real model is read as what `save_pretrained` wrote of it."""
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential()
    model.add_module("embed", torch.nn.Embedding(11, 6))
    model.add_module("up", torch.nn.Linear(6, 8))
    model.add_module("score", torch.nn.Linear(8, 2))
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["embed", "up"], modules_to_save=["score"])
    adapted = peft.get_peft_model(model, config, adapter_name="mine")
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "saved")
    plain = fl.load(tmp_path / "saved" / "mine")
    state = {k: v.contiguous() for k, v in adapted.state_dict().items()}
    path = write_peft(tmp_path / "state", state)
    (path / "adapter_config.json").write_text((tmp_path / "saved" / "mine" / "adapter_config.json").read_text())
    found = fl.load(path)
    assert same(found.without_extras(), plain.without_extras())
    assert torch.equal(found.extras["score.weight"].tensor, plain.extras["score.weight"].tensor)
