"""``add_weighted_adapter`` on live models against dense sums in float64, and against peft itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import (
    IDS,
    KINDS,
    Net,
    adapted,
    deltas,
    dense_outputs,
    factors,
    ia3,
    largest_error,
    layers,
    lora,
    outputs,
    truncated,
    weighted,
)
from peft import PeftModel
from torch import Tensor, nn

import fastlora as fl
from fastlora.integrations import peft as live
from tests.tolerances import FLOAT32, HALF, SUMS32

WEIGHTS = {"a": 0.7, "b": -0.4}
WHOLE = 64  # a rank above that of every module: nothing is cut
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"a": lora(), "b": lora()},
    "ranks": {"a": lora(3), "b": lora(5)},
    "rslora": {"a": lora(use_rslora=True), "b": lora()},
    "patterns": {"a": lora(rank_pattern={"up": 2, "conv2": 3}, alpha_pattern={"up": 5}), "b": lora()},
    "modules": {"a": lora(targets=["up", "conv3"]), "b": lora(targets=["up", "down", "emb"])},
    "targets": {"a": lora(targets=r".*(up|down)"), "b": lora(targets=["up", "conv1"])},
}


def trimmed(delta: Tensor, density: float) -> Tensor:
    kept = torch.zeros(delta.numel(), dtype=torch.float64)
    kept[delta.abs().flatten().topk(int(density * delta.numel())).indices] = 1
    return delta * kept.reshape(delta.shape)


def ties(rows: Tensor, weights: Tensor, elect: str) -> Tensor:
    votes = rows.sum(0) if elect == "total" else rows.sign().sum(0)
    agree = (rows.sign() == torch.where(votes >= 0, 1.0, -1.0)) & (rows != 0)
    return (rows * weights * agree).sum(0) / agree.sum(0).clamp_min(1)


def elementwise(model: nn.Module, density: float, elect: str | None) -> dict[str, Tensor]:
    """The formula of TIES or of magnitude pruning, an element at a time."""
    found: dict[str, Tensor] = {}
    parts = {name: deltas(model, name) for name in WEIGHTS}
    for path in dict.fromkeys(p for d in parts.values() for p in d):
        having = [name for name in WEIGHTS if path in parts[name]]
        rows = torch.stack([trimmed(parts[name][path], density) for name in having])
        weights = torch.tensor([WEIGHTS[name] for name in having], dtype=torch.float64)[:, None, None]
        found[path] = (rows * weights).sum(0) if elect is None else ties(rows, weights, elect)
    return found


TYPES: dict[str, tuple[dict[str, Any], Any]] = {
    "cat": ({}, lambda model: weighted(model, WEIGHTS)),
    "linear": ({}, lambda model: weighted(model, WEIGHTS)),
    "linear, cut": ({"svd_rank": 2}, lambda model: truncated(weighted(model, WEIGHTS), 2)),
    "svd": ({"svd_rank": 3}, lambda model: truncated(weighted(model, WEIGHTS), 3)),
    "ties": ({"density": 0.5, "svd_rank": WHOLE}, lambda model: elementwise(model, 0.5, "total")),
    "ties_svd": (
        {"density": 0.4, "svd_rank": WHOLE, "majority_sign_method": "frequency"},
        lambda model: elementwise(model, 0.4, "frequency"),
    ),
    "magnitude_prune": ({"density": 0.5, "svd_rank": WHOLE}, lambda model: elementwise(model, 0.5, None)),
    "magnitude_prune_svd": ({"density": 0.3, "svd_rank": WHOLE}, lambda model: elementwise(model, 0.3, None)),
    "dare_linear": ({"density": 1.0, "svd_rank": WHOLE}, lambda model: weighted(model, WEIGHTS)),
    "dare_linear_svd": ({"density": 1.0, "svd_rank": WHOLE}, lambda model: weighted(model, WEIGHTS)),
    "dare_ties": ({"density": 1.0, "svd_rank": WHOLE}, lambda model: elementwise(model, 1.0, "total")),
    "dare_ties_svd": ({"density": 1.0, "svd_rank": WHOLE}, lambda model: elementwise(model, 1.0, "total")),
}
"""Options of each type, and the updates that they mean."""


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", TYPES)
def test_outputs_are_those_of_dense_sums(name: str, kind: str, tmp_path: Path) -> None:
    """Of the live model; and saved, of the model that peft loads, and of what fastlora reads."""
    model = adapted(ADAPTERS[kind])
    options, dense = TYPES[name]
    wanted = dense(model)
    live.add_weighted_adapter(model, ["a", "b"], list(WEIGHTS.values()), "mix", name.partition(",")[0], **options)
    expected = dense_outputs(wanted)
    torch.testing.assert_close(outputs(model, "mix"), expected, rtol=SUMS32, atol=SUMS32)
    assert largest_error(deltas(model, "mix"), wanted) < SUMS32
    assert model.active_adapters == ["a"]
    model.save_pretrained(tmp_path, selected_adapters=["mix"], save_embedding_layers=False)
    again = PeftModel.from_pretrained(Net().eval(), tmp_path / "mix")
    torch.testing.assert_close(outputs(again, "default"), expected, rtol=SUMS32, atol=SUMS32)
    read = fl.load(tmp_path / "mix")
    assert isinstance(read, fl.Adapter)
    assert largest_error({p: read.delta(p).double() for p in read}, wanted) < SUMS32


@pytest.mark.parametrize("seed", [0, 1])
def test_random_masks_are_those_of_the_files(seed: int, tmp_path: Path) -> None:
    model = adapted(ADAPTERS["plain"])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    live.add_weighted_adapter(
        model, ["a", "b"], [0.7, -0.4], "mix", "dare_ties", svd_rank=WHOLE, density=0.5, seed=seed
    )
    pool = fl.Pool.load([tmp_path / "a", tmp_path / "b"])
    same = fl.merge(pool, WEIGHTS, method="dare", density=0.5, elect="total", rank=WHOLE, seed=seed)
    assert largest_error(deltas(model, "mix"), {p: same.delta(p).double() for p in same}) < SUMS32


@pytest.mark.parametrize("method", [m for m in fl.methods() if not fl.methods()[m].takes_data])
def test_every_method_of_ours_runs_on_a_live_model(method: str, tmp_path: Path) -> None:
    """And gives what it gives on files."""
    model = adapted({"a": lora(targets=["up", "down"]), "b": lora(targets=["up", "down"])})
    required = {n: 0.5 for n, p in fl.methods()[method].parameters.items() if p.required}
    rank = {"rank": 4} if "rank" in fl.methods()[method].parameters else {}
    weights = {"a": 0.6, "b": 0.4}
    if "min_energy" in fl.methods()[method].parameters:
        required["min_energy"] = 0.0
    try:
        same = fl.merge(live.pool(model), weights, method=method, **rank, **required)
    except fl.InputError as refusal:
        pytest.skip(str(refusal))
    svd_rank = {"svd_rank": 4} if rank else {}
    kind = {"density": required.pop("density")} if "density" in required else {}
    if method == "ties":
        kind["density"] = 0.2
    live.add_weighted_adapter(model, ["a", "b"], [0.6, 0.4], "mix", method, **svd_rank, **kind, **required)
    assert largest_error(deltas(model, "mix"), {p: same.delta(p).double() for p in same}) < SUMS32


def peft_made(model: PeftModel, *arguments: Any, **options: Any) -> PeftModel:
    """The same model, with the adapter that peft makes."""
    theirs = copy.deepcopy(model)
    theirs.add_weighted_adapter(*arguments, **options)
    return theirs


@pytest.mark.parametrize("kind", ["plain", "ranks", "modules"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cat_has_the_bits_of_peft(kind: str, dtype: torch.dtype) -> None:
    """peft fills modules that some adapter lacks with zeros up to one rank."""
    model = adapted(ADAPTERS[kind], dtype)
    theirs = peft_made(model, ["a", "b"], [0.7, -0.4], "mix", combination_type="cat")
    live.add_weighted_adapter(model, ["a", "b"], [0.7, -0.4], "mix", "cat")
    for path, layer in layers(theirs).items():
        B, A = factors(layer, "mix")
        b, a = factors(layers(model)[path], "mix")
        rank = a.shape[0]
        assert a.dtype == dtype
        assert torch.equal(b.float(), B[:, :rank].float()) and torch.equal(a.float(), A[:rank].float())
        assert not B[:, rank:].any() and not A[rank:].any()
    if kind == "plain" and dtype == torch.float32:
        assert torch.equal(outputs(model, "mix"), outputs(theirs, "mix"))


@pytest.mark.parametrize("weight", [0.7, -0.4])
@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_one_adapter_has_the_bits_of_peft(kind: str, weight: float) -> None:
    model = adapted({"a": lora()})
    theirs = peft_made(model, ["a"], [weight], "mix", combination_type=kind)
    live.add_weighted_adapter(model, ["a"], [weight], "mix", kind)
    for path, layer in layers(theirs).items():
        assert all(map(torch.equal, factors(layer, "mix"), factors(layers(model)[path], "mix")))
    assert torch.equal(outputs(model, "mix"), outputs(theirs, "mix"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("svd", {"svd_rank": 3}),
        ("svd", {}),
        ("ties_svd", {"density": 0.5, "svd_rank": 5}),
        ("ties_svd", {"density": 0.3, "svd_rank": 5, "majority_sign_method": "frequency"}),
        ("magnitude_prune_svd", {"density": 0.5, "svd_rank": 5}),
        ("dare_linear_svd", {"density": 1.0, "svd_rank": 5}),
    ],
)
def test_decompositions_are_those_of_peft(kind: str, options: dict[str, Any]) -> None:
    """To the rounding of its float32: signs of singular vectors are nobody's, so the factors have other bits."""
    targets = ["emb", "up", "down", "conv2"]  # peft decomposes no other convolutions
    model = adapted({"a": lora(targets=targets), "b": lora(5, targets=targets)})
    theirs = peft_made(model, ["a", "b"], [0.7, -0.4], "mix", combination_type=kind, **options)
    live.add_weighted_adapter(model, ["a", "b"], [0.7, -0.4], "mix", kind, **options)
    assert largest_error(deltas(model, "mix"), deltas(theirs, "mix")) < SUMS32


