"""With ``FASTLORA_TEST_DEVICE=cuda`` the tests of the ops run on a device: inputs are moved there and results back."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import fastlora as fl
from fastlora.ops.dispatch import current_backend, use_backend

DEVICE = os.environ.get("FASTLORA_TEST_DEVICE", "")
OPS = ("gram", "combine", "eigh", "eigh_ex", "svd", "svd_ex", "chain")


def moved(values: Any, device: str) -> Any:
    """Tensors on a device, with the strides they have."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, values)


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
    yield
