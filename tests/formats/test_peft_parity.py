"""Against peft itself: what it saves is read as the same ΔW, and what is written it loads as the same ΔW."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import write
from tolerances import FLOAT32, FLOAT64
from torch import Tensor, nn

from fastlora.adapters.loading import load
from fastlora.adapters.lora import Adapter
from fastlora.core.updates import Layout

peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'fastlora[peft]')")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return transformers.BertModel(config)


def bert_classifier() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    return transformers.BertForSequenceClassification(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=24
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=12,
        num_local_experts=4,
    )
    return transformers.MixtralForCausalLM(config)


class Experts(nn.Module):
    """Parameters ``[experts, in, out]``, as some models keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.is_transposed = True
        self.gate_up_proj = nn.Parameter(torch.randn(3, 16, 20))
        self.down_proj = nn.Parameter(torch.randn(3, 10, 16))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.gate_up_proj[0])[..., :10] @ self.down_proj[0]


class Mixed(nn.Module):
    """One of each layer that LoRA adapts, and module names that end in each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.conv1 = nn.Conv1d(16, 12, 3)
        self.conv2 = nn.Conv2d(4, 6, (3, 5))
        self.point = nn.Conv2d(4, 6, 1)
        self.conv3 = nn.Conv3d(2, 5, (1, 2, 3))
        self.x = nn.ModuleDict({"query": nn.Linear(16, 8)})
        self.y = nn.ModuleDict({"x": nn.ModuleDict({"query": nn.Linear(16, 8)})})
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(12)])
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x)


@dataclass
class Case:
    model: Callable[[], nn.Module]
    config: dict[str, Any]
    dtype: torch.dtype = torch.float32
    modules: int | None = None
    warns: str = field(default="")


QUERY_VALUE = {"target_modules": ["query", "value"]}
LAYERS = [f"layers.{i}" for i in range(12)]

CASES = {
    "bert": Case(bert, {"r": 4, "lora_alpha": 16, **QUERY_VALUE}, modules=4),
    "bert rslora": Case(bert, {"r": 4, "lora_alpha": 16, "use_rslora": True, **QUERY_VALUE}),
    "bert bfloat16": Case(bert, {"r": 4, "lora_alpha": 16, **QUERY_VALUE}, torch.bfloat16),
    "bert float16": Case(bert, {"r": 4, "lora_alpha": 16, **QUERY_VALUE}, torch.float16),
    "bert lora_bias": Case(bert, {"r": 4, "lora_bias": True, **QUERY_VALUE}),
    "bert bias all": Case(bert, {"r": 4, "bias": "all", **QUERY_VALUE}),
    "bert bias lora_only": Case(bert, {"r": 4, "bias": "lora_only", **QUERY_VALUE}),
    "bert modules_to_save": Case(bert, {"r": 4, "modules_to_save": ["pooler"], **QUERY_VALUE}),
    "bert classifier": Case(bert_classifier, {"r": 4, "task_type": "SEQ_CLS", **QUERY_VALUE}),
    "bert embeddings": Case(bert, {"r": 4, "target_modules": ["word_embeddings", "key"]}),
    "llama": Case(llama, {"r": 4, "target_modules": "all-linear"}, modules=84),
    "llama regular expression": Case(llama, {"r": 4, "target_modules": r".*\.[13]\.mlp\..*_proj"}, modules=6),
    "llama patterns": Case(
        llama,
        {
            "r": 4,
            "lora_alpha": 12,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "^model.layers.11.*": 7, "v_proj": 1},
            "alpha_pattern": {"q_proj": 3, r".*\.mlp\..*": 5},
        },
    ),
    "llama patterns rslora": Case(
        llama,
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": ["q_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 9},
        },
    ),
    "llama layer_replication": Case(
        llama, {"r": 4, "target_modules": ["q_proj"], "layer_replication": [[0, 8], [4, 12]]}, modules=16
    ),
    "gpt2": Case(gpt2, {"r": 4, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "wte"]}, modules=4),
    "convolutions": Case(
        Mixed,
        {"r": 4, "lora_alpha": 10, "target_modules": ["conv1", "conv2", "conv3", "point", "embed"]},
        modules=5,
    ),
    "convolutions lora_bias": Case(Mixed, {"r": 4, "lora_bias": True, "target_modules": ["conv1", "conv2"]}),
    "suffixes": Case(Mixed, {"r": 4, "target_modules": r"x\.query|layers\.1"}, modules=2),
    "suffix patterns": Case(
        Mixed,
        {"r": 4, "target_modules": ["query", *LAYERS], "rank_pattern": {"^x.query": 2, "layers.1": 3}},
        modules=14,
    ),
    "experts": Case(
        mixtral,
        {
            "r": 3,
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
        modules=2 + 2 * 2 * 4,
    ),
    "experts alone": Case(
        mixtral, {"r": 3, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}, modules=8
    ),
    "experts patterns": Case(
        mixtral,
        {
            "r": 3,
            "use_rslora": True,
            "target_modules": [],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {r"layers.1.mlp.experts.down_proj": 5},
            "alpha_pattern": {"gate_up_proj": 6},
        },
        # peft looks at modules only when it checks whether a pattern was used.
        warns="keys did not match any targeted module",
    ),
    "experts transposed": Case(
        Mixed,
        {
            "r": 2,
            "target_modules": ["embed"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
        modules=1 + 2 * 3,
    ),
    "parameter of a linear module": Case(
        Mixed, {"r": 2, "target_modules": [], "target_parameters": ["x.query.weight"]}
    ),
}

ALLOWED = ("is_gradient_checkpointing",)


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


def trained(case: Case) -> tuple[nn.Module, nn.Module]:
    """The base model and a PEFT model of it whose every trainable parameter is random."""
    torch.manual_seed(0)
    base = case.model().to(case.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(**copy.deepcopy(case.config)), autocast_adapter_dtype=False
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    return base, model


def save(model: nn.Module, directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    return directory


def peft_deltas(model: nn.Module) -> dict[str, Tensor]:
    """``{module or parameter path: ΔW as peft computes it}`` in float64 arithmetic, in the base model's
    layout."""
    deltas = {}
    model = copy.deepcopy(model).double()
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.layer.ParamWrapper):
            owner = path.replace(".base_layer", "")
            deltas[f"{owner}.{module.parameter_name}"] = module.get_delta_weight("default")
        elif isinstance(module, peft.tuners.lora.LoraLayer):
            deltas[path] = module.get_delta_weight("default")
    return deltas


def our_deltas(adapter: Adapter, base: nn.Module) -> dict[str, Tensor]:
    """The same from the factors that were read, laid out as the base model has them."""
    deltas: dict[str, Tensor] = {}
    for path, update in adapter.updates.items():
        b, a = update.B.stored, update.A.stored
        assert b is not None and a is not None
        delta = update.scaling * b.double() @ a.double()
        layout = update.layout
        if layout.kind == "expert":
            module, _, name = layout.container.rpartition(".")
            owner = base.get_submodule(module)
            shape = getattr(owner, name).shape
            if getattr(owner, "is_transposed", False):
                delta = delta.mT
            if len(shape) == 2:
                deltas[layout.container] = delta
            else:
                deltas.setdefault(layout.container, torch.full(shape, torch.nan).double())[layout.expert] = delta
        elif layout.kind == "embedding":
            deltas[path] = delta.mT
        elif layout.kind == "conv":
            deltas[path] = delta.reshape(b.shape[0], -1, *layout.kernel)
        else:
            transposed = isinstance(base.get_submodule(path), transformers.pytorch_utils.Conv1D)
            deltas[path] = delta.mT if transposed else delta
    return deltas


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    assert got.keys() == expected.keys()
    for path, tensor in expected.items():
        assert got[path].shape == tensor.shape, path
        error = float(((got[path] - tensor).norm() / tensor.norm()).detach())
        assert error <= relative, f"{path}: relative error {error:.2e}, allowed {relative:.0e}"


def base_of(case: Case, base: nn.Module) -> nn.Module:
    """The base model as the adapter's module names see it (with its layers repeated)."""
    base = copy.deepcopy(base)
    if "layer_replication" in case.config:
        peft.tuners.tuners_utils.replicate_layers(base, case.config["layer_replication"])
    return base