@pytest.mark.parametrize("quantile", [0.6, 0.9, 1.0])
def test_entries_are_clamped_whatever_their_signs(quantile: float) -> None:
    """The formula, on the dense matrix. At 1 nothing is cut."""
    model = adapted(ADAPTERS["plain"])
    wanted = {}
    for path, delta in weighted(model, WEIGHTS).items():
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        left, right = U[:, :3] * S[:3], Vh[:3]
        entries = torch.cat([left.flatten(), right.flatten()])
        most = float(torch.quantile(torch.cat([entries, -entries]), quantile))
        wanted[path] = left.clamp(-most, most) @ right.clamp(-most, most)
    live.add_weighted_adapter(model, ["a", "b"], list(WEIGHTS.values()), "mix", "svd", 3, quantile)
    assert largest_error(deltas(model, "mix"), wanted) < SUMS32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_half_precision(dtype: torch.dtype) -> None:
    model = adapted(ADAPTERS["plain"], dtype)
    wanted = truncated(weighted(model, WEIGHTS), 3)
    live.add_weighted_adapter(model, ["a", "b"], list(WEIGHTS.values()), "mix", "svd", 3)
    assert {f.dtype for layer in layers(model).values() for f in factors(layer, "mix")} == {dtype}
    assert largest_error(deltas(model, "mix"), wanted) < HALF
    live.add_weighted_adapter(model, ["a", "b"], list(WEIGHTS.values()), "wide", "svd", 3, dtype="float32")
    assert largest_error(deltas(model, "wide"), wanted) < FLOAT32


