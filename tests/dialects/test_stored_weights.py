"""Plain factors, and the scaling that trainers mean."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastlora.dialects.suffixes import Stored, group
from fastlora.dialects.weights import plain_update, read_alphas, require_pairs, widened
from fastlora.errors import InputError

FILE = Path("style.safetensors")


def stored(up: Tensor, down: Tensor, **more: Tensor) -> Stored:
    tensors = {"m.lora_up.weight": up, "m.lora_down.weight": down, **{f"m.{k}": t for k, t in more.items()}}
    return group(tensors, FILE).modules["m"]


@pytest.mark.parametrize(
    ("up", "down", "kernel"),
    [
        ((6, 2), (2, 5), ()),
        ((6, 2, 1, 1), (2, 5, 3, 3), (3, 3)),
        ((6, 2, 1), (2, 5, 7), (7,)),
        ((6, 2, 1, 1, 1), (2, 5, 1, 2, 2), (1, 2, 2)),
        ((6, 2, 1, 1), (2, 5, 1, 1), (1, 1)),
        ((6, 2), (2, 5, 1, 1), (1, 1)),
        ((6, 2, 1, 1), (2, 5), (1, 1)),
    ],
)
def test_factors_are_views(up: tuple[int, ...], down: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    module = stored(torch.randn(up), torch.randn(down))
    update = plain_update(module, 0.5, FILE)
    assert update.layout.kernel == kernel and update.rank == 2 and update.scaling == 0.5
    for factor, part in ((update.B, "up"), (update.A, "down")):
        assert factor.stored is not None and factor.stored.data_ptr() == module.parts[part].data_ptr()


@pytest.mark.parametrize(
    ("up", "down", "words"),
    [
        ((6, 3), (2, 5), "ranks 2 and 3 must agree"),
        ((6,), (2, 5), r"needed are \[rank, in\]"),
        ((6, 2, 3, 3), (2, 5, 3, 3), "a kernel belongs to the first"),
        ((6, 2, 1, 1), (4, 5, 3, 3), "grouped convolution"),
        ((6, 2, 1), (2, 5, 3, 3), r"needed are \[rank, in\]"),
        ((1, 2100), (2100, 1), "far above both sides"),
        ((6, 0), (0, 5), "is empty"),
    ],
)
def test_shapes_that_do_not_fit(up: tuple[int, ...], down: tuple[int, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        plain_update(stored(torch.ones(up), torch.ones(down)), 1.0, FILE)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_dtypes_that_are_none_of_weights(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"'m.lora_down.weight' is .*, needed is float32"):
        plain_update(stored(torch.ones(6, 2), torch.ones(2, 5).to(dtype)), 1.0, FILE)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_8_bits_are_read_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    wide = widened({"x": every})["x"]
    assert wide.element_size() == 2 and torch.equal(wide.double().nan_to_num(), every.double().nan_to_num())
    kept = torch.ones(2)
    assert widened({"x": kept})["x"] is kept


def alphas(*values: Tensor) -> dict[str, float]:
    tensors = {f"{n}.alpha": v for n, v in zip("abcd", values, strict=False)}
    return read_alphas(group(tensors, FILE).modules, FILE)


def test_alphas_of_every_kind() -> None:
    assert alphas(torch.tensor(0)) == {"a": 0.0}
    found = alphas(torch.tensor(4), torch.tensor([0.5]), torch.tensor(-2.0, dtype=torch.bfloat16), torch.tensor(1e-3))
    assert found == {"a": 4.0, "b": 0.5, "c": -2.0, "d": float(torch.tensor(1e-3))}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor(math.nan), "is nan"),
        (torch.tensor(math.inf), "is inf"),
        (torch.ones(2), r"float32 \[2\], needed is one number"),
        (torch.ones(1, 1), r"float32 \[1, 1\], needed is one number"),
        (torch.tensor(True), "bool"),
    ],
)
def test_alphas_without_a_meaning(value: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        alphas(torch.tensor(1.0), value)


@pytest.mark.parametrize("lacking", ["up", "down"])
def test_half_a_module_is_refused(lacking: str) -> None:
    whole = stored(torch.ones(6, 2), torch.ones(2, 5))
    del whole.parts[lacking]
    with pytest.raises(InputError, match=f"has no '{lacking}' beside it"):
        require_pairs({"m": whole}, [("up", "down")], FILE)
