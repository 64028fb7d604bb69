"""The Triton kernels compiled ahead of time, without a GPU: what they take, held against limits.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from occupancy import resident_blocks
from processes import execute

from fastlora.bench.gpu.targets import PREDICTIONS

HERE = Path(__file__).parent
OLDEST = "3.6.0"


def check(found: dict[str, Any]) -> None:
    limits = json.loads((HERE / "limits.json").read_text())
    kernels = found["kernels"]
    assert len(kernels) >= 20
    for name, row in kernels.items():
        if "merge_tile" in name:  # ptxas gives up a few registers for one block more a multiprocessor
            assert row["stack"] <= 64, f"{name} spills: {row}"
        else:
            assert row["stack"] == row["LDL"] == row["STL"] == 0, f"{name} spills: {row}"
        assert row["ATOM"] == row["RED"] == row["flushing"] == 0, f"{name}: {row}"
        for resource in ("registers", "shared"):
            assert row[resource] <= limits[name][resource], f"{name} takes {row[resource]} {resource}"
        if "half" in name:
            wanted = "HGMMA" if name.startswith("sm_90") else "HMMA"
            assert row[wanted] > 0, f"{name} has no tensor-core instructions: {row}"
            if "elements" not in name and "bytes" not in name:
                assert row["LDG.E.128 or LDGSTS"] > 0, f"{name} loads no vectors: {row}"
        if "exact" in name:
            assert row["DFMA"] > 0, f"{name}: {row}"
        if name.startswith(("sm_90 half_sums", "sm_90 half_joint", "sm_90 half_summed")) and name.endswith("bf16"):
            assert row["LDGSTS"] > 0, f"{name} has no tiles on their way while it computes: {row}"
        if "half_joint" in name or "half_summed" in name:
            assert row["STG.E.U16"] == 0, f"{name} stores single elements: {row}"


def check_occupancy(found: dict[str, Any]) -> None:
    """At least the blocks that docs/benchmarks.md states, from which it predicts times."""
    for stated in (r for p in PREDICTIONS if "Triton" in p.kernel for r in p.resident):
        row = found["kernels"][f"sm_90 {stated.kernel}"]
        assert row["warps"] == stated.warps, f"{stated.kernel}: {row}"
        blocks = resident_blocks(row["registers"], row["warps"], row["shared"])
        assert blocks >= stated.blocks, f"{stated.kernel}: a multiprocessor holds {blocks} blocks: {row}"


def test_this_version() -> None:
    found = json.loads(execute(HERE / "compile.py"))
    check(found)
    check_occupancy(found)


def test_the_oldest_version(oldest_triton: Path) -> None:
    """For one architecture; `make triton` compiles for all."""
    found = json.loads(execute(HERE / "compile.py", "--newest", "--triton", oldest_triton))
    assert found["version"] == OLDEST
    check(found)
    check_occupancy(found)


@pytest.mark.parametrize(("name", "column", "message"), [
    ("sm_90 half_sums B one bf16", "LDL", "spills"),
    ("sm_90 half_sums B one bf16", "ATOM", "'ATOM': 1000"),
    ("sm_90 half_sums B one bf16", "registers", "takes 1000 registers"),
    ("sm_80 half_joint B 16 bf16", "STG.E.U16", "stores single elements"),
])  # fmt: skip
def test_what_is_over_its_limit_is_named(name: str, column: str, message: str) -> None:
    limits = json.loads((HERE / "limits.json").read_text())
    columns = ("stack", "flushing", "LDL", "STL", "ATOM", "RED", "STG.E.U16")
    used = dict.fromkeys(("HMMA", "HGMMA", "DFMA", "LDGSTS", "LDG.E.128 or LDGSTS"), 1) | dict.fromkeys(columns, 0)
    rows = {n: {**limits[n], **used} for n in limits}
    check({"kernels": rows})
    rows[name][column] = 1000
    with pytest.raises(AssertionError, match=message):
        check({"kernels": rows})
