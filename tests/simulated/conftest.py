"""A simulated device for the tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from simulated import simulated_device


@pytest.fixture
def device() -> Iterator[None]:
    with simulated_device():
        yield