def test_biases_of_lora_are_summed(tmp_path: Path) -> None:
    configs = {"a": lora(targets=["up", "conv2"], lora_bias=True), "b": lora(targets=["up"], use_rslora=True)}
    model = adapted(configs)
    a = {p: layer for p, layer in layers(model).items()}
    shifts = {p: 0.7 * float(a[p].scaling["a"]) * a[p].lora_B["a"].bias.detach() for p in ("up", "conv2")}
    for kind, wanted in (("cat", weighted(model, WEIGHTS)), ("svd", truncated(weighted(model, WEIGHTS), 4))):
        live.add_weighted_adapter(model, ["a", "b"], list(WEIGHTS.values()), kind, kind)
        expected = dense_outputs(wanted, shifts)
        torch.testing.assert_close(outputs(model, kind), expected, rtol=SUMS32, atol=SUMS32)
        model.save_pretrained(tmp_path, selected_adapters=[kind], save_embedding_layers=False)
        again = PeftModel.from_pretrained(Net().eval(), tmp_path / kind)
        torch.testing.assert_close(outputs(again, "default"), expected, rtol=SUMS32, atol=SUMS32)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
def test_ia3_is_centred_at_one(weights: tuple[float, float], tmp_path: Path) -> None:
    model = adapted({"a": ia3(["up", "down"], ["down"]), "b": ia3(["up", "conv2"], [])})
    vectors = {
        path: 1 + sum(w * (held[n].detach().double() - 1) for n, w in zip("ab", weights, strict=True) if n in held)
        for path, held in ((p, layer.ia3_l) for p, layer in layers(model).items())
    }
    live.add_weighted_adapter(model, ["a", "b"], list(weights), "mix")
    for path, layer in layers(model).items():
        torch.testing.assert_close(layer.ia3_l["mix"].double(), vectors[path], rtol=FLOAT32, atol=FLOAT32)
    given = outputs(model, "mix")
    model.save_pretrained(tmp_path, selected_adapters=["mix"], save_embedding_layers=False)
    again = PeftModel.from_pretrained(Net().eval(), tmp_path / "mix")
    assert torch.equal(outputs(again, "default"), given)
    assert isinstance(fl.load(tmp_path / "mix"), fl.IA3)


