"""(IA)³ directories: read as peft means them, written so that peft computes the same, refused when damaged."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import FLOAT32, MODEL32, SUMS32
from torch import Tensor, nn

import fastlora as fl
from fastlora.adapters.ia3 import IA3
from fastlora.core.data import Scaling
from fastlora.errors import InputError, UnsupportedAdapter

DATA = Path(__file__).parents[1] / "data"
PREFIX = "base_model.model."
KEY, UP, CONV = "layers.0.key", "layers.0.up", "conv"


def write_ia3(directory: Path, tensors: dict[str, Tensor] | None = None, **fields: Any) -> Path:
    """A directory as peft writes it, with changes."""
    if tensors is None:
        tensors = {f"{PREFIX}{KEY}.ia3_l": torch.full((24, 1), 1.5), f"{PREFIX}{UP}.ia3_l": torch.full((1, 16), 0.5)}
    config = {
        "auto_mapping": None, "base_model_name_or_path": "made-up/model", "exclude_modules": None,
        "fan_in_fan_out": False, "feedforward_modules": ["up"], "inference_mode": True, "init_ia3_weights": True,
        "modules_to_save": None, "peft_type": "IA3", "peft_version": "0.21.2", "revision": None,
        "target_modules": ["key", "up"], "task_type": None,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config | fields))
    save_file({k: t.contiguous() for k, t in tensors.items()}, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize("name", ["movie_ia3_a", "movie_ia3_b"])
def test_real_adapters(name: str) -> None:
    adapter = fl.load(DATA / name)
    assert isinstance(adapter, IA3) and len(adapter.modules) == 18 and adapter.dtype == torch.float32
    raw = load_file(DATA / name / "adapter_model.safetensors")
    for module, scaling in adapter.vectors.items():
        assert scaling.feedforward == module.endswith("intermediate.dense")
        assert torch.equal(scaling.vector, raw[f"{PREFIX}{module}.ia3_l"])
    assert adapter.base.model == "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.parametrize("name", ["movie_ia3_a", "movie_ia3_b"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_what_is_written_is_read_again(name: str, dtype: str | None, tmp_path: Path) -> None:
    adapter = fl.load(DATA / name)
    again = fl.load(adapter.save(tmp_path / "again", dtype=dtype))
    assert again.modules == adapter.modules and again.base == adapter.base
    for module, scaling in adapter.vectors.items():
        expected = scaling.vector.to(getattr(torch, dtype or "float32"))
        assert torch.equal(again.vectors[module].vector, expected)
        assert again.vectors[module].feedforward == scaling.feedforward


@pytest.mark.parametrize("feedforward", [["up"], r".*\.up", r"layers\.\d\.(up|down)", ["layers.0.up"], None])
def test_the_configuration_says_the_same_as_the_shapes(feedforward: Any, tmp_path: Path) -> None:
    adapter = fl.load(write_ia3(tmp_path / "a", feedforward_modules=feedforward))
    assert {m: s.feedforward for m, s in adapter.vectors.items()} == {KEY: False, UP: True}


@pytest.mark.parametrize("feedforward", [[], ["conv"], "conv", "v", ["nv"]])
def test_only_the_configuration_knows_about_convolutions(feedforward: Any, tmp_path: Path) -> None:
    tensors = {f"{PREFIX}{CONV}.ia3_l": torch.rand(1, 6, 1, 1)}
    adapter = fl.load(write_ia3(tmp_path / "a", tensors, feedforward_modules=feedforward))
    assert adapter.vectors[CONV].feedforward == (feedforward not in ([], "v"))
    again = fl.load(adapter.save(tmp_path / "b"))
    assert again.vectors[CONV].feedforward == adapter.vectors[CONV].feedforward


def test_old_weights_are_read(tmp_path: Path) -> None:
    directory = write_ia3(tmp_path / "a")
    tensors = load_file(directory / "adapter_model.safetensors")
    (directory / "adapter_model.safetensors").unlink()
    torch.save(tensors, directory / "adapter_model.bin")
    assert fl.load(directory).vector(KEY).tolist() == [1.5] * 24


def set_tensor(key: str, tensor: Tensor | None) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors.pop(key, None)
        save_file(tensors if tensor is None else {**tensors, key: tensor}, file)

    return apply


def set_field(**fields: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return apply


def huge_shape(directory: Path) -> None:
    """A header that claims more than the file has."""
    header = {f"{PREFIX}{KEY}.ia3_l": {"dtype": "F32", "shape": [1 << 40, 1], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(header).encode()
    (directory / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 64)


def overflowing_shape(directory: Path) -> None:
    header = {f"{PREFIX}{KEY}.ia3_l": {"dtype": "F32", "shape": [1 << 33, 1 << 31], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (directory / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)


VECTOR = f"{PREFIX}{KEY}.ia3_l"
NAN, INF = torch.ones(24, 1), torch.ones(24, 1)
NAN[3], INF[5] = math.nan, -math.inf

DAMAGED: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "nan": (set_tensor(VECTOR, NAN), InputError, "layers.0.key.ia3_l' holds NaN or Inf"),
    "inf": (set_tensor(VECTOR, INF), InputError, "holds NaN or Inf"),
    "matrix": (set_tensor(VECTOR, torch.ones(24, 2)), InputError, r"is \[24, 2\]; needed is \[1, in\] or \[out, 1\]"),
    "flat": (set_tensor(VECTOR, torch.ones(24)), InputError, r"is \[24\]; needed is"),
    "scalar": (set_tensor(VECTOR, torch.ones(())), InputError, r"is \[\]; needed is"),
    "deep": (set_tensor(VECTOR, torch.ones(1, 1, 1, 1, 1, 9)), InputError, "needed is"),
    "kernel": (set_tensor(VECTOR, torch.ones(1, 1, 1, 9)), InputError, "needed is"),
    "empty": (set_tensor(VECTOR, torch.ones(0, 1)), InputError, "is empty"),
    "whole numbers": (set_tensor(VECTOR, torch.ones(24, 1, dtype=torch.int32)), InputError, "int32, needed is float32"),
    "no vectors": (lambda d: [set_tensor(k, None)(d) for k in (VECTOR, f"{PREFIX}{UP}.ia3_l")], InputError, "no ia3_l"),
    "twice": (set_tensor(f"{KEY}.ia3_l", torch.ones(24, 1)), InputError, "are the same vector"),
    "lora": (set_tensor(f"{PREFIX}{KEY}.lora_A.weight", torch.ones(2, 4)), UnsupportedAdapter, "unknown kind"),
    "something else": (set_tensor("strange", torch.ones(3)), UnsupportedAdapter, "unknown kind: 'strange'"),
    "huge": (huge_shape, InputError, "no readable safetensors"),
    "overflow": (overflowing_shape, InputError, "adapter_model.safetensors"),
    "contradiction": (set_field(feedforward_modules=["key"]), InputError, "says the opposite"),
    "number": (set_field(feedforward_modules=3), InputError, "'feedforward_modules' is 3"),
    "bad pattern": (set_field(feedforward_modules="(up"), InputError, "'feedforward_modules' is a pattern that cannot"),
    "split pattern": (set_field(feedforward_modules="up)|(x"), InputError, "a pattern that cannot be used"),
    "slow pattern": (set_field(feedforward_modules="(a*)*" * 3000), InputError, "a pattern that cannot be used"),
    "unknown field": (set_field(use_magic=True), UnsupportedAdapter, "'use_magic' = true .* is unknown"),
    "modules_to_save": (set_field(modules_to_save="head"), InputError, "'modules_to_save'"),
    "another kind": (set_field(peft_type="VERA"), UnsupportedAdapter, "'VERA'"),
    "lower case": (set_field(peft_type="ia3"), UnsupportedAdapter, "'ia3'"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_directories_are_refused(case: str, tmp_path: Path) -> None:
    damage, error, message = DAMAGED[case]
    directory = write_ia3(tmp_path / "a")
    damage(directory)
    with pytest.raises(error, match=message) as found:
        fl.load(directory)
    assert str(found.value).isprintable() and len(str(found.value)) < 700


def test_a_slow_pattern_is_answered_at_once(tmp_path: Path) -> None:
    directory = write_ia3(tmp_path / "a", feedforward_modules="(a*)*(a|a)*b")
    with pytest.raises(InputError, match=r"opposite|cannot be used"):
        fl.load(directory)


def test_a_vector_of_one_needs_the_configuration(tmp_path: Path) -> None:
    tensors = {VECTOR: torch.ones(1, 1)}
    with pytest.raises(InputError, match="'feedforward_modules' is missing"):
        fl.load(write_ia3(tmp_path / "a", tensors, feedforward_modules=None))
    assert fl.load(write_ia3(tmp_path / "b", tensors, feedforward_modules=["key"])).vectors[KEY].feedforward


def test_an_overflow_is_refused_when_saving(tmp_path: Path) -> None:
    adapter = fl.load(write_ia3(tmp_path / "a")) * 1e6
    with pytest.raises(fl.OutputError, match="float16"):
        adapter.save(tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'fastlora[peft]')")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


class Convolutions(nn.Module):
    """Convolutions of both kinds, and module names that end in each other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 6, 3)
        self.conv_out = nn.Conv2d(6, 4, 3, padding=1)
        self.x = nn.ModuleDict({"dense": nn.Linear(4, 5)})
        self.y = nn.ModuleDict({"x": nn.ModuleDict({"dense": nn.Linear(5, 5)})})

    def forward(self, input_ids: Tensor) -> Any:
        image = (input_ids.float().reshape(2, -1)[:, :9].repeat(1, 12) / 30 - 1).reshape(2, 3, 6, 6)
        found = self.conv_out(self.conv_in(image)).mean((-1, -2))
        return transformers.utils.ModelOutput(logits=self.y["x"]["dense"](self.x["dense"](found)))


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "bert": (bert, {"target_modules": ["key", "value", "intermediate.dense"],
                    "feedforward_modules": ["intermediate.dense"], "task_type": "SEQ_CLS"}),
    "bert outputs only": (bert, {"target_modules": ["query", "dense"], "feedforward_modules": []}),
    "bert saved head": (bert, {"target_modules": ["key"], "feedforward_modules": [],
                               "modules_to_save": ["classifier"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"],
                    "fan_in_fan_out": True}),
    "convolutions": (Convolutions, {"target_modules": ["conv_in", "conv_out"], "feedforward_modules": ["conv_out"]}),
    "suffixes": (Convolutions, {"target_modules": r"x\.dense|y\.x\.dense", "feedforward_modules": r"x\.dense"}),
}  # fmt: skip
TOKENS = torch.arange(20).reshape(2, 10)


