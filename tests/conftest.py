"""Fixtures of all tests; importing it puts this folder, with ``builders.py``, on the path."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Threads that spin while they wait make small matrices ten times slower on a machine that has other work. OpenMP reads
# this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Workers that run tests at the same time share the processor; what they start is told by the environment too.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # as where only a part of the tests is run: those that draw examples need it
    pass
else:  # neither the time that a machine takes nor chance decides whether a test passes
    slow = [HealthCheck.too_slow]
    settings.register_profile("calm", deadline=None, derandomize=True, database=None, suppress_health_check=slow)
    settings.load_profile("calm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take longest, of Triton's kernels, come first: nobody waits for the last of them at the end."""
    items.sort(key=lambda item: "triton" not in item.path.parts)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers of a test are its own, whatever ran before it in the same process."""
    torch.manual_seed(0)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of ``examples/`` by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    return importlib.import_module


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN (or the most negative integer), so that an element that nobody writes is seen."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.device.type == "meta":
                return tensor
            if tensor.dtype == torch.uint8:
                return tensor.fill_(0xFF)  # bytes that will be viewed as something else: NaN in every floating dtype
            return tensor.fill_(torch.nan if tensor.is_floating_point() or tensor.is_complex() else -(2**31))

        return poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``threads(n)`` sets how many threads torch and the kernels use, until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder on a file system in memory."""
    from fastlora.runtime.system import file_system

    place = Path("/dev/shm")
    if not (place.is_dir() and os.access(place, os.W_OK) and file_system(place) == "tmpfs"):
        pytest.skip("there is no file system in memory here: /dev/shm")
    with tempfile.TemporaryDirectory(prefix="fastlora-", dir=place) as folder:
        yield Path(folder)
