"""Fields of a PEFT configuration: mistakes and other kinds of adapters are refused by name, harmless ones are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PREFIX, make_adapter, make_config, make_factors, peft_tensors, write_peft
from test_peft_damage import Q, one_message

from fastlora.adapters.loading import load
from fastlora.errors import InputError, UnsupportedAdapter

DATA = Path(__file__).parent.parent / "data"

CONFIG_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"r": "8"}, "'r'"),
    ({"r": -1}, "'r' is -1"),
    ({"r": 0}, "'r'"),
    ({"r": True}, "'r'"),
    ({"r": 4.0}, "'r'"),
    ({"r": None}, "'r' is null"),
    ({"r": 16}, "rank 4 .* rank 16"),
    ({"lora_alpha": None}, "'lora_alpha'"),
    ({"lora_alpha": math.nan}, "'lora_alpha' is NaN"),
    ({"lora_alpha": math.inf}, "'lora_alpha'"),
    ({"lora_alpha": 10**400}, "'lora_alpha'"),
    ({"lora_alpha": "16"}, "'lora_alpha'"),
    ({"rank_pattern": []}, "'rank_pattern'"),
    ({"rank_pattern": {"q_proj": "4"}}, "'rank_pattern'"),
    ({"rank_pattern": {"q_proj": 2}}, "rank 4 .* rank 2"),
    ({"rank_pattern": {"(q_proj": 4}}, "regular expression"),
    ({"alpha_pattern": {"*": 4}}, "regular expression"),
    ({"alpha_pattern": {"q_proj": None}}, "'alpha_pattern'"),
    ({"use_rslora": "yes"}, "'use_rslora'"),
    ({"bias": "some"}, "'bias'"),
    ({"modules_to_save": "classifier"}, "'modules_to_save'"),
    ({"modules_to_save": [1]}, "'modules_to_save'"),
    ({"layer_replication": [[1]]}, "'layer_replication'"),
    ({"layer_replication": 3}, "'layer_replication'"),
    ({"base_model_name_or_path": 3}, "'base_model_name_or_path'"),
    ({"target_parameters": "experts"}, "'target_parameters'"),
    ({"peft_type": None}, "'peft_type'"),
]


@pytest.mark.parametrize("fields, words", CONFIG_MISTAKES, ids=[repr(f) for f, _ in CONFIG_MISTAKES])
def test_mistakes_in_the_configuration(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    directory = write_peft(tmp_path / "a", peft_tensors(make_factors()), make_config(**fields))
    with pytest.raises(InputError, match=words) as caught:
        load(directory)
    one_message(caught.value, directory)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "peft_type"])
def test_missing_fields(tmp_path: Path, field: str) -> None:
    config = make_config()
    del config[field]
    with pytest.raises(InputError, match=f"'{field}' is missing"):
        load(write_peft(tmp_path / "a", peft_tensors(make_factors()), config))


OTHER_KINDS: list[tuple[dict[str, Any], str]] = [
    ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    ({"use_qalora": True}, "QALoRA"),
    ({"kasa_config": {"beta": 1.0}}, "KaSA"),
    ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
    ({"arrow_config": {"top_k": 2}}, "Arrow"),
    ({"trainable_token_indices": [5]}, "trainable_token_indices"),
    ({"trainable_token_indices": {"embed_tokens": [5]}}, "trainable_token_indices"),
    ({"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}, "ensure_weight_tying"),
    ({"init_lora_weights": "pissa"}, "PiSSA.*path_initial_model"),
    ({"init_lora_weights": "pissa_niter_16"}, "PiSSA"),
    ({"init_lora_weights": "OLoRA"}, "OLoRA"),
    ({"init_lora_weights": "corda"}, "CorDA"),
    ({"init_lora_weights": "lora_ga"}, "LoRA-GA"),
    ({"init_lora_weights": "loftq"}, "LoftQ"),
    ({"init_lora_weights": "tomorrow"}, "tomorrow"),
    ({"brand_new_option": 0.5}, "brand_new_option"),
    ({"enable_lora": [True, False]}, "enable_lora"),
    ({"peft_type": "ADALORA"}, "ADALORA"),
    ({"peft_type": "LOHA"}, "LOHA"),
    ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
]


@pytest.mark.parametrize("fields, words", OTHER_KINDS, ids=[repr(f) for f, _ in OTHER_KINDS])
def test_other_kinds_are_refused_by_name(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    directory = write_peft(tmp_path / "a", peft_tensors(make_factors()), make_config(**fields))
    with pytest.raises(UnsupportedAdapter, match=words) as caught:
        load(directory)
    one_message(caught.value, directory)


def test_a_real_dora_is_read_and_not_computed_with() -> None:
    dora = load(DATA / "movie_dora")
    with pytest.raises(UnsupportedAdapter, match=r"'movie_dora' is a DoRA adapter.*--base BASE"):
        dora * 0.5


def test_unknown_nesting_order_is_refused(tmp_path: Path) -> None:
    where = f"{PREFIX}mixer"
    tensors = {f"{where}{w}.lora_{s}.weight": torch.zeros(4, 4) for w in ("", ".base_layer") for s in "AB"}
    config = make_config(target_parameters=["mixer.alpha", "mixer.beta"])
    with pytest.raises(UnsupportedAdapter, match="alpha, beta"):
        load(write_peft(tmp_path / "a", tensors, config))


@pytest.mark.parametrize(
    "fields",
    [
        {"brand_new_option": None},
        {"brand_new_option": False},
        {"brand_new_option": {}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": False},
        {"megatron_config": {"x": 1}},
        {"ensure_weight_tying": True},
        {"target_modules": "all-linear"},
        {"fan_in_fan_out": True},
    ],
    ids=repr,
)
def test_harmless_fields_are_accepted(tmp_path: Path, fields: dict[str, Any]) -> None:
    adapter = load(make_adapter(tmp_path / "a", **fields))
    assert adapter.updates[Q].scaling == 2.0 and not adapter.notes