def test_read_gives_the_deltas_of_peft(tmp_path: Path, case: Case) -> None:
    base, model = trained(case)
    adapter = load(save(model, tmp_path / "a"))
    expected = peft_deltas(model)
    assert expected and (case.modules is None or len(adapter.modules) == case.modules)
    assert_same(our_deltas(adapter, base_of(case, base)), expected, FLOAT64)


def test_written_adapters_load_as_the_same(tmp_path: Path, case: Case) -> None:
    base, model = trained(case)
    adapter = load(save(model, tmp_path / "a"))
    baked = {
        module: ((update.scaling * update.B.stored.double()).float(), update.A.stored.float())  # type: ignore[union-attr]
        for module, update in adapter.updates.items()
    }
    write(tmp_path / "b", adapter, baked, torch.float32)
    again = load(tmp_path / "b")
    assert again.modules and all(u.scaling == 1.0 for u in again.updates.values())

    loaded, said = from_pretrained(base.float(), tmp_path / "b")
    assert not surprises(said, case.warns)
    assert_same(peft_deltas(loaded), peft_deltas(model), FLOAT32)
    assert_same_parameters(loaded, model, case.dtype)


def from_pretrained(base: nn.Module, directory: Path) -> tuple[nn.Module, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(directory), autocast_adapter_dtype=False)
    return loaded, [str(w.message) for w in caught]