def quietly(run: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()


def trained(case: str, seed: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The base model, and a PEFT model of it with random vectors."""
    make, config = CASES[case]
    torch.manual_seed(0)
    base = make().to(dtype).eval()
    # Biases are zero at the start, and zeros do not show that they are scaled.
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape))
    torch.manual_seed(seed)
    model = quietly(
        lambda: peft.get_peft_model(
            copy.deepcopy(base), peft.IA3Config(**copy.deepcopy(config)), autocast_adapter_dtype=False
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(1 + 0.5 * torch.randn(parameter.shape))
            elif parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    return base, model.eval()


def save(model: nn.Module, directory: Path) -> Path:
    quietly(lambda: model.save_pretrained(directory))
    return directory


def loaded(base: nn.Module, directory: Path) -> nn.Module:
    """peft's model of a directory; whatever peft warns about it is an error, but for the model's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(directory), autocast_adapter_dtype=False).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("case", CASES)
def test_written_adapters_have_the_same_effect(case: str, tmp_path: Path) -> None:
    base, model = trained(case, 1)
    adapter = fl.load(save(model, tmp_path / "a"))
    expected = logits(model)
    assert float((expected - logits(base)).abs().max()) > 1e-3
    again = loaded(base, adapter.save(tmp_path / "b"))
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("case", CASES)
def test_which_vectors_scale_inputs(case: str, tmp_path: Path) -> None:
    _, model = trained(case, 1)
    adapter = fl.load(save(model, tmp_path / "a"))
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.ia3.IA3Layer)}
    assert layers.keys() == adapter.vectors.keys()
    assert {n: m.is_feedforward for n, m in layers.items()} == {m: s.feedforward for m, s in adapter.vectors.items()}


