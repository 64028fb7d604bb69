"""Reading PEFT directories: values bit for bit, nothing copied."""

from __future__ import annotations

import gc
import json
import math
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
from fastlora.errors import InputError
from fastlora.files import tensor_files

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
