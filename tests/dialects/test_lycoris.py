"""Modules of LyCORIS against the forward pass of LyCORIS, which is what was trained.

Its ``merge_to`` and ``get_diff_weight`` (4.1.3) apply alpha / rank twice for LoHa and LoKr, so they are no oracle.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastlora.dialects.lycoris import Converted, TooLarge, converted, dimension
from fastlora.dialects.suffixes import group
from fastlora.errors import InputError, NonFiniteError
from tests.tolerances import FLOAT64, SUMS32

FILE = Path("style.safetensors")
ALPHA = 1.5
LINEAR, WIDE, CONV = (40, 24), (64, 64), (24, 16, 3, 3)

Shapes = dict[str, tuple[int, ...]]
CASES: dict[str, tuple[tuple[int, ...], Shapes, int]] = {
    "LoRA with a core": (
        CONV,
        {"lora_up.weight": (24, 4, 1, 1), "lora_down.weight": (4, 16, 1, 1), "lora_mid.weight": (4, 4, 3, 3)},
        4,
    ),
    "LoHa": (
        LINEAR,
        {"hada_w1_a": (40, 3), "hada_w1_b": (3, 24), "hada_w2_a": (40, 3), "hada_w2_b": (3, 24)},
        9,
    ),
    "LoHa, no smaller than its matrix": (
        LINEAR,
        {"hada_w1_a": (40, 6), "hada_w1_b": (6, 24), "hada_w2_a": (40, 6), "hada_w2_b": (6, 24)},
        24,
    ),
    "LoHa of a convolution": (
        CONV,
        {"hada_w1_a": (24, 3), "hada_w1_b": (3, 144), "hada_w2_a": (24, 3), "hada_w2_b": (3, 144)},
        9,
    ),
    "LoHa with cores": (
        CONV,
        {"hada_t1": (3, 3, 3, 3), "hada_w1_a": (3, 24), "hada_w1_b": (3, 16)}
        | {"hada_t2": (3, 3, 3, 3), "hada_w2_a": (3, 24), "hada_w2_b": (3, 16)},
        9,
    ),
    "LoKr, both whole": (WIDE, {"lokr_w1": (8, 8), "lokr_w2": (8, 8)}, 64),
    "LoKr, w2 in factors": (WIDE, {"lokr_w1": (4, 4), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 16)}, 8),
    "LoKr, w1 wider than long": ((32, 64), {"lokr_w1": (2, 4), "lokr_w2_a": (16, 3), "lokr_w2_b": (3, 16)}, 6),
    "LoKr, both in factors": (
        WIDE,
        {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 8), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
        4,
    ),
    "LoKr, convolution": (CONV, {"lokr_w1": (4, 4), "lokr_w2": (6, 4, 3, 3)}, 24),
    "LoKr, convolution in factors": (CONV, {"lokr_w1": (4, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 36)}, 8),
}


def random(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(map(len, shapes)))
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def read(tensors: dict[str, Tensor], rank: int | None = None) -> Converted:
    stored = group({f"m.{n}": t for n, t in tensors.items()}, FILE).modules["m"]
    size = dimension(stored.parts)
    return converted(stored, 1.0 if size is None else ALPHA / size, rank, FILE)


def dense(found: Converted) -> Tensor:
    B, A = found.update.B.stored, found.update.A.stored
    assert B is not None and A is not None
    return found.update.scaling * B.double() @ A.double()


def forward(tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """``ΔW`` by what LyCORIS' layer adds to the output of a base layer that is zero."""
    modules = pytest.importorskip("lycoris.modules", reason="lycoris is not installed")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    is_linear = len(shape) == 2
    base: nn.Module = nn.Linear(shape[1], shape[0]) if is_linear else nn.Conv2d(shape[1], shape[0], shape[2])
    nn.init.zeros_(base.weight)  # type: ignore[arg-type]
    nn.init.zeros_(base.bias)  # type: ignore[arg-type]
    state = {f"m.{n}": t for n, t in tensors.items()} | {"m.alpha": torch.tensor(ALPHA)}
    layer = modules.make_module(*modules.get_module(state, "m"), "m", base).eval()
    layer.apply_to()
    size = torch.Size(shape[1:]).numel()
    inputs = torch.eye(size).reshape(size, *shape[1:])
    with torch.no_grad():
        return base(inputs).flatten(1).mT.double()  # [out, in·Πk]


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_the_forward_pass(case: str) -> None:
    shape, shapes, rank = CASES[case]
    tensors = random(shapes)
    found = read(tensors)
    meant = forward(tensors, shape)
    assert found.update.rank == found.exact == rank and found.kept is None
    torch.testing.assert_close(dense(found), meant, rtol=0, atol=SUMS32 * float(meant.abs().max()))