def set_vectors(model: nn.Module, vectors: dict[str, Tensor]) -> nn.Module:
    """The model with other vectors: what peft computes with numbers that were made without fastlora."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in model.base_model.model.named_modules():
            if isinstance(module, peft.tuners.ia3.IA3Layer):
                parameter = module.ia3_l["default"]
                parameter.copy_(vectors[name].reshape(parameter.shape))
    return model


def vectors_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.ia3_l["default"].detach().double().flatten() for n, m in model.base_model.model.named_modules()
            if isinstance(m, peft.tuners.ia3.IA3Layer)}  # fmt: skip


EXPRESSIONS: dict[str, tuple[Callable[[Any, Any, Any], Any], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "negation": (lambda a, b, c: -a, lambda a, b, c: 2 - a),
    "scaled negation": (lambda a, b, c: fl.negate(a, 0.3), lambda a, b, c: 1.3 - 0.3 * a),
    "addition": (lambda a, b, c: fl.add([a, b], [0.3, 0.7], semantics="pem"), lambda a, b, c: 0.3 * a + 0.7 * b),
    "sum": (lambda a, b, c: 0.5 * a + 0.9 * b - c, lambda a, b, c: 1 + 0.5 * (a - 1) + 0.9 * (b - 1) - (c - 1)),
    "analogy": (lambda a, b, c: fl.analogy(a, b, c, 0.6, 0.4), lambda a, b, c: 0.4 + 0.6 * a + 0.4 * (b - c)),
}


@pytest.mark.parametrize("case", ["bert", "gpt2", "convolutions", "suffixes"])
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_combinations_have_the_effect_of_the_formula(case: str, expression: str, tmp_path: Path) -> None:
    ours, formula = EXPRESSIONS[expression]
    models = [trained(case, seed) for seed in (1, 2, 3)]
    base, model = models[0]
    found = [fl.load(save(m, tmp_path / str(i))).without_extras() for i, (_, m) in enumerate(models)]
    columns = [vectors_of(m) for _, m in models]
    expected = {n: formula(*(v[n] for v in columns)).float() for n in columns[0]}
    again = loaded(base, ours(*found).save(tmp_path / "out"))
    got = vectors_of(again)
    for name, vector in expected.items():
        torch.testing.assert_close(got[name].float(), vector, rtol=FLOAT32, atol=FLOAT32)
    plain = set_vectors(model, expected)
    if case == "bert":  # its trained head stays behind
        plain.base_model.model.classifier = base.classifier
    torch.testing.assert_close(logits(again), logits(plain), rtol=MODEL32, atol=SUMS32)


def test_scalings_written_by_hand_load(tmp_path: Path) -> None:
    """Feed-forward modules whose path others end in."""
    base, _ = trained("suffixes", 1)
    vectors = {"x.dense": Scaling(torch.rand(1, 4), True), "y.x.dense": Scaling(torch.rand(5, 1), False)}
    model = loaded(base, IA3("made", vectors).save(tmp_path / "a"))
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.ia3.IA3Layer)}
    assert {n: m.is_feedforward for n, m in layers.items()} == {"x.dense": True, "y.x.dense": False}


def test_only_the_written_modules_are_scaled(tmp_path: Path) -> None:
    base, _ = trained("suffixes", 1)
    model = loaded(base, IA3("made", {"x.dense": Scaling(torch.rand(5, 1), False)}).save(tmp_path / "a"))
    assert list(vectors_of(model)) == ["x.dense"]


def test_bfloat16(tmp_path: Path) -> None:
    base, model = trained("bert outputs only", 1, torch.bfloat16)
    adapter = fl.load(save(model, tmp_path / "a"))
    assert adapter.dtype == torch.bfloat16
    half = 0.5 * adapter
    again = loaded(base, half.save(tmp_path / "b"))
    for name, vector in vectors_of(model).items():
        expected = (1 + 0.5 * (vector - 1)).bfloat16().double()
        assert torch.equal(vectors_of(again)[name], expected)
