"""Registers, stack, spills and shared memory of the CUDA kernels stay within resources.json.

A kernel that may take more: ``python tests/cuda/resources.py`` writes what it takes now, for review to see.
"""

from __future__ import annotations

import json

import predictions
import pytest
import resources

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


def test_the_document_holds_the_predictions() -> None:
    """``python tests/cuda/predictions.py`` writes them anew."""
    assert predictions.table_in_document() == predictions.table()
