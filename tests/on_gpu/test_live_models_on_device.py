"""Live models of peft on a CUDA device: merges, parts and slots where the layers are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tolerances import SUMS32

import fastlora as fl

sys.path.append(str(Path(__file__).parents[1] / "integrations"))
pytest.importorskip("peft")
from live_models import adapted, deltas, factors, largest_error, layers, lora, truncated, weighted

from fastlora.integrations import peft as live

WEIGHTS = {"a": 0.7, "b": -0.4}


@pytest.fixture
def model() -> Any:
    return adapted({"a": lora(), "b": lora(3, use_rslora=True)}).cuda()


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd"])
def test_merges_are_made_where_the_layers_are(model: Any, kind: str) -> None:
    options = {"density": 1.0, "svd_rank": 64} if kind == "ties_svd" else {"svd_rank": 3} if kind == "svd" else {}
    live.add_weighted_adapter(model, ["a", "b"], list(WEIGHTS.values()), "mix", kind, **options)
    assert all(f.is_cuda for layer in layers(model).values() for f in factors(layer, "mix") or ())
    total = weighted(model, WEIGHTS)
    if kind != "ties_svd":
        wanted = total if kind == "cat" else truncated(total, 3)
        assert largest_error(deltas(model, "mix"), wanted) < SUMS32


def test_parts_and_slots(model: Any) -> None:
    parts = live.decompose_adapters(model, threshold=0.2)
    for name in ("a", "b"):
        shared = parts.shared_of(name)
        for path, delta in deltas(model, f"unique_{name}").items():
            whole = delta + (shared.delta(path).double() if path in shared else 0.0)
            assert float((whole - deltas(model, name)[path]).norm()) < SUMS32 * float(whole.norm())
    live.write(model, fl.merge(live.pool(model, ["a", "b"]), WEIGHTS, method="cat"), "slot")
    wanted = deltas(model, "b")
    live.swap(model, live.pool(model)["b"], "slot")
    assert largest_error(deltas(model, "slot"), wanted) < SUMS32


def test_an_adapter_on_the_host_goes_to_the_device(model: Any) -> None:
    wanted = deltas(model, "a")
    live.write(model, live.pool(model)["a"].to("cpu"), "twin")
    assert largest_error(deltas(model, "twin"), wanted) < SUMS32
    assert all(f.is_cuda for layer in layers(model).values() for f in factors(layer, "twin") or ())