def test_a_core_of_lokr() -> None:
    """LyCORIS cannot rebuild it from a file; its definition is ``W1 ⊗ Σ t2 · w2_a · w2_b``."""
    tensors = random({"lokr_w1": (4, 4), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 6), "lokr_w2_b": (2, 4)})
    w2 = torch.einsum("ijkl,ip,jr->prkl", *(tensors[f"lokr_{n}"].double() for n in ("t2", "w2_a", "w2_b")))
    meant = ALPHA / 2 * torch.kron(tensors["lokr_w1"].double(), w2.flatten(1).contiguous())
    found = read(tensors)
    assert found.update.layout.kernel == (3, 3) and found.update.rank == 8
    torch.testing.assert_close(dense(found), meant, rtol=0, atol=FLOAT64 * float(meant.abs().max()))


def test_ranks_and_forms_that_lycoris_does_not_train() -> None:
    """Two ranks in one module, and a whole factor beside one in parts, by their definitions."""
    loha = random({"hada_w1_a": (40, 3), "hada_w1_b": (3, 24), "hada_w2_a": (40, 2), "hada_w2_b": (2, 24)})
    w1, w2 = (loha[f"hada_w{i}_a"].double() @ loha[f"hada_w{i}_b"].double() for i in (1, 2))
    lokr = random({"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 8), "lokr_w2": (8, 6)})
    kron = torch.kron(lokr["lokr_w1_a"].double() @ lokr["lokr_w1_b"].double(), lokr["lokr_w2"].double())
    for tensors, meant, rank in ((loha, ALPHA / 3 * w1 * w2, 6), (lokr, ALPHA / 2 * kron, 12)):
        found = read(tensors)
        assert found.update.rank == rank
        torch.testing.assert_close(dense(found), meant, rtol=0, atol=FLOAT64 * float(meant.abs().max()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_lower_rank_is_the_best_one(case: str, rank: int) -> None:
    shapes = CASES[case][1]
    meant = dense(read(random(shapes)))
    found = read(random(shapes), rank)
    u, s, v = torch.linalg.svd(meant, full_matrices=False)
    best = u[:, :rank] * s[:rank] @ v[:rank]
    assert found.update.rank == rank and found.kept is not None
    torch.testing.assert_close(dense(found), best, rtol=0, atol=FLOAT64 * float(s[0]))
    share = float(s[:rank].square().sum() / s.square().sum())
    assert found.kept == pytest.approx(share, abs=FLOAT64)
    assert found.energy == pytest.approx(float(s.square().sum()), rel=FLOAT64)


def test_a_whole_difference() -> None:
    for shape in ((30, 8), (8, 30), (8, 5, 3, 3)):
        diff = torch.randn(shape)
        found = read({"diff": diff})
        assert torch.equal(dense(found), diff.flatten(1).double())
        assert found.update.layout.kernel == shape[2:] and found.update.rank == min(diff.flatten(1).shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_half_precision_are_exact_in_float32(dtype: torch.dtype) -> None:
    tensors = random(CASES["LoHa"][1], dtype)
    found = read(tensors)
    w = [tensors[f"hada_w{i}_a"].double() @ tensors[f"hada_w{i}_b"].double() for i in (1, 2)]
    assert found.update.dtypes() == {torch.float32}
    meant = found.update.scaling * w[0] * w[1]
    torch.testing.assert_close(dense(found), meant, rtol=0, atol=FLOAT64 * float(meant.abs().max()))


def test_what_is_too_large_asks_for_a_rank() -> None:
    tensors = random({"lokr_w1": (20, 20), "lokr_w2": (20, 20)})
    with pytest.raises(TooLarge) as told:
        read(tensors)
    assert told.value.rank == 400 and told.value.kind == "LoKr"
    assert read(tensors, 7).update.rank == 7
    assert read({"diff": torch.randn(300, 400)}, 5).update.rank == 5


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"hada_w1_a": (40, 3), "hada_w1_b": (3, 24)}, "LoHa without hada_w2_a"),
        ({"hada_w1_a": (40, 3), "hada_w1_b": (3, 24), "hada_w2_a": (40, 3), "hada_w2_b": (3, 20)}, "do not fit"),
        ({"hada_w1_a": (40, 3), "hada_w1_b": (3, 24), "hada_w2_a": (4, 3), "hada_w2_b": (3, 24)}, "do not fit"),
        ({"lokr_w1": (4, 4)}, "is a LoKr of"),
        ({"lokr_w1": (4, 4), "lokr_w2": (4, 4), "lokr_w2_a": (4, 2)}, "is a LoKr of"),
        ({"lokr_w1": (4, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (3, 4)}, "is a LoKr of"),
        ({"lora_mid.weight": (4, 4, 3, 3), "lora_up.weight": (8, 4, 1, 1)}, "no lora_up and lora_down"),
        (
            {"lora_mid.weight": (4, 5, 3, 3), "lora_up.weight": (8, 4, 1, 1), "lora_down.weight": (4, 6, 1, 1)},
            "do not fit",
        ),
        ({"lokr_w1": (4, 4), "lokr_w2": (4, 4), "hada_w1_a": (4, 4)}, "several kinds"),
        ({"diff": (4,)}, "where one of a weight is needed"),
    ],
)
def test_tensors_that_do_not_fit(shapes: Shapes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(random(shapes))


def test_numbers_that_are_not_finite() -> None:
    tensors = random(CASES["LoKr, both whole"][1])
    tensors["lokr_w1"][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="module 'm' holds NaN or Inf"):
        read(tensors)
