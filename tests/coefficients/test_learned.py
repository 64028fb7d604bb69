"""Learned coefficients: the numbers of the merged adapter in peft, the right gradients, AdaMerging's training."""

from __future__ import annotations

from typing import Any

import pools
import pytest
import torch
from builders import gaussian
from tolerances import FLOAT64, GRAM64, HALF, MODEL32, SUMS32
from torch import Tensor, nn

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.coefficients.learned import entropy
from fastlora.core.data import Extra
from fastlora.core.factors import Factor
from fastlora.core.updates import Layout, Update


class Net(nn.Module):
    """Every kind of module that can be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 5, 3, stride=2, padding=1, dilation=1)
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.emb(ids).mT).mT
        return self.head(self.body(x).mean(1))


SHAPES: dict[str, tuple[int, int, Layout]] = {
    "emb": (6, 11, Layout("embedding")),
    "conv": (5, 18, Layout("conv", kernel=(3,))),
    "body.0": (8, 5, Layout()),
    "head": (4, 8, Layout()),
}


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def component(
    name: str, seed: int, rank: int = 2, only: tuple[str, ...] = tuple(SHAPES), scaling: float = 1.5
) -> Adapter:
    updates = {
        m: Update(
            Factor.of("B", gaussian(n, rank, seed=seed + i, dtype=torch.float64)),
            Factor.of("A", gaussian(rank, k, seed=seed + i + 50, dtype=torch.float64)), scaling, layout,
        )
        for i, (m, (n, k, layout)) in enumerate(SHAPES.items()) if m in only
    }  # fmt: skip
    return Adapter(name, updates, dtype=torch.float64)


def components() -> list[Adapter]:
    return [component("a", 1), component("b", 200, 3, scaling=-0.5), component("c", 400, 1, ("head", "emb"))]


IDS = torch.randint(0, 11, (7, 6), generator=torch.Generator().manual_seed(1))


def merged(adapter: Adapter) -> Net:
    """The network with ``W + ΔW`` written into its weights."""
    model = net()
    with torch.no_grad():
        for path, update in adapter.updates.items():
            module, delta = model.get_submodule(path), pools.exact(update)
            weight: Tensor = module.weight  # type: ignore[assignment]
            weight += (delta.mT if isinstance(module, nn.Embedding) else delta).reshape(weight.shape)
    return model


@pytest.mark.parametrize("per", ["task", "layer"])
def test_the_model_computes_what_the_merged_weights_compute(per: Any) -> None:
    merge = fl.LearnedMerge(net(), components(), per=per)
    with torch.no_grad():
        merge.coefficients.copy_(torch.rand(merge.coefficients.shape, generator=torch.Generator().manual_seed(2)))
    torch.testing.assert_close(merge(IDS), merged(merge.adapter())(IDS), rtol=FLOAT64, atol=FLOAT64)
    assert merge.adapter().modules == list(SHAPES)
    merge.close()
    assert torch.equal(merge(IDS), net()(IDS))


@pytest.mark.parametrize("per", ["task", "layer"])
@pytest.mark.parametrize("clamp", [True, False])
def test_gradients(per: Any, clamp: bool) -> None:
    merge = fl.LearnedMerge(net(), components(), per=per, clamp=clamp, init=0.4).double()

    def loss(coefficients: Tensor) -> Tensor:
        return entropy(torch.func.functional_call(merge, {"coefficients": coefficients}, (IDS,)))

    given = merge.coefficients.detach().clone() + torch.linspace(-0.1, 0.1, merge.coefficients.numel()).reshape_as(
        merge.coefficients
    )
    # The hooks look `coefficients` up on the module, so a functional call differentiates through all of them.
    assert torch.autograd.gradcheck(loss, (given.requires_grad_(),))
    used = torch.autograd.grad(loss(given), given)[0]
    absent = [[m not in c.updates for c in merge.components.values()] for m in merge.modules_adapted]
    assert bool((used != 0).any())
    if per == "layer":
        assert bool((used[torch.tensor(absent)] == 0).all())


def test_clamping() -> None:
    merge = fl.LearnedMerge(net(), components(), init=1.7)
    assert list(merge.weights.values()) == [1.0] * 3
    entropy(merge(IDS)).backward()
    assert merge.coefficients.grad is not None and not merge.coefficients.grad.any()
    free = fl.LearnedMerge(net(), components(), init=1.5, clamp=False)
    assert list(free.weights.values()) == [1.5] * 3


@pytest.mark.parametrize("per", ["task", "layer"])
def test_fitting_finds_planted_coefficients(per: Any) -> None:
    """A loss whose minimum is known: the outputs of a merge with other coefficients."""
    truth = fl.LearnedMerge(net(), components(), per=per)
    with torch.no_grad():
        truth.coefficients.copy_(torch.rand(truth.coefficients.shape, generator=torch.Generator().manual_seed(3)))
        batches = [torch.randint(0, 11, (32, 6), generator=torch.Generator().manual_seed(i)) for i in range(4)]
        targets = {id(b): truth(b) for b in batches}
    merge = fl.LearnedMerge(net(), components(), per=per)
    losses = merge.fit(batches, lambda out, batch: (out - targets[id(batch)]).square().mean(), steps=400, lr=0.02)
    # How far 400 steps come is no bound of rounding: they come much further than this.
    assert len(losses) == 400 and losses[-1] < 0.05 * losses[0]
    if per == "task":  # the many coefficients of layers have no unique or easily found minimum
        assert losses[-1] < 1e-3 * losses[0]
        torch.testing.assert_close(merge.used(), truth.used(), rtol=0, atol=0.02)


def test_entropy_is_adamergings_and_training_lowers_it() -> None:
    logits = gaussian(5, 7, seed=1, dtype=torch.float64)
    p = logits.softmax(-1)
    assert float(entropy(logits)) == pytest.approx(float(-(p * p.log()).sum(-1).mean()))
    assert float(entropy(torch.tensor([[0.0, 2000.0]]))) == 0.0
    model = net().train()
    model.head.weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with fl.LearnedMerge(model, components(), per="layer") as merge:
        assert merge.coefficients.shape == (4, 3) and bool((merge.coefficients == 0.3).all())
        losses = merge.fit([IDS, (IDS,), {"ids": IDS}], steps=60, lr=0.01)
    assert losses[-1] < losses[0]
    assert losses == fl.LearnedMerge(net(), components(), per="layer").fit(
        [IDS], steps=60, lr=0.01
    )  # no dropout, no noise
    assert model.training and model.body[2].training and not model.head.weight.requires_grad
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert model.emb.weight.requires_grad and not model.emb._forward_hooks


def test_tasks_are_one_step_together() -> None:
    """One batch of each task a step and the sum of their losses, as one batch with the summed loss."""
    other = (IDS + 3) % 11
    together = fl.LearnedMerge(net(), components(), per="layer")
    losses = together.fit({"a": [IDS], "b": [other]}, {"a": first_logit, "b": second_logit}, steps=9, lr=0.01)
    stacked = fl.LearnedMerge(net(), components(), per="layer")
    expected = stacked.fit(
        [torch.cat([IDS, other])],
        lambda out, batch: first_logit(out[: len(IDS)], batch) + second_logit(out[len(IDS) :], batch), steps=9, lr=0.01,
    )  # fmt: skip
    assert losses == pytest.approx(expected, rel=SUMS32)
    torch.testing.assert_close(together.coefficients, stacked.coefficients, rtol=MODEL32, atol=SUMS32)


def first_logit(out: Tensor, _: Any) -> Tensor:
    return out[:, 0].mean()


def second_logit(out: Tensor, _: Any) -> Tensor:
    return 0.5 * out[:, 1].mean()


def test_what_a_decomposition_gives() -> None:
    pool = fl.Pool([component("a", 1), component("b", 200, 3), component("c", 400, 2)])
    pairs = fl.decompose(pool, 0.2, mode="pairs").summands()
    assert list(pairs) == ["a", "b", "c", "a+b", "a+c", "b+c"]
    whole = fl.decompose(pool, 0.2).summands()
    assert list(whole) == ["shared", "unique/a", "unique/b", "unique/c"]
    merge = fl.LearnedMerge(net(), fl.decompose(pool, 0.0, mode="pairs"), per="layer")
    assert merge.coefficients.shape[1] == 6
    torch.testing.assert_close(merge(IDS), merged(merge.adapter())(IDS), rtol=GRAM64, atol=GRAM64)
    assert list(fl.LearnedMerge(net(), pool).weights) == ["a", "b", "c"]


def test_half_precision_models_compute_in_float32() -> None:
    model = nn.Sequential(nn.Linear(5, 8)).bfloat16()
    own = Adapter("a", {"0": component("a", 1).updates["body.0"]})
    merge = fl.LearnedMerge(model, [own], init=1.0)
    x = gaussian(3, 5, seed=4).bfloat16()
    expected = model(x)
    assert merge(x).dtype == torch.bfloat16 and expected.dtype == torch.bfloat16
    merge.close()
    plain = model(x).float() + x.float() @ own.delta("0").mT
    torch.testing.assert_close(expected.float(), plain, rtol=2 * HALF, atol=HALF)


def refused(message: str, model: nn.Module, given: Any, **settings: Any) -> None:
    with pytest.raises(fl.InputError, match=message):
        fl.LearnedMerge(model, given, **settings)


def test_messages() -> None:
    own = component("a", 1)
    refused("two components have one name", net(), [own, own])
    refused("no components were given", net(), [])
    refused("'a' is 3, not a LoRA adapter", net(), {"a": 3})
    refused("per='model' does not exist", net(), [own], per="model")
    refused("has no module 'emb'", nn.Sequential(), [own])
    odd = Adapter("a", {"emb": own.updates["head"]})
    refused(r"'emb' of the model is Embedding with a weight of \[6, 11\].*a linear module of \[4, 8\]", net(), [odd])
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)})
    refused("belongs to a MultiheadAttention", attention, [Adapter("a", {"a.out_proj": own.updates["head"]})])
    refused("is a Tanh; coefficients can be learned for Linear", net(), [Adapter("a", {"body.1": own.updates["head"]})])
    model = net()
    model.conv = nn.Conv1d(6, 6, 3, groups=2)
    refused("groups=2", model, [component("a", 1, only=("conv",))])
    model.emb = nn.Embedding(11, 6, max_norm=1.0)
    refused("does more than to look rows up", model, [component("a", 1, only=("emb",))])
    own.extras["head.bias"] = Extra("delta", torch.ones(4))
    refused("'a' also changes head.bias", net(), [own])
    broken = component("a", 1)
    broken.updates["head"].A.terms[0].source[0, 0] = torch.nan
    refused("component 1 holds NaN or Inf in head", net(), [broken])


def test_messages_of_fit() -> None:
    merge = fl.LearnedMerge(net(), components())

    def fails(message: str, *arguments: Any, **settings: Any) -> None:
        before = merge.coefficients.detach().clone()
        with pytest.raises(fl.InputError, match=message):
            merge.fit(*arguments, **settings)
        assert torch.equal(merge.coefficients, before)

    fails("steps=0 must be at least 1", [IDS], steps=0)
    fails("ran out after 0 of 500", [])
    fails("there are no batches", {})
    fails("no loss for the batches of 'b'", {"a": [IDS], "b": [IDS]}, {"a": first_logit})
    fails("scalar tensor, not float", [IDS], lambda out, batch: 1.0)
    fails("loss of step 1 is nan", [IDS], lambda out, batch: out.sum() * torch.nan)
    fails("does not depend on the coefficients", [IDS], lambda out, batch: torch.ones(()))
    with pytest.raises(fl.InputError, match="ran out after 2 of 3"):
        merge.fit((b for b in [IDS, IDS]), steps=3)
    model = nn.Sequential(nn.Linear(5, 8))
    model.register_forward_hook(lambda m, x, y: {"out": y})
    other = fl.LearnedMerge(model, [Adapter("a", {"0": component("a", 1).updates["body.0"]})])
    with pytest.raises(fl.InputError, match="returns a dict without logits"):
        other.fit([torch.ones(1, 5)])
