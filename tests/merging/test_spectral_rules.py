"""``star``, ``cart``, ``svc`` and ``wudi`` against their definitions on dense matrices."""

from __future__ import annotations

import math
from typing import Any

import mixed
import pools
import pytest
import torch
from pools import MODULE
from tolerances import FLOAT32
from torch import Tensor

import fastlora as fl


def star(keep: float) -> mixed.Definition:
    def merged(deltas: Tensor, weights: Tensor, noise: float) -> Tensor:
        total = torch.zeros_like(deltas[0])
        for delta in deltas:
            U, sigma, Vt = torch.linalg.svd(delta, full_matrices=False)
            whole = float(sigma.sum())
            if whole > 0:
                q = int((sigma.cumsum(0) < keep * whole * (1 - 1e-12)).sum()) + 1
                total += whole / float(sigma[:q].sum()) * (U[:, :q] * sigma[:q]) @ Vt[:q]
        return total / float(weights.sum())

    return merged


def cart(share: float, strength: float) -> mixed.Definition:
    def merged(deltas: Tensor, weights: Tensor, noise: float) -> Tensor:
        mean = deltas.sum(0) / float(weights.sum())
        sigma = torch.linalg.svdvals(torch.cat(list(deltas), 1))
        q = math.ceil(share * int((sigma > noise * sigma[0]).sum()))
        rest = [mixed.truncated(delta - w * mean, q) for delta, w in zip(deltas, weights, strict=True)]
        return mean + strength * sum(rest)  # type: ignore[no-any-return]

    return merged


def svc(strength: float, alpha: float) -> mixed.Definition:
    def merged(deltas: Tensor, weights: Tensor, noise: float) -> Tensor:
        U, sigma, Vt = torch.linalg.svd(strength * deltas.sum(0), full_matrices=False)
        result = torch.zeros_like(deltas[0])
        for u, s, v in zip(U.mT, sigma, Vt, strict=True):
            shares = []
            for delta in deltas:
                response = u @ delta
                if float(response.norm()) > noise * float(sigma[0]):
                    shares.append(max(alpha, float(s * v @ response / response.square().sum())))
            result += (len(shares) / sum(shares) if shares else 1.0) * s * u[:, None] * v
        return result

    return merged


def wudi(ridge: float, inputs: str, towards: str) -> mixed.Definition:
    def merged(deltas: Tensor, weights: Tensor, noise: float) -> Tensor:
        m = deltas.shape[2]
        left, right = torch.zeros_like(deltas[0]), torch.zeros(m, m, dtype=torch.float64)
        for delta, (_, _, Vt) in zip(deltas, mixed.forms(deltas, noise), strict=True):
            if float(delta.norm()):
                proxy = delta.mT @ delta / float(delta.square().sum()) if inputs == "energy" else Vt.mT @ Vt
                left, right = left + delta @ proxy, right + proxy
        rho = ridge * float(torch.linalg.matrix_norm(right, 2))
        start = deltas.sum(0) if towards == "sum" else torch.zeros_like(left)
        if not rho:
            return left
        return torch.linalg.solve(right + rho * torch.eye(m, dtype=torch.float64), left + rho * start, left=False)

    return merged


CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("star", {}, star(0.4)), ("star", {"keep": 0.9}, star(0.9)), ("star", {"keep": 1.0}, star(1.0)),
    ("cart", {}, cart(0.04, 1.0)), ("cart", {"share": 0.5, "strength": -0.3}, cart(0.5, -0.3)),
    ("svc", {}, svc(0.3, 0.1)), ("svc", {"strength": 1.0, "alpha": 0.7}, svc(1.0, 0.7)),
    *[
        ("wudi", {"ridge": ridge, "inputs": inputs, "towards": towards}, wudi(ridge, inputs, towards))
        for ridge in (0.1, 1e-3) for inputs in ("energy", "projector") for towards in ("sum", "zero")
    ],
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "parameters", "definition"), CASES, ids=lambda x: "" if callable(x) else str(x)[:60]
)
def test_it_is_the_definition(method: str, parameters: dict[str, Any], definition: mixed.Definition) -> None:
    mixed.require_parity(method, definition, FLOAT32, **parameters)


@pytest.mark.parametrize(("method", "parameters"), [
    ("star", {"keep": 0.0}), ("star", {"keep": 1.1}), ("cart", {"share": 0.0}), ("cart", {"share": 2.0}),
    ("svc", {"alpha": 0.0}), ("wudi", {"ridge": 0.0}),
])  # fmt: skip
def test_parameters_that_are_refused(method: str, parameters: dict[str, Any]) -> None:
    (name, value) = next(iter(parameters.items()))
    with pytest.raises(fl.InputError, match=f"{method}: {name}={value:g} must be above 0"):
        fl.merge(pools.make_pool(pools.planted(2)), method=method, **parameters)


@pytest.mark.parametrize("method", ["star", "cart"])
def test_means_need_weights_with_a_sum(method: str) -> None:
    with pytest.raises(fl.InputError, match=f"method '{method}': the weights .* add up to 0"):
        fl.merge(pools.make_pool(pools.planted(2)), {"a0": 1.0, "a1": -1.0}, method=method)


@pytest.mark.parametrize("method", ["svc", "wudi", "cart"])
def test_one_adapter_stays(method: str) -> None:
    part = pools.planted(1)[0]
    assert mixed.distance(fl.merge(pools.make_pool([part]), method=method), MODULE, pools.dense(part)) <= FLOAT32
