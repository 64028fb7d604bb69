"""Fixtures of the CUDA tests; importing it puts this folder and ``tests/ops``, whose tests they run, on the path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "ops")]

import emulation
from compiled import needs_kernels


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The emulated module is called through tables that the compiled one describes."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(needs_kernels)


@pytest.fixture(scope="session")
def emulator() -> Any:
    """The module ``_emulated``, built once a session."""
    return emulation.build()


@pytest.fixture(params=emulation.SCHEDULES.values(), ids=emulation.SCHEDULES)
def on_emulator(emulator: Any, request: pytest.FixtureRequest) -> Iterator[None]:
    """The test runs on the emulated CUDA backend, once in every schedule."""
    with emulation.emulated(emulator, request.param):
        yield
