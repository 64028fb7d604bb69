"""What a live model cannot do is said in one sentence, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_models import Net, adapted, fingerprint, ia3, layers, lora
from peft import LoHaConfig, LoraConfig, PeftMixedModel, get_peft_model
from torch import nn

import fastlora as fl
from fastlora.core.data import Extra
from fastlora.integrations import peft as live
from fastlora.integrations.peft import writing

SOME = ["up", "down"]


def two(**fields: Any) -> nn.Module:
    """A model with a plain adapter and one with these fields."""
    return adapted({"a": lora(targets=SOME), "b": lora(targets=SOME, **fields)})


def mixed(model: nn.Module, kind: str = "svd", names: Any = ("a", "b"), weights: Any = (1.0, 1.0), **more: Any) -> None:
    live.add_weighted_adapter(model, names, weights, more.pop("name", "mix"), kind, **more)


def alone(model: nn.Module) -> None:
    mixed(model, names=["a"], weights=[1.0])


def elsewhere(module: str = "up", shape: tuple[int, int] = (18, 12)) -> fl.Adapter:
    return fl.Adapter.from_tensors({module: (torch.ones(shape[0], 2), torch.ones(2, shape[1]))}, name="other")


def on_meta(model: nn.Module) -> None:
    layers(model)["up"].lora_A["b"].weight = nn.Parameter(torch.empty(4, 12, device="meta"))


BAD: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], str]] = {
    "not loaded": (two, lambda m: mixed(m, names=["a", "c"]), "has no adapter 'c'; it has a, b"),
    "name exists": (two, lambda m: mixed(m, name="b"), "has an adapter 'b' already; choose another name"),
    "name with a dot": (two, lambda m: mixed(m, name="v1.5"), "a text without dots"),
    "name of a method": (two, lambda m: mixed(m, name="copy"), "have a method of that name"),
    "unknown type": (two, lambda m: mixed(m, "best"), "combination_type='best' does not exist: use one of peft's"),
    "weights missing": (two, lambda m: mixed(m, weights=[1.0]), "2 adapters and 1 weights"),
    "no adapters": (two, lambda m: mixed(m, names=[], weights=[]), "a list of names is needed"),
    "a text": (two, lambda m: mixed(m, names="ab"), "a list of names is needed"),
    "twice": (two, lambda m: mixed(m, names=["a", "a"]), "listed twice"),
    "weight": (two, lambda m: mixed(m, weights=[1.0, float("nan")]), "must be a finite number"),
    "rank": (two, lambda m: mixed(m, svd_rank=0), "svd_rank=0"),
    "rank of cat": (two, lambda m: mixed(m, "cat", svd_rank=2), "'svd' cuts it"),
    "clamp": (two, lambda m: mixed(m, svd_clamp=0.2), "a quantile of at least 0.5"),
    "density missing": (two, lambda m: mixed(m, "ties_svd"), "needs density"),
    "density": (two, lambda m: mixed(m, "ties_svd", density=2.0), "density"),
    "majority": (two, lambda m: mixed(m, "ties", density=0.5, majority_sign_method="most"), "majority_sign_method"),
    "parameter": (two, lambda m: mixed(m, "svd", banana=3), "does not take banana"),
    "parameter of cat": (two, lambda m: mixed(m, "cat", energy=0.9), "takes no parameters"),
    "scaling": (two, lambda m: live.pool(m, scaling="now"), "scaling='now'"),
    "dtype": (two, lambda m: mixed(m, dtype="int8"), "adapters are saved as"),
    "dora": (lambda: two(use_dora=True), mixed, "is a DoRA adapter: its magnitudes rescale the base weight"),
    "trained biases": (lambda: two(bias="lora_only"), mixed, "trained biases of the model"),
    "pissa": (lambda: two(init_lora_weights="pissa"), mixed, "changed the base model"),
    "tokens": (
        lambda: adapted({"a": lora(targets=SOME), "b": lora(targets=SOME, trainable_token_indices={"emb": [1]})}),
        mixed,
        "trained tokens",
    ),
    "replaced modules": (lambda: two(modules_to_save=["conv1"]), lambda m: mixed(m, "cat"), "conv1"),
    "other kind": (lambda: adapted({"a": LoHaConfig(r=2, target_modules=SOME)}), alone, "convert_to_lora"),
    "types of ia3": (
        lambda: adapted({n: ia3(["up"], []) for n in "ab"}), lambda m: mixed(m, "ties"), "one weighted sum"
    ),
    "pool of ia3": (lambda: adapted({n: ia3(["up"], []) for n in "ab"}), live.pool, "has no low-rank updates"),
    "wrong base": (two, lambda m: live.write(m, elsewhere("layers.0.up")), "the model does not have; there are 'up'"),
    "wrong shape": (two, lambda m: live.write(m, elsewhere(shape=(18, 13))), "belongs to another base model"),
    "shape of what is new": (two, lambda m: live.write(m, elsewhere("emb", (12, 20))), "an embedding in the model"),
    "no layer for it": (two, lambda m: live.write(m, elsewhere("conv1", (6, 4))), "belongs to another base model"),
    "merged": (lambda: _merged(two()), mixed, "unmerge them first"),
    "no memory": (lambda: _changed(two(), on_meta), mixed, "offloaded or sharded"),
    "nan": (lambda: _with(float("nan")), mixed, "NaN"),
    "nan in a sum": (lambda: _with(float("nan")), lambda m: mixed(m, "cat"), "NaN or Inf"),
    "overflow": (lambda: _with(1e30), lambda m: mixed(m, "cat", weights=[1e30, 1.0]), "NaN or Inf"),
    "values": (two, lambda m: live.write(m, _with_values()), "modules_to_save"),
    "no update": (two, lambda m: live.write(m, 3), "an adapter is needed"),  # type: ignore[arg-type]
    "one to decompose": (two, lambda m: live.decompose_adapters(m, ["a"]), "two adapters"),
    "pairs": (two, lambda m: live.decompose_adapters(m, mode="pairs"), "mode='pairs'"),
    "no slot": (two, lambda m: live.swap(m, elsewhere(), "c"), "has no adapter 'c'"),
    "rank of a slot": (two, lambda m: live.swap(m, live.pool(m)["a"] + live.pool(m)["b"], "a"), "compress it first"),
    "module of a slot": (two, lambda m: live.swap(m, elsewhere("conv1", (6, 4)), "a"), "which slot 'a' does not have"),
    "shape of a slot": (two, lambda m: live.swap(m, elsewhere(shape=(18, 13)), "a"), "different base models"),
    "merged slot": (lambda: _merged(two()), lambda m: live.swap(m, elsewhere(), "a"), "unmerge it first"),
    "no adapters at all": (Net, live.pool, "the model has no adapters"),
    "no model": (two, lambda m: live.pool("model"), "a model is needed"),  # type: ignore[arg-type]
}  # fmt: skip


def _merged(model: Any) -> nn.Module:
    model.merge_adapter(["a"])
    return model


def _changed(model: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    change(model)
    return model


def _with(number: float) -> nn.Module:
    model = two()
    layers(model)["up"].lora_A["a"].weight.data[0, 0] = number
    return model


def _with_values() -> fl.Adapter:
    return replace(elsewhere(), extras={"conv1.weight": Extra("value", torch.ones(2))})


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_told_and_change_nothing(case: str) -> None:
    make, call, message = BAD[case]
    model = make()
    before = None if case == "no memory" else repr(fingerprint(model))
    with pytest.raises(fl.FastloraError) as told:
        call(model)
    text = str(told.value)
    assert message in text and "\n" not in text, text
    assert before is None or repr(fingerprint(model)) == before


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, fl.InputError])
def test_a_failure_in_the_middle_is_undone(
    error: type[BaseException], bare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some layers were made, of modules that had one and of modules that had none."""
    model = Net().eval() if bare else two()
    before = fingerprint(model)
    fill, calls = writing._fill, []

    def failing(*arguments: Any) -> None:
        calls.append(fill(*arguments))
        if len(calls) == 3:
            raise error("stop")

    monkeypatch.setattr(writing, "_fill", failing)
    adapter = fl.Adapter.from_tensors(
        {m: (torch.ones(n, 2), torch.ones(2, k)) for m, n, k in (("up", 18, 12), ("down", 12, 18))}
        | {"conv1": (torch.ones(6, 2, 1), torch.ones(2, 4, 3)), "emb": (torch.ones(12, 2), torch.ones(2, 20))},
        name="new",
        embeddings=["emb"],
    )
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else fl.InputError):
        live.write(model, adapter)
    assert repr(fingerprint(model)) == repr(before)
    monkeypatch.undo()
    live.write(model, adapter)
    assert not bare or {p for p, _ in model.named_parameters() if "new" in p}


