"""With ``FASTLORA_TEST_DEVICE=cuda`` the tests of the ops run on a device: inputs are moved there and results back."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import fastlora as fl
from fastlora.ops import dispatch
from fastlora.ops.add_products import FilePlace
from fastlora.ops.dispatch import current_backend, use_backend

DEVICE = os.environ.get("FASTLORA_TEST_DEVICE", "")
OPS = ("gram", "combine", "eigh", "eigh_ex", "svd", "svd_ex", "chain")
# Ops that are no torch operators, with what of their arguments goes to the device.
DRIVEN = {
    "merge_select": 1, "merge_count_varied": 1, "merge_row_masks": 1, "merge_tiles": 3, "similarity": 2,
    "add_products": 3, "tucker": 4, "difference_products": 4,
}  # fmt: skip


def moved(values: Any, device: str) -> Any:
    """Tensors on a device, with the strides they have."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, values)


def copied(x: Any, device: str, pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """Tensors in records and sequences on a device; ``pairs``: each with its copy."""
    if isinstance(x, Tensor):
        pairs.append((x, x.to(device)))
        return pairs[-1][1]
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        given = {f.name: copied(getattr(x, f.name), device, pairs) for f in dataclasses.fields(x)}
        return dataclasses.replace(x, **given)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(copied(v, device, pairs) for v in x))
    return type(x)(copied(v, device, pairs) for v in x) if type(x) in (list, tuple) else x


def driven(run: Callable[..., Any]) -> Callable[..., Any]:
    """``dispatch.run`` with the arguments of some ops on the device, and what they wrote into them copied back."""

    @functools.wraps(run)
    def run_there(op: str, *args: Any) -> Any:
        if op not in DRIVEN or current_backend() == "reference" or any(isinstance(a, FilePlace) for a in args):
            return run(op, *args)
        pairs: list[tuple[Tensor, Tensor]] = []
        there = [copied(a, DEVICE, pairs) if i < DRIVEN[op] else a for i, a in enumerate(args)]
        with use_backend("auto"):
            result = run(op, *there)
        for mine, other in pairs:
            mine.copy_(other)
        return copied(result, "cpu", [])

    return run_there


def on_device(op: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(op)
    def run(*args: Any, **kwargs: Any) -> Any:
        if current_backend() == "reference":  # the truth is computed where it always is
            return op(*args, **kwargs)
        with use_backend("auto"):  # "cpu", as most tests say, means: not the reference
            return moved(op(*moved(args, DEVICE), **moved(kwargs, DEVICE)), "cpu")

    return run


@pytest.fixture(autouse=True)
def _two_threads(threads: Callable[[int], None]) -> None:
    """Kernels share their work among threads, however many processors there are and tests run at the same time."""
    threads(2)


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE:
        if DEVICE != "cpu" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        for name in OPS:
            monkeypatch.setattr(fl.ops, name, on_device(getattr(fl.ops, name)))
        monkeypatch.setattr(dispatch, "run", driven(dispatch.run))
    yield
