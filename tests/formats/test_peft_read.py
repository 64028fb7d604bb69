"""Reading PEFT directories: values bit for bit, nothing copied, and one clear message for everything else."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import MODULES, PREFIX, gaussian, make_adapter, make_config, make_factors, peft_tensors, write_peft
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastlora.adapters.loading import load
from fastlora.core.updates import Update
from fastlora.errors import InputError, UnsupportedAdapter
from fastlora.files import tensor_files

DATA = Path(__file__).parent.parent / "data"
EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "adapters"
Q = "model.layers.0.self_attn.q_proj"


def dense(update: Update) -> Tensor:
    assert update.B.stored is not None and update.A.stored is not None
    return update.scaling * update.B.stored.double() @ update.A.stored.double()


@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "odd addresses"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_factors_are_the_stored_ones(tmp_path: Path, dtype: torch.dtype, odd: bool) -> None:
    adapter = load(make_adapter(tmp_path / "a", dtype=dtype, odd=odd))
    assert sorted(adapter.modules) == sorted(MODULES)
    assert adapter.dtype == dtype and adapter.name == "a"
    for module, (left, right) in make_factors(dtype=dtype).items():
        update = adapter.updates[module]
        assert update.B.stored is not None and update.A.stored is not None
        assert torch.equal(update.B.stored, left) and torch.equal(update.A.stored, right)
        assert update.scaling == 2.0
        if odd:
            assert update.A.stored.data_ptr() % 2 == 1


def test_a_header_that_was_checked_before_is_no_passport(tmp_path: Path) -> None:
    """Files of the same header have tensors of their own, and a damaged one is still found out."""
    first, second = (make_adapter(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    one, two = (directory / "adapter_model.safetensors" for directory in (first, second))
    assert one.read_bytes()[:200] == two.read_bytes()[:200]
    load(first)
    for module, (left, _) in make_factors(seed=2).items():
        assert torch.equal(load(second).updates[module].B.stored, left)  # type: ignore[arg-type]
    whole = two.read_bytes()
    for content in (whole[:-4], whole + b"\0" * 4, whole[:100]):
        two.write_bytes(content)
        with pytest.raises(InputError, match="copy or download it again"):
            load(second)


def test_few_and_small_headers_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that is remembered is not checked by the library again; one that is forgotten is."""
    checked: list[str] = []

    def checking(path: Path, **options: Any) -> Any:
        checked.append(path.name)
        return safe_open(path, **options)

    def checks_of(names: list[str]) -> list[str]:
        checked.clear()
        for name in names:
            tensor_files.read_safetensors(tmp_path / name)
        return list(checked)

    monkeypatch.setattr(tensor_files, "safe_open", checking)
    monkeypatch.setattr(tensor_files, "LARGEST_KNOWN", 200)
    names = [f"{n}" for n in range(1, tensor_files.MOST_KNOWN + 5)]
    for name in names:  # headers that no other test has
        save_file({f"{tmp_path.name}": torch.full((int(name), 3), float(name))}, tmp_path / name)
    save_file({"x" * 300: torch.zeros(2)}, tmp_path / "long")
    assert checks_of(names) == names
    latest = names[-tensor_files.MOST_KNOWN :]
    assert checks_of(latest) == []
    for name in latest:
        assert torch.equal(
            tensor_files.read_safetensors(tmp_path / name)[tmp_path.name], torch.full((int(name), 3), float(name))
        )
    assert checks_of(["long", "long"]) == ["long", "long"]
    assert checks_of(latest) == [], "what is too long to be remembered takes the place of nothing"
    assert checks_of(names[:4]) == names[:4]


def test_nothing_is_copied_and_the_mapping_outlives_the_file(tmp_path: Path) -> None:
    modules = {f"layers.{i}.proj": (1 << 18, 64) for i in range(4)}
    directory = make_adapter(tmp_path / "a", modules, rank=16)
    before = anonymous_memory()
    adapter = load(directory)
    grown = anonymous_memory() - before
    assert grown < 8 << 20, f"loading 64 MiB of factors allocated {grown >> 20} MiB"
    expected = make_factors(modules, rank=16)["layers.3.proj"][0]
    (directory / "adapter_model.safetensors").unlink()
    gc.collect()
    stored = adapter.updates["layers.3.proj"].B.stored
    assert stored is not None and torch.equal(stored, expected)


