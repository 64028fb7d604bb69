"""Fused projections of one adapter against their parts in another: brought together exactly, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PREFIX, make_config, peft_tensors, write_peft
from tolerances import SUMS32
from torch import Tensor
from two_forms import HIDDEN, WHERE, changes, factors, run

import fastlora as fl

KV, UP = 8, 20
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "mlp.gate_proj": (UP, HIDDEN),
    "mlp.up_proj": (UP, HIDDEN),
}
FUSED_SHAPES = {"self_attn.qkv_proj": (HIDDEN + 2 * KV, HIDDEN), "mlp.gate_up_proj": (2 * UP, HIDDEN)}
ROWS = {
    "self_attn.q_proj": ("self_attn.qkv_proj", 0),
    "self_attn.k_proj": ("self_attn.qkv_proj", HIDDEN),
    "self_attn.v_proj": ("self_attn.qkv_proj", HIDDEN + KV),
    "mlp.gate_proj": ("mlp.gate_up_proj", 0),
    "mlp.up_proj": ("mlp.gate_up_proj", UP),
}
COMMON = {"mlp.down_proj": (HIDDEN, UP)}


def dense_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, int]], seed: int, prefix: str = WHERE, rank: int = 3
) -> Path:
    modules = {prefix + m: factors(*s, 50 * seed + i, rank) for i, (m, s) in enumerate(shapes.items())}
    return write_peft(folder, peft_tensors(modules), make_config(r=rank, lora_alpha=5, target_modules=["x"]))


def on_fused(adapter: Any, weight: float, total: dict[str, Tensor]) -> None:
    """Adds an adapter of either form to the updates of fused weights."""
    for module in adapter.modules:
        name, delta = module.rpartition("layers.0.")[2], weight * adapter.delta(module).double()
        fused, start = ROWS.get(name, (name, 0))
        shape = {**FUSED_SHAPES, **COMMON}[fused]
        total.setdefault(fused, torch.zeros(shape, dtype=torch.float64))[start : start + delta.shape[0]] += delta


def assert_same_weights(found: Any, terms: Iterable[tuple[float, Path]]) -> None:
    """What an adapter of either form says of the fused weights is the sum of what the terms say."""
    got: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    on_fused(found, 1.0, got)
    for weight, folder in terms:
        on_fused(fl.load(folder), weight, expected)
    assert got.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(got[name], delta, rtol=0, atol=SUMS32 * float(delta.abs().max()))


def assert_sum(found: Any, terms: Iterable[tuple[float, Path]], *, fused: bool) -> None:
    ends = {m.rpartition("layers.0.")[2] for m in found.modules}
    assert ends.isdisjoint(ROWS if fused else FUSED_SHAPES), "both forms in one result"
    assert_same_weights(found, terms)


SUBSETS = {
    "all": tuple(SHAPES),
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "q and v": ("self_attn.q_proj", "self_attn.v_proj"),
    "up": ("mlp.up_proj",),
    "gate, k": ("mlp.gate_proj", "self_attn.k_proj"),
}


@pytest.mark.parametrize("common", [{}, COMMON], ids=["nothing else", "and down_proj"])
@pytest.mark.parametrize("parts", SUBSETS.values(), ids=SUBSETS)
def test_fused_projections_and_their_parts(tmp_path: Path, parts: tuple[str, ...], common: Any) -> None:
    fused = dense_adapter(tmp_path / "fused", FUSED_SHAPES | common, 1)
    split = dense_adapter(tmp_path / "split", {p: SHAPES[p] for p in parts} | common, 2)
    terms = [(0.5, fused), (-1.0, split)]
    weights = {"fused": 0.5, "split": -1.0}
    for order in ([fused, split], [split, fused]):
        pool = fl.Pool.load(order)
        is_fused = order[0] is fused
        assert pool.notices
        found = fl.merge(pool, weights, method="cat")
        ends = {m.rpartition("layers.0.")[2] for m in found.modules}
        touched = {ROWS[p][0] for p in parts}  # what only the fused adapter has stays fused
        assert ends.isdisjoint(ROWS if is_fused else touched), "both forms in one result"
        assert_same_weights(found, terms)


def test_fused_projections_in_every_way_of_combining(tmp_path: Path) -> None:
    fused = dense_adapter(tmp_path / "fused", FUSED_SHAPES | COMMON, 1)
    split = dense_adapter(tmp_path / "split", SHAPES | COMMON, 2)
    a, b = fl.load(fused), fl.load(split)
    assert_sum(a + b, [(1, fused), (1, split)], fused=True)
    assert_sum(b - a, [(-1, fused), (1, split)], fused=False)
    run("compose", "a + 2*b", f"a={fused}", f"b={split}", "--out", tmp_path / "out")
    assert_sum(fl.load(tmp_path / "out"), [(1, fused), (2, split)], fused=True)
    parts = fl.decompose(fl.Pool.load([fused, split]), threshold=0.05)
    for path in (fused, split):
        got: dict[str, Tensor] = {}
        on_fused(parts.shared_of(path.name), 1.0, got)
        on_fused(parts.unique_of(path.name), 1.0, got)
        expected: dict[str, Tensor] = {}
        on_fused(fl.load(path), 1.0, expected)
        for name, delta in expected.items():
            torch.testing.assert_close(got[name], delta, rtol=0, atol=SUMS32 * float(delta.abs().max()))
    one, two = dict[str, Tensor](), dict[str, Tensor]()
    on_fused(a, 1.0, one)
    on_fused(b, 1.0, two)
    inner = sum(float((one[m] * two[m]).sum()) for m in one)
    norms = [sum(float(d.square().sum()) for d in x.values()) ** 0.5 for x in (one, two)]
    for order in ([fused, split], [split, fused]):
        cosine = float(fl.overlap(fl.Pool.load(order)).cosine[0, 1])
        assert cosine == pytest.approx(inner / (norms[0] * norms[1]), abs=SUMS32)
    moved: dict[str, Tensor] = {}
    on_fused(fl.modulate(a, fl.dipm.interpolate(b, 1.0), granularity="matrix"), 1.0, moved)
    for name, delta in moved.items():
        torch.testing.assert_close(delta, two[name], rtol=0, atol=SUMS32 * float(delta.abs().max()))


def test_fused_projections_under_another_prefix(tmp_path: Path) -> None:
    fused = dense_adapter(tmp_path / "fused", FUSED_SHAPES | COMMON, 1)
    split = dense_adapter(tmp_path / "split", SHAPES | COMMON, 2, prefix=f"base.{WHERE}")
    for order, is_fused in (([fused, split], True), ([split, fused], False)):
        found = fl.merge(fl.Pool.load(order), method="cat")
        assert_sum(found, [(1, fused), (1, split)], fused=is_fused)


REFUSED = {
    "heads in turn": ({"attention.query_key_value": (48, 16)}, {"self_attn.q_proj": (16, 16)}),
    "Conv1D": ({"attn.c_attn": (48, 16)}, {"self_attn.v_proj": (16, 16)}),
    "bert": ({"attention.self.query": (16, 16)}, {"attn.qkv": (48, 16)}),
    "parts of unknown order": ({"attn.qkv_proj": (48, 16)}, {"attn.q_proj": (16, 16)}),
    "keys and values": ({"attn.to_kv": (32, 16)}, {"attn.to_v": (16, 16)}),
    "keys and values beside queries": (
        {"attn.kv_proj": (32, 16), "attn.q_proj": (16, 16)},
        {"attn.k_proj": (16, 16), "attn.q_proj": (16, 16)},
    ),
    "megatron": ({"mlp.linear_fc1": (40, 16)}, {"mlp.gate_proj": (20, 16)}),
    "wrong width": ({"mlp.gate_up_proj": (48, 16)}, {"mlp.up_proj": (16, 16)}),
    "wrong inputs": ({"self_attn.qkv_proj": (48, 16)}, {"self_attn.q_proj": (16, 8)}),
    "both in one": ({"self_attn.qkv_proj": (48, 16), "self_attn.q_proj": (16, 16)}, {"self_attn.q_proj": (16, 16)}),
}


@pytest.mark.parametrize("shapes", REFUSED.values(), ids=REFUSED)
def test_forms_that_cannot_be_brought_together_are_refused_by_name(tmp_path: Path, shapes: Any) -> None:
    common = {"mlp.down_proj": (16, 24)}
    one, two = (
        dense_adapter(tmp_path / name, s | common, i) for i, (name, s) in enumerate(zip("ab", shapes, strict=True))
    )
    mine, theirs = (next(iter(s)) for s in shapes)
    for order in ([one, two], [two, one]):
        with pytest.raises(fl.InputError) as error:
            fl.merge(fl.Pool.load(order), method="cat")
        assert mine in str(error.value) and theirs.rpartition(".")[2] in str(error.value)
        with pytest.raises(fl.InputError):
            fl.load(order[0]) + fl.load(order[1])


def test_vectors_of_fused_projections_and_of_their_parts_are_refused(tmp_path: Path) -> None:
    for name, modules in (("a", {"mlp.gate_up_proj": 40}), ("b", {"mlp.gate_proj": 20, "mlp.up_proj": 20})):
        tensors = {f"{PREFIX}{WHERE}{m}.ia3_l": torch.ones(n, 1) for m, n in modules.items()}
        tensors[f"{PREFIX}{WHERE}mlp.down_proj.ia3_l"] = torch.ones(1, 20)
        config = {"peft_type": "IA3", "target_modules": ["mlp"], "feedforward_modules": ["down_proj"]}
        write_peft(tmp_path / name, tensors, config)
    a, b = fl.load(tmp_path / "a"), fl.load(tmp_path / "b")
    with pytest.raises(fl.InputError, match=r"'b' has .*gate_proj, and 'a' has .*gate_up_proj"):
        a + b
    assert (a + a).modules == a.modules


def test_a_model_with_fused_and_split_attention_is_no_conflict(tmp_path: Path) -> None:
    shapes = {"attn.qkv": (48, 16), "cross_attn.to_q": (16, 16), "attn2.to_k": (16, 16)}
    one, two = dense_adapter(tmp_path / "a", shapes, 1), dense_adapter(tmp_path / "b", {"cross_attn.to_q": (16, 16)}, 2)
    assert len(fl.Pool.load([one, two]).modules) == 3


def test_peft_loads_the_sum_of_fused_projections(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config)
    fused = dense_adapter(tmp_path / "fused", FUSED_SHAPES | COMMON, 1)
    split = dense_adapter(tmp_path / "split", SHAPES | COMMON, 2)
    run("merge", fused, split, "--method", "cat", "--out", tmp_path / "out")
    total: dict[str, Tensor] = {}
    on_fused(fl.load(fused), 1.0, total)
    on_fused(fl.load(split), 1.0, total)
    found = changes(model, tmp_path / "out")
    assert set(found) == {f"{WHERE}{name}.weight" for name in total}
    for name, delta in total.items():
        change = found[f"{WHERE}{name}.weight"].double()
        torch.testing.assert_close(change, delta, rtol=0, atol=SUMS32 * float(delta.abs().max()))