def test_decompositions_are_written_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two()
    before = fingerprint(model)
    put, calls = writing._put_factors, []

    def failing(*arguments: Any) -> None:
        calls.append(put(*arguments))
        if len(calls) == 2:
            raise RuntimeError("stop")

    monkeypatch.setattr(writing, "_put_factors", failing)
    with pytest.raises(fl.InputError, match="peft could not add the adapter to the model, which is as it was"):
        live.decompose_adapters(model, ["a", "b"])
    assert repr(fingerprint(model)) == repr(before)


def test_different_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one adapter: no second device is here, so that what a layer says of its own is changed."""
    from fastlora.integrations.peft import reading

    class Elsewhere:
        device = "cuda:1"

    model = two()
    factors = reading._factors

    def moved(path: str, *arguments: Any) -> Any:
        found = factors(path, *arguments)
        return found._replace(B=Elsewhere(), A=Elsewhere()) if path == "down" else found

    monkeypatch.setattr(reading, "_factors", moved)
    with pytest.raises(fl.InputError, match=r"different devices \('up' on cpu, 'down' on cuda:1\); move the model"):
        mixed(model)


@pytest.mark.parametrize("kind", ["svd", "cat"])
def test_adapters_on_different_devices_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = two()
    before = fingerprint(model)
    places = {"a": torch.device("cpu"), "b": torch.device("cuda", 1)}
    monkeypatch.setattr(fl.Adapter, "place", property(lambda adapter: places[adapter.name]))
    with pytest.raises(fl.InputError, match=r"'b' on cuda:1, 'a' on cpu\); move the model to one"):
        mixed(model, kind)
    assert repr(fingerprint(model)) == repr(before)


def test_what_a_merge_has_to_tell_is_told() -> None:
    model = two()
    layers(model)["up"].lora_B["b"].weight.data.zero_()
    layers(model)["down"].lora_B["b"].weight.data.zero_()
    with pytest.warns(UserWarning, match="'b'"):
        mixed(model)
    with pytest.warns(UserWarning, match=r"keeps 0\.\d+ of Σσ² of the merged ΔW.*give a larger svd_rank"):
        mixed(two(), "ties", density=0.1, svd_rank=1)


def test_grouped_convolutions_attention_and_mixed_models_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)
            self.grouped = nn.Conv2d(4, 4, 3, groups=2)
            self.attend = nn.MultiheadAttention(4, 2)

    for config, text in (
        (LoraConfig(r=2, target_modules=["grouped"]), "grouped convolution"),
        (LoraConfig(r=2, target_modules=["attend"]), "holds several weights"),
    ):
        model = get_peft_model(Odd(), config, adapter_name="a")
        before = fingerprint(model)
        with pytest.raises(fl.UnsupportedAdapter, match=text):
            live.pool(model)
        if text != "holds several weights":  # these make their parameters anew whenever they are listed
            assert repr(fingerprint(model)) == repr(before)
    with pytest.raises(fl.InputError, match="PeftMixedModel holds adapters of several kinds"):
        live.pool(PeftMixedModel(Net(), lora(targets=["up"]), adapter_name="a"))