def test_peft_and_ours_agree_on_ia3_where_weights_sum_to_one() -> None:
    model = adapted({n: ia3(["up", "down"], ["down"]) for n in "ab"})
    theirs = peft_made(model, ["a", "b"], [0.75, 0.25], "mix")
    live.add_weighted_adapter(model, ["a", "b"], [0.75, 0.25], "mix")
    torch.testing.assert_close(outputs(model, "mix"), outputs(theirs, "mix"), rtol=SUMS32, atol=SUMS32)


def test_weights_of_set_scale_count_unless_told_otherwise() -> None:
    model = adapted(ADAPTERS["rslora"])
    before = weighted(model, {"a": 1.0})
    for layer in layers(model).values():
        layer.set_scale("a", 0.25)
    live_pool, config_pool = live.pool(model, ["a"]), live.pool(model, ["a"], "config")
    for path, delta in before.items():
        torch.testing.assert_close(live_pool["a"].delta(path).double(), 0.25 * delta, rtol=SUMS32, atol=SUMS32)
        torch.testing.assert_close(config_pool["a"].delta(path).double(), delta, rtol=SUMS32, atol=SUMS32)


def test_a_pool_holds_views() -> None:
    model = adapted(ADAPTERS["plain"])
    pool = live.pool(model)
    for path, layer in layers(model).items():
        stored = [pool["a"].updates[path].B.stored, pool["a"].updates[path].A.stored]
        assert [s.data_ptr() for s in stored] == [f.data_ptr() for f in factors(layer, "a")]
    assert pool.names == ["a", "b"] and set(pool.modules) == set(KINDS)


def test_the_result_is_frozen_and_in_memory_of_its_own() -> None:
    """Training an adapter afterwards changes nothing in what was made of it."""
    model = adapted(ADAPTERS["modules"])
    live.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "mix", "cat")
    live.write(model, live.read(model, "a"), "twin")
    live.decompose_adapters(model, ["a", "b"], threshold=0.5)
    made = ["mix", "twin", "shared", "unique_a", "unique_b"]
    before = {name: deltas(model, name) for name in made}
    assert not any(p.requires_grad for k, p in model.named_parameters() if any(f".{n}" in k for n in made))
    with torch.no_grad():
        for layer in layers(model).values():
            for name in ("a", "b"):
                for factor in factors(layer, name) or ():
                    factor.add_(1.0)
    assert all(torch.equal(deltas(model, n)[p], d) for n, parts in before.items() for p, d in parts.items())


def test_what_is_trained_and_active_stays_so() -> None:
    model = adapted(ADAPTERS["modules"]).train()
    model.set_adapter("b")
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    live.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "mix", "svd")
    assert {k for k, p in model.named_parameters() if p.requires_grad} == trained
    assert model.active_adapters == ["b"] and {tuple(m.active_adapters) for m in layers(model).values()} == {("b",)}
    live.write(model, live.read(model, "mix"), "other", activate=True)
    assert model.active_adapters == ["other"] and model.active_adapter == "other"
    model.eval()
    torch.testing.assert_close(model(IDS).detach().double(), outputs(model, "mix"), rtol=0, atol=0)


def test_uniform_rank_needs_no_patterns() -> None:
    model = adapted(ADAPTERS["modules"])
    live.add_weighted_adapter(model, ["a", "b"], [0.7, -0.4], "mix", "cat", uniform_rank=True)
    config = model.peft_config["mix"]
    assert (config.r, config.rank_pattern, config.alpha_pattern) == (8, {}, {})
    assert {factors(layer, "mix")[1].shape[0] for layer in layers(model).values()} == {8}
    assert largest_error(deltas(model, "mix"), weighted(model, WEIGHTS)) < SUMS32