def anonymous_memory() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        pytest.skip("memory of this process is read from /proc, which this system lacks")
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) << 10


@pytest.mark.parametrize(
    "fields, module, expected",
    [
        ({"lora_alpha": 16}, Q, 16 / 4),
        ({"lora_alpha": 3.5}, Q, 3.5 / 4),
        ({"lora_alpha": 16, "use_rslora": True}, Q, 16 / math.sqrt(4)),
        ({"alpha_pattern": {"q_proj": 20}}, Q, 20 / 4),
        ({"alpha_pattern": {"q_proj": 20}}, "model.layers.0.self_attn.v_proj", 8 / 4),
        ({"alpha_pattern": {"q_proj": 20}, "use_rslora": True}, Q, 20 / 2),
        ({"alpha_pattern": {"proj": 20}}, Q, 8 / 4),
        ({"alpha_pattern": {r"layers\.1\..*": 20}}, "model.layers.1.mlp.up_proj", 20 / 4),
        ({"alpha_pattern": {r"layers\.1\..*": 20}}, Q, 8 / 4),
        ({"alpha_pattern": {"^layers.*": 20}}, Q, 8 / 4),
        ({"alpha_pattern": {".*q_proj": 20, "q_proj": 30}}, Q, 20 / 4),
        ({"alpha_pattern": None}, Q, 8 / 4),
        ({"lora_alpha": 0}, Q, 0.0),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_scaling(tmp_path: Path, fields: dict[str, Any], module: str, expected: float) -> None:
    adapter = load(make_adapter(tmp_path / "a", **fields))
    assert adapter.updates[module].scaling == pytest.approx(expected, rel=1e-15)  # a few operations in float64


def test_rank_pattern_gives_rank_and_scaling(tmp_path: Path) -> None:
    ranks = dict(zip(MODULES, (1, 2, 4, 3), strict=True))
    adapter = load(make_adapter(tmp_path / "a", rank=ranks))
    assert {m: u.rank for m, u in adapter.updates.items()} == ranks
    assert {m: u.scaling for m, u in adapter.updates.items()} == {m: 8 / r for m, r in ranks.items()}


def test_names_without_the_prefix_are_accepted(tmp_path: Path) -> None:
    directory = write_peft(tmp_path / "a", peft_tensors(make_factors(), prefix=""))
    assert sorted(load(directory).modules) == sorted(MODULES)


def test_mixed_dtypes_give_the_widest(tmp_path: Path) -> None:
    tensors = peft_tensors(make_factors(dtype=torch.float16))
    tensors |= peft_tensors({Q: make_factors(dtype=torch.bfloat16)[Q]})
    assert load(write_peft(tmp_path / "a", tensors)).dtype == torch.float32


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older than torch 1.6"])
def test_torch_file(tmp_path: Path, zipped: bool) -> None:
    directory = make_adapter(tmp_path / "a")
    (directory / "adapter_model.safetensors").unlink()
    torch.save(peft_tensors(make_factors()), directory / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
    stored = load(directory).updates[Q].B.stored
    assert stored is not None and torch.equal(stored, make_factors()[Q][0])


def test_convolution_is_flattened(tmp_path: Path) -> None:
    a, b = gaussian(4, 6, 3, 5, seed=1), gaussian(10, 4, 1, 1, seed=2)
    tensors = {f"{PREFIX}conv.lora_A.weight": a, f"{PREFIX}conv.lora_B.weight": b}
    update = load(write_peft(tmp_path / "a", tensors)).updates["conv"]
    assert update.shape == (10, 6 * 15) and update.layout.kernel == (3, 5)
    expected = 2 * torch.einsum("or,rikl->oikl", b.flatten(1).double(), a.double())
    torch.testing.assert_close(dense(update).reshape(10, 6, 3, 5), expected)


def test_embedding_is_dim_by_vocabulary(tmp_path: Path) -> None:
    a, b = gaussian(4, 50, seed=1), gaussian(12, 4, seed=2)
    tensors = {f"{PREFIX}embed_tokens.lora_embedding_A": a, f"{PREFIX}embed_tokens.lora_embedding_B": b}
    tensors[f"{PREFIX}embed_tokens.base_layer.weight"] = gaussian(50, 12, seed=3)
    adapter = load(write_peft(tmp_path / "a", tensors))
    update = adapter.updates["embed_tokens"]
    assert update.layout.kind == "embedding" and update.shape == (12, 50)
    assert adapter.extras["embed_tokens.weight"].kind == "value"


def test_experts_become_modules(tmp_path: Path) -> None:
    rank, experts = 4, 3
    up_a, up_b = gaussian(experts * rank, 16, seed=1), gaussian(20, rank * experts, seed=2)
    down_a, down_b = gaussian(experts * rank, 10, seed=3), gaussian(16, rank * experts, seed=4)
    where = f"{PREFIX}layers.0.mlp.experts"
    tensors = {
        f"{where}.lora_A.weight": down_a,
        f"{where}.lora_B.weight": down_b,
        f"{where}.base_layer.lora_A.weight": up_a,
        f"{where}.base_layer.lora_B.weight": up_b,
    }
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = make_config(target_modules=[], target_parameters=parameters)
    adapter = load(write_peft(tmp_path / "a", tensors, config))
    assert len(adapter.modules) == 2 * experts
    for e in range(experts):
        update = adapter.updates[f"layers.0.mlp.experts.gate_up_proj[{e}]"]
        expected = 2.0 * up_b[:, e::experts].double() @ up_a[e * rank : (e + 1) * rank].double()
        torch.testing.assert_close(dense(update), expected)
        assert (update.layout.container, update.layout.expert, update.layout.experts) == (
            "layers.0.mlp.experts.gate_up_proj",
            e,
            experts,
        )
        assert adapter.updates[f"layers.0.mlp.experts.down_proj[{e}]"].shape == (16, 10)


def test_biases_and_trained_modules_are_extras(tmp_path: Path) -> None:
    shift, bias, head = gaussian(24, seed=1), gaussian(24, seed=2), gaussian(3, 16, seed=3)
    counter = torch.tensor(7)
    tensors = peft_tensors(make_factors()) | {
        f"{PREFIX}{Q}.lora_B.bias": shift,
        f"{PREFIX}model.layers.1.self_attn.q_proj.base_layer.bias": bias,
        f"{PREFIX}classifier.dense.weight": head,
        f"{PREFIX}classifier.norm.num_batches_tracked": counter,
    }
    config = make_config(lora_bias=True, bias="lora_only", modules_to_save=["classifier"])
    extras = load(write_peft(tmp_path / "a", tensors, config)).extras
    assert {path: extra.kind for path, extra in extras.items()} == {
        f"{Q}.bias": "delta",
        "model.layers.1.self_attn.q_proj.bias": "value",
        "classifier.dense.weight": "value",
        "classifier.norm.num_batches_tracked": "value",
    }
    torch.testing.assert_close(extras[f"{Q}.bias"].tensor, 2 * shift)
    assert torch.equal(extras["classifier.dense.weight"].tensor, head)
    assert torch.equal(extras["classifier.norm.num_batches_tracked"].tensor, counter)


def test_a_shifted_and_replaced_bias_is_their_sum(tmp_path: Path) -> None:
    shift, bias = gaussian(24, seed=1), gaussian(24, seed=2)
    tensors = peft_tensors(make_factors())
    tensors |= {f"{PREFIX}{Q}.lora_B.bias": shift, f"{PREFIX}{Q}.base_layer.bias": bias}
    adapter = load(write_peft(tmp_path / "a", tensors, make_config(lora_bias=True, bias="all")))
    assert adapter.extras[f"{Q}.bias"].kind == "value"
    torch.testing.assert_close(adapter.extras[f"{Q}.bias"].tensor, bias + 2 * shift)


def test_training_state_is_dropped_with_a_note(tmp_path: Path) -> None:
    tensors = peft_tensors(make_factors()) | {f"{PREFIX}{Q}.lora_velora_embed": gaussian(4, seed=1)}
    adapter = load(write_peft(tmp_path / "a", tensors, make_config(velora_config={"num_groups": 4})))
    assert any("VeLoRA" in note for note in adapter.notes) and len(adapter.notes) == 2


def test_what_the_base_is_called_is_kept(tmp_path: Path) -> None:
    fields = {"revision": "v2", "task_type": "CAUSAL_LM", "layer_replication": [[0, 2], [1, 3]]}
    base = load(make_adapter(tmp_path / "a", **fields)).base
    assert (base.model, base.revision, base.task_type) == ("made-up/model", "v2", "CAUSAL_LM")
    assert base.layer_replication == ((0, 2), (1, 3))


@pytest.mark.parametrize("name", ["movie_a", "movie_b", "spam", "trec_r16", "trec_rslora"])
def test_real_adapters(name: str) -> None:
    adapter = load(EXAMPLES / name)
    update = adapter.updates["encoder.layer.5.intermediate.dense"]
    rank = 16 if name == "trec_r16" else 8
    assert len(adapter.modules) == 18 and update.shape == (1536, 384) and update.rank == rank
    if name == "trec_rslora":
        assert update.scaling == pytest.approx(8 / math.sqrt(8))


def test_a_real_adapter_of_another_kind_is_refused() -> None:
    with pytest.raises(UnsupportedAdapter, match="DoRA"):
        load(DATA / "movie_dora")


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
    ({"use_dora": True}, "DoRA"),
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


def replaced(key: str, tensor: Tensor | None) -> Callable[[Path], None]:
    """A file in which one tensor is another, or missing."""

    def apply(directory: Path) -> None:
        tensors = peft_tensors(make_factors())
        tensors.pop(f"{PREFIX}{key}", None)
        if tensor is not None:
            tensors[f"{PREFIX}{key}"] = tensor
        save_file(tensors, directory / "adapter_model.safetensors")

    return apply


def raw(name: str, content: bytes | None) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        if content is None:
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(content)

    return apply


def cut_off(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_torch_file(content: bytes) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / "adapter_model.safetensors").unlink()
        (directory / "adapter_model.bin").write_bytes(content)

    return apply


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"

DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no configuration": (raw(CONFIG, None), "adapter_config.json"),
    "configuration is no JSON": (raw(CONFIG, b"{'r': 8}"), "not valid JSON"),
    "configuration is no text": (raw(CONFIG, b"\xff\xfe\x00"), "not valid JSON"),
    "configuration is a list": (raw(CONFIG, b"[]"), "an object with fields"),
    "no weights": (raw(WEIGHTS, None), "neither adapter_model.safetensors nor adapter_model.bin"),
    "weights are empty": (raw(WEIGHTS, b""), "no readable safetensors"),
    "weights are garbage": (raw(WEIGHTS, b"garbage" * 50), "no readable safetensors"),
    "weights are cut off": (cut_off, "cut off"),
    "weights are a pointer": (raw(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "torch file is garbage": (only_torch_file(b"garbage" * 50), "no readable file of tensors"),
    "torch file is empty": (only_torch_file(b""), "no readable file of tensors"),
    "A without B": (replaced(B, None), r"q_proj\.lora_A\.weight' has no lora_B"),
    "B without A": (replaced(A, None), r"q_proj\.lora_B\.weight' has no lora_A"),
    "ranks of A and B differ": (replaced(B, torch.zeros(24, 5)), "4 and 5 must agree"),
    "A is a vector": (replaced(A, torch.zeros(16)), r"lora_A \[16\]"),
    "A is sharded away": (replaced(A, torch.zeros(0)), "ZeRO-3"),
    "A is of integers": (replaced(A, torch.zeros(4, 16, dtype=torch.int8)), "int8"),
    "A is float8": (replaced(A, torch.zeros(4, 16).to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "A is complex": (replaced(A, torch.zeros(4, 16, dtype=torch.complex64)), "complex64"),
    "lora_bias of another length": (replaced(f"{Q}.lora_B.bias", torch.zeros(5)), r"\[24\]"),
    "unknown tensor": (replaced("model.norm.weight", torch.zeros(5)), "unknown kind: 'model.norm.weight'"),
    "bias without the field": (replaced("model.norm.bias", torch.zeros(5)), "unknown kind"),
    "adapter name in the tensor": (
        replaced(f"{Q}.lora_A.default.weight", torch.zeros(4, 16)),
        "unknown kind: .*lora_A.default.weight",
    ),
    "DoRA tensors": (replaced(f"{Q}.lora_magnitude_vector", torch.zeros(24)), "DoRA"),
    "trained tokens": (
        replaced("embed_tokens.token_adapter.trainable_tokens_delta", torch.zeros(2, 4)),
        "token",
    ),
    "nested without parameters": (
        replaced(f"{Q}.base_layer.lora_A.weight", torch.zeros(4, 16)),
        "target_parameters.*names none",
    ),
    "a factor of no module": (replaced("lora_A.weight", torch.zeros(4, 16)), "unknown kind: 'lora_A.weight'"),
    "multi-head attention": (
        replaced("attn.base_layer.out_proj.lora_A.weight", torch.zeros(4, 16)),
        "MultiheadAttention",
    ),
}


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE)
def test_damaged_directories(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    directory = make_adapter(tmp_path / "a")
    damage(directory)
    with pytest.raises(InputError, match=words) as caught:
        load(directory)
    one_message(caught.value, directory)


def one_message(error: InputError, directory: Path) -> None:
    text = str(error)
    assert "\n" not in text and len(text) < 900
    assert str(directory) in text or "tensor" in text, f"does not say where: {text}"
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)


def test_no_factors_at_all(tmp_path: Path) -> None:
    config = make_config(modules_to_save=["head"])
    with pytest.raises(InputError, match="is empty"):
        load(write_peft(tmp_path / "a", {f"{PREFIX}head.weight": torch.zeros(2, 2)}, config))


def test_grouped_convolution(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}conv.lora_A.weight": torch.zeros(4, 6, 3, 3),
        f"{PREFIX}conv.lora_B.weight": torch.zeros(10, 2, 1, 1),
    }
    with pytest.raises(UnsupportedAdapter, match="grouped convolution"):
        load(write_peft(tmp_path / "a", tensors))


def test_unknown_nesting_order_is_refused(tmp_path: Path) -> None:
    where = f"{PREFIX}mixer"
    tensors = {f"{where}{w}.lora_{s}.weight": torch.zeros(4, 4) for w in ("", ".base_layer") for s in "AB"}
    config = make_config(target_parameters=["mixer.alpha", "mixer.beta"])
    with pytest.raises(UnsupportedAdapter, match="alpha, beta"):
        load(write_peft(tmp_path / "a", tensors, config))


def test_wrong_paths(tmp_path: Path) -> None:
    directory = make_adapter(tmp_path / "pool" / "a")
    make_adapter(tmp_path / "pool" / "b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "single.safetensors").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    partial = make_adapter(tmp_path / ".out.partial-12" / "shared")
    for path, words in {
        tmp_path / "nowhere": "there is no",
        directory / WEIGHTS: "pass its directory",
        tmp_path / "pool": "holds 2 adapters",
        tmp_path / "empty": "found: nothing",
        tmp_path / "model": "whole model",
        tmp_path / "single.safetensors": "single file",
        tmp_path / "notes.txt": "is a file",
        partial: "never finished",
    }.items():
        with pytest.raises(InputError, match=words):
            load(path)