def surprises(said: list[str], expected: str = "") -> list[str]:
    """Warnings that are neither about the model nor expected."""
    allowed = (*ALLOWED, expected) if expected else ALLOWED
    return [text for text in said if not any(a in text for a in allowed)]


def assert_same_parameters(loaded: nn.Module, model: nn.Module, dtype: torch.dtype) -> None:
    """Everything but the factors is equal: base parameters, trained modules, biases, shifts of biases."""
    got, expected = loaded.state_dict(), model.state_dict()
    for name, tensor in expected.items():
        if ".lora_" not in name:
            torch.testing.assert_close(got[name].to(dtype), tensor, rtol=0, atol=0)
        elif name.endswith("lora_B.default.bias"):
            scaling = model.get_submodule(name.removesuffix(".lora_B.default.bias")).scaling["default"]
            torch.testing.assert_close(got[name], scaling * tensor.float())


def test_the_output_of_the_model_is_the_same(tmp_path: Path) -> None:
    base, model = trained(CASES["bert classifier"])
    adapter = load(save(model, tmp_path / "a"))
    baked = {m: (u.scaling * u.B.stored, u.A.stored) for m, u in adapter.updates.items()}  # type: ignore[operator]
    write(tmp_path / "b", adapter, baked, torch.float32)  # type: ignore[arg-type]
    loaded, _ = from_pretrained(base, tmp_path / "b")
    tokens = torch.arange(20).reshape(2, 10)
    torch.testing.assert_close(loaded.eval()(tokens).logits, model.eval()(tokens).logits)


def test_without_its_head_a_classifier_loads_for_any_task(tmp_path: Path) -> None:
    base, model = trained(CASES["bert classifier"])
    adapter = load(save(model, tmp_path / "a"))
    baked = {m: (u.scaling * u.B.stored, u.A.stored) for m, u in adapter.updates.items()}  # type: ignore[operator]
    write(tmp_path / "b", adapter, baked, torch.float32, extras={})  # type: ignore[arg-type]
    loaded, said = from_pretrained(base, tmp_path / "b")
    assert not surprises(said)
    assert_same(peft_deltas(loaded), peft_deltas(model), FLOAT32)


@pytest.mark.parametrize("only", ["x.query", "layers.1", "y.x.query"])
def test_only_the_written_modules_are_adapted(tmp_path: Path, only: str) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict(
        {
            "x": Mixed().x,
            "y": Mixed().y,
            "layers": Mixed().layers,
            "a": nn.ModuleDict({"layers": Mixed().layers}),
        }
    )
    base.forward = lambda x: x  # type: ignore[method-assign, assignment]
    n, m = base.get_submodule(only).weight.shape
    adapter = Adapter("a", {})
    write(tmp_path / "a", adapter, {only: (torch.randn(n, 2), torch.randn(2, m))}, torch.float32)
    loaded, said = from_pretrained(base, tmp_path / "a")
    assert list(peft_deltas(loaded)) == [only]
    assert not surprises(said)


def test_experts_of_different_ranks(tmp_path: Path) -> None:
    base = mixtral()
    where = "model.layers.1.mlp.experts.down_proj"
    n, m = 16, 12
    torch.manual_seed(0)
    factors = {f"{where}[{e}]": (torch.randn(n, r), torch.randn(r, m)) for e, r in ((0, 2), (3, 5))}
    adapter = adapter_of_experts(where, factors, experts=4)
    write(tmp_path / "a", adapter, factors, torch.float32)
    loaded, _ = from_pretrained(base, tmp_path / "a")
    delta = peft_deltas(loaded)[where]
    for e in range(4):
        left, right = factors.get(f"{where}[{e}]", (torch.zeros(n, 1), torch.zeros(1, m)))
        torch.testing.assert_close(delta[e], left.double() @ right.double())


def adapter_of_experts(container: str, factors: dict[str, tuple[Tensor, Tensor]], experts: int) -> Adapter:
    from fastlora.core.factors import Factor
    from fastlora.core.updates import Update

    updates = {}
    for module, (left, right) in factors.items():
        layout = Layout("expert", container=container, expert=int(module[:-1].rpartition("[")[2]), experts=experts)
        updates[module] = Update(Factor.of("B", left), Factor.of("A", right), layout=layout)
    return Adapter("a", updates)
