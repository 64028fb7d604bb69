"""The emulator itself: it must find what is wrong in a kernel, and nothing where nothing is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import emulation
import pytest


@pytest.mark.parametrize("schedule", emulation.SCHEDULES.values(), ids=emulation.SCHEDULES)
@pytest.mark.parametrize(("sample", "found"), [
    ("barrier", ""),
    ("no barrier", "race"),
    ("warp barrier", ""),
    ("no warp barrier", "race"),
    ("two barriers", ""),
    ("second barrier missing", "race"),
    ("half at the barrier", "deadlock: 32 threads wait, 16 of them at __syncthreads"),
    ("divergent shuffles", "divergence"),
    ("outside its mask", "not in the mask"),
    ("ended lane", "waits for a lane that has ended"),
    ("half warps", ""),
    ("outside shared", "a write outside shared memory"),
    ("poison", ""),
    ("shared by blocks", "race"),
    ("48 KB", ""),
    ("48 KB and static arrays", "shared memory that was not asked for: 49408"),
])  # fmt: skip
def test_what_the_emulator_finds(emulator: Any, sample: str, found: str, schedule: int) -> None:
    emulator.set_schedule(schedule)
    emulator.set_shared_limit(emulation.SHARED_LIMIT)
    failure = emulator.run_sample(sample)
    assert found in failure and bool(found) == bool(failure), failure


def test_undefined_behaviour_is_looked_for(emulator: Any) -> None:
    assert b"__ubsan_handle" in Path(emulator.__file__).read_bytes()
