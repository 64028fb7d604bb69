"""Registers, stack, spills, shared memory and instructions of the CUDA kernels stay within resources.json.

A kernel that may take more: ``python tests/emulated/resources.py`` writes what it takes now, for review to see.
"""

from __future__ import annotations

import json

import predictions
import pytest
import resources
from occupancy import resident_blocks

from fastlora.bench.gpu.targets import PREDICTIONS, Prediction, Resident

LIMITS = json.loads(resources.LIMITS.read_text())


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
@pytest.mark.parametrize("source", resources.SOURCES)
def test_kernels_stay_within_their_limits(source: str, architecture: str) -> None:
    if reason := resources.missing_tool():
        pytest.skip(reason)
    found, limits = resources.compiled(source, architecture), LIMITS[architecture][source]
    assert found.keys() == limits.keys()
    for kernel, taken in found.items():
        limit = limits[kernel]
        # Registers are given out in steps of 8 a thread; another compiler may take a few more or less.
        assert taken["registers"] <= min(255, (limit["registers"] + 7) // 8 * 8), (kernel, taken, limit)
        assert taken["stack"] == limit["stack"] == 0 and taken["spills"] == limit["spills"] == 0, (kernel, taken)
        assert taken["shared"] <= limit["shared"], (kernel, taken, limit)
        # Instructions that run once are as long as it takes to fetch them.
        assert taken["code"] <= 1.1 * limit["code"], (kernel, taken, limit)


def test_the_document_holds_the_predictions() -> None:
    """Against forgetting: the table is written by the code that it is held against, ``python
    tests/emulated/predictions.py``."""
    assert predictions.table_in_document() == predictions.table()


@pytest.mark.parametrize("size", [4, 8])
def test_small_matrices_leave_room_for_a_second_block(size: int) -> None:
    cases = [predictions.eigh(n, size) for n in range(1, 33)]
    assert {case.blocks for case in cases} == {2}
    # So that a batch of the size that is timed is there at once.
    assert predictions.PROCESSORS * cases[0].blocks * cases[0].matrices >= predictions.BATCH


@pytest.mark.parametrize("row", [p for p in PREDICTIONS if "CUDA" in p.kernel], ids=lambda p: p.kernel)
def test_predictions_are_those_of_the_compiled_kernels(row: Prediction) -> None:
    (stated,) = row.resident
    cases = [c for c in predictions.CASES if c.size == 4 and row.kernel.startswith(f"{c.source[:-3]} n={c.n} ")]
    if cases:
        (case,) = cases
        assert stated == Resident(case.kernel, case.blocks, case.threads // 32)
        waves = int(row.work.split()[-1]) / predictions.BATCH
        assert row.seconds == pytest.approx(waves * case.seconds, rel=0.05)
        return
    (limits,) = [kernels[stated.kernel] for kernels in LIMITS["sm_90"].values() if stated.kernel in kernels]
    assert stated.blocks == resident_blocks(limits["registers"], stated.warps, limits["shared"] + stated.shared)
