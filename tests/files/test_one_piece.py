"""Tensors as the bytes of a file: the numbers of each in its order, by compiled code and by torch's calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from builders import Elsewhere, gaussian
from compiled import needs_kernels
from torch import Tensor

from fastlora.backends import cpu
from fastlora.files.one_piece import in_one_piece

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "transposed": lambda x: x.T,
    "every other column": lambda x: x[:, ::2],
    "one row": lambda x: x[2:3],
    "one column": lambda x: x[:, 1:2],
    "of one row": lambda x: x.T[1:2].T,
    "expanded": lambda x: x[:1].expand(5, -1),
    "inside a larger one": lambda x: x[1:3],
    "trained": lambda x: x.clone().requires_grad_(),
    "parameter": torch.nn.Parameter,
    "empty": lambda x: x[:0],
    "4-d": lambda x: x.reshape(2, 3, 2, 1),
}


NONE: dict[str, Callable[[Tensor], Tensor]] = {
    "double": lambda x: x.double(),
    "integers": lambda x: x.to(torch.int32),
    "elsewhere": lambda x: Elsewhere(x.shape),
    "meta": lambda x: x.to("meta"),
    "NaN": lambda x: x.index_fill(1, torch.tensor([1]), torch.nan),
    "Inf": lambda x: x.index_fill(1, torch.tensor([0]), -torch.inf),
}


@pytest.fixture(params=["core", "torch"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(cpu, "_JOINS", False)
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TENSORS)
def test_numbers_in_their_order(kind: str, dtype: torch.dtype, by: str) -> None:
    tensors = [gaussian(4, 3, seed=1, dtype=dtype), TENSORS[kind](gaussian(4, 3, seed=2, dtype=dtype))]
    expected = torch.cat([x.detach().flatten() for x in tensors])
    found = in_one_piece(tensors, dtype)
    assert found is not None and bytes(found) == expected.view(torch.uint8).numpy().tobytes()
    scales = torch.tensor([2.0, -0.5, 1.0], dtype=dtype).repeat(len(expected))[: len(expected)]
    scaled = in_one_piece(tensors, dtype, scales)
    assert scaled is not None and bytes(scaled) == (expected * scales).view(torch.uint8).numpy().tobytes()
    assert bytes(in_one_piece(tensors[1:], dtype) or b"") == expected[12:].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("kind", NONE)
def test_what_is_not_put_together(kind: str, by: str) -> None:
    tensors = [gaussian(4, 3, seed=1), NONE[kind](gaussian(4, 3, seed=2))]
    assert in_one_piece(tensors, torch.float32) is None and in_one_piece(tensors[::-1], torch.float32) is None


def test_what_overflows_when_it_is_scaled(by: str) -> None:
    tensors = [torch.full((4, 3), 3e38)]
    assert in_one_piece(tensors, torch.float32) is None or by == "core"  # the sum alone overflows
    assert in_one_piece(tensors, torch.float32, torch.full((12,), 2.0)) is None


@needs_kernels
def test_the_core_puts_tensors_together() -> None:
    assert cpu.joined([gaussian(4, 3, seed=1)], torch.float32) is not None
    assert cpu.joined([gaussian(4, 3, seed=1).T], torch.float32) is None
    assert cpu.joined([gaussian(4, 3, seed=1)[1:2].as_strided((1, 3), (77, 1))], torch.float32) is not None
    assert cpu.joined([torch.nn.Parameter(gaussian(4, 3, seed=1))], torch.float32) is None  # of another class
    freed = gaussian(4, 3, seed=1)
    freed.untyped_storage().resize_(0)
    assert cpu.joined([freed], torch.float32) is None


@needs_kernels
def test_pieces_of_other_sizes_up_to_the_last_number() -> None:
    pieces = [gaussian(2, 3, seed=1), gaussian(5, 1, seed=2), gaussian(1, 4, seed=3)]
    expected = torch.cat([x.flatten() for x in pieces]).view(torch.uint8).numpy().tobytes()
    assert bytes(cpu.joined(pieces, torch.float32) or b"") == expected
    pieces[-1][0, -1] = torch.inf
    assert cpu.joined(pieces, torch.float32) is None
