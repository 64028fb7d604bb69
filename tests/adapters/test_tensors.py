"""Adapters from tensors in memory and back, against the definition ``ΔW = s B A``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora as fl

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(B: Tensor, A: Tensor, scaling: float = 1.0) -> Tensor:
    return scaling * (B.double().flatten(1) @ A.double().flatten(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_stored_is_taken_as_it_is(dtype: torch.dtype) -> None:
    B, A = normal(9, 3, seed=1, dtype=dtype), normal(3, 7, seed=2, dtype=dtype)
    adapter = fl.Adapter.from_tensors({"x.q": (B, A)}, name="mine", base="org/model")
    assert (adapter.name, adapter.base.model, adapter.dtype) == ("mine", "org/model", dtype)
    left, right = adapter.tensors(dtype=None if dtype != torch.float64 else torch.float32)["x.q"]
    if dtype == torch.float64:  # adapters are saved as float32 at most
        assert torch.equal(left, B.float()) and torch.equal(right, A.float())
    else:
        assert left.data_ptr() == B.data_ptr() and right.data_ptr() == A.data_ptr()


def test_the_scaling_is_part_of_the_update() -> None:
    B, A = normal(9, 3, seed=1), normal(3, 7, seed=2)
    adapter = fl.Adapter.from_tensors({"q": (B, A, -0.5), "k": [B, A, 3]})  # type: ignore[dict-item]
    left, right = adapter.tensors()["q"]
    assert torch.equal(right, A) and torch.equal(left, -0.5 * B)  # a power of two: no rounding
    torch.testing.assert_close(adapter.delta("k").double(), exact(B, A, 3.0), rtol=1e-6, atol=1e-6)


def test_a_sum_of_ragged_adapters_in_one_pass() -> None:
    """Each result is rounded once to float32: 2⁻²⁴ of the size of its terms, three of them."""
    parts = [(normal(9, r, seed=r), normal(r, 7, seed=10 + r), s) for r, s in ((1, 2.0), (4, 0.3), (2, -1.0))]
    pool = [fl.Adapter.from_tensors({"q": p, f"own{i}": p}, name=f"a{i}") for i, p in enumerate(parts)]
    total = pool[0] + 0.5 * pool[1] - pool[2]
    found = total.tensors()
    assert found["q"][0].shape == (9, 7) and found["own1"][1].shape == (4, 7)
    expected = sum(w * exact(*p) for w, p in zip((1.0, 0.5, -1.0), parts, strict=True))
    torch.testing.assert_close(exact(*found["q"]), expected, rtol=0, atol=4 * 2**-24 * float(expected.abs().max()) * 3)


@pytest.mark.parametrize("rank", [True, 4, 6])
def test_one_rank_for_all(rank: int | bool) -> None:
    B, A = normal(9, 2, seed=1), normal(2, 7, seed=2)
    adapter = fl.Adapter.from_tensors({"q": (B, A, 2.0), "k": (normal(9, 4, seed=3), normal(4, 7, seed=4))})
    found = adapter.tensors(uniform_rank=rank)
    width = 4 if rank is True else rank
    assert {x.shape for x, _ in found.values()} == {(9, width)} and {x.shape for _, x in found.values()} == {(width, 7)}
    assert torch.equal(found["q"][0], torch.nn.functional.pad(2.0 * B, (0, width - 2)))
    assert torch.equal(found["q"][1], torch.nn.functional.pad(A, (0, 0, 0, width - 2)))
    with pytest.raises(fl.InputError, match="uniform_rank=3: the adapter has rank 4"):
        adapter.tensors(uniform_rank=3)


def test_a_module_of_rank_zero_becomes_zeros_of_the_rank() -> None:
    adapter = fl.Adapter.from_tensors(
        {"q": (torch.zeros(9, 0), torch.zeros(0, 7)), "k": (torch.ones(9, 2), torch.ones(2, 7))}
    )
    assert adapter.tensors()["q"][0].shape == (9, 0)
    left, right = adapter.tensors(uniform_rank=True)["q"]
    assert left.shape == (9, 2) and right.shape == (2, 7) and not left.any() and not right.any()


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (1, 2, 3)], ids=str)
def test_convolutions_keep_their_kernel(kernel: tuple[int, ...], tmp_path: Path) -> None:
    B, A = normal(8, 2, *(1 for _ in kernel), seed=1), normal(2, 5, *kernel, seed=2)
    adapter = fl.Adapter.from_tensors({"conv": (B, A, 2.0)})
    left, right = adapter.tensors()["conv"]
    assert torch.equal(left, 2.0 * B) and torch.equal(right, A)
    again = fl.load(adapter.save(tmp_path / "saved"))
    assert isinstance(again, fl.Adapter)
    assert again.tensors()["conv"][1].shape == A.shape and torch.equal(again.delta("conv"), adapter.delta("conv"))


def test_what_is_made_from_tensors_is_saved_and_loaded(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "model.layers.0.q_proj": (normal(9, 3, seed=1), normal(3, 7, seed=2), 0.25),
        "model.embed_tokens": (normal(5, 2, seed=3), normal(2, 11, seed=4)),
    }
    adapter = fl.Adapter.from_tensors(given, embeddings=["model.embed_tokens"])
    again = fl.load(adapter.save(tmp_path / "saved"))
    assert isinstance(again, fl.Adapter) and set(again) == set(given)
    assert again.update("model.embed_tokens").layout.kind == "embedding"
    for module, tensors in given.items():
        torch.testing.assert_close(again.delta(module).double(), exact(*tensors), rtol=1e-6, atol=1e-6)


def test_rows_that_are_not_contiguous_are_copied_once() -> None:
    B, A = normal(3, 9, seed=1).mT, normal(14, 3, seed=2)[::2].mT
    adapter = fl.Adapter.from_tensors({"q": (B, A)})
    torch.testing.assert_close(adapter.delta("q").double(), exact(B, A), rtol=1e-6, atol=1e-6)
    strided = normal(9, 8, seed=3)[:, :3]  # rows are contiguous, at a distance
    kept = fl.Adapter.from_tensors({"q": (strided, normal(3, 7, seed=4))})
    assert kept.tensors()["q"][0].data_ptr() == strided.data_ptr()


def test_parameters_of_a_model_are_taken_without_their_gradient() -> None:
    B, A = (torch.nn.Parameter(normal(*shape, seed=1)) for shape in ((9, 3), (3, 7)))
    adapter = fl.Adapter.from_tensors({"q": (B, A)})
    assert not adapter.tensors()["q"][0].requires_grad


B, A = torch.ones(9, 3), torch.ones(3, 7)
REFUSED: dict[str, tuple[dict[Any, Any], dict[str, Any], str]] = {
    "nothing": ({}, {}, "no module was given"),
    "no path": ({"": (B, A)}, {}, "no path of a module"),
    "one tensor": ({"q": (B,)}, {}, r"'q' needs \(B, A\) or \(B, A, scaling\), not 1 values"),
    "a tensor alone": ({"q": B}, {}, "needs .* not a strided tensor of float32"),
    "no tensor": ({"q": (B, "A")}, {}, "A of 'q' is of type str"),
    "integers": ({"q": (B.int(), A)}, {}, "B of 'q' is a strided tensor of int32"),
    "float8": ({"q": (B, A.to(torch.float8_e4m3fn))}, {}, "A of 'q' is a strided tensor of float8_e4m3fn"),
    "sparse": ({"q": (B, A.to_sparse())}, {}, "A of 'q' is a sparse_coo tensor"),
    "swapped": ({"q": (A, B)}, {}, r"B \[3, 7\] and A \[9, 3\]; needed are"),
    "ranks": ({"q": (B, torch.ones(2, 7))}, {}, r"B \[9, 3\] and A \[2, 7\]"),
    "vectors": ({"q": (torch.ones(3), torch.ones(3))}, {}, r"B \[3\] and A \[3\]"),
    "empty": ({"q": (B, torch.ones(3, 0))}, {}, r"A \[3, 0\]"),
    "a kernel on B": ({"q": (torch.ones(9, 3, 3), torch.ones(3, 7, 3))}, {}, r"B \[9, 3, 3\]"),
    "an embedding with a kernel": ({"q": (torch.ones(9, 3, 1), torch.ones(3, 7, 3))}, {"embeddings": ["q"]}, "needed"),
    "scaling": ({"q": (B, A, float("nan"))}, {}, "scaling of 'q' is nan"),
    "scaling of another type": ({"q": (B, A, "2")}, {}, "scaling of 'q' is '2'"),
    "unknown embedding": ({"q": (B, A)}, {"embeddings": ["k"]}, "embeddings name 'k'"),
    "name": ({"q": (B, A)}, {"name": "a/b"}, "path separator"),
    "two devices": ({"q": (B, A.to("meta"))}, {}, "B on cpu and A on meta"),
    "modules on two devices": ({"q": (B, A), "k": (B.to("meta"), A.to("meta"))}, {}, "on different devices"),
}


@pytest.mark.parametrize("tensors, options, message", REFUSED.values(), ids=REFUSED)
def test_what_is_no_adapter_is_refused(tensors: dict[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(fl.InputError, match=message):
        fl.Adapter.from_tensors(tensors, **options)


def test_nan_is_found_when_it_is_used(tmp_path: Path) -> None:
    broken = torch.ones(9, 3)
    broken[4, 1] = torch.nan
    adapter = fl.Adapter.from_tensors({"q": (broken, A)})
    with pytest.raises(fl.InputError, match="NaN"):
        adapter.compress(rank=1)
    with pytest.raises(fl.OutputError, match="NaN"):
        adapter.save(tmp_path / "out")


@pytest.mark.parametrize("stride", [1, 5, 40])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_single_row_of_any_stride_is_saved_bit_for_bit(side: str, stride: int, tmp_path: Path) -> None:
    """torch calls a single row contiguous whatever its stride is: a transposed column has 1."""
    row = torch.as_strided(normal(64, seed=1), (1, 8), (stride, 1))
    left, right = (normal(6, 1, seed=2), row) if side == "A" else (row[:, :4], normal(4, 9, seed=3))
    other = normal(6, 2, seed=4), normal(2, 8, seed=5)
    fl.Adapter.from_tensors({"q": (left, right), "v": other}).save(tmp_path / "x")
    saved = fl.load(tmp_path / "x")
    assert isinstance(saved, fl.Adapter)
    found = saved.tensors()
    assert torch.equal(found["q"][0], left) and torch.equal(found["q"][1], right)
    assert torch.equal(found["v"][0], other[0]) and torch.equal(found["v"][1], other[1])
