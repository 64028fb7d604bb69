"""Kernels compiled beforehand for a device's machine: all that are launched there, and found wherever they lie."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from compiled import needs_kernels
from processes import ROOT, execute

sys.path.append(str(ROOT))

from benches.gpu import prebuild, prebuilt

pytestmark = needs_kernels  # launches are recorded where a compiled backend does what Triton does not
COMPILED = ROOT / "benches" / "gpu" / "compiled.py"


@pytest.fixture(scope="module")
def recorded() -> list[str]:
    return execute("-m", "benches.gpu.recorded", OMP_NUM_THREADS="2").splitlines()


def test_every_kernel_is_recorded(recorded: list[str]) -> None:
    """Against forgetting: each that has a launch, which has its name."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tritonkernels").glob("*.py")]
    named = {name for text in sources for name in re.findall(r"^def ([a-z]\w*)_launch\(", text, re.M)}
    assert len(named) >= 9 and named == {json.loads(line)["kernel"] for line in recorded}
    assert len(set(recorded)) == len(recorded)


def keys(cache: Path) -> set[Path]:
    return {path.relative_to(cache) for path in cache.rglob("*") if path.is_file()}


def test_a_prepared_kernel_is_found_in_another_place(
    recorded: list[str], oldest_triton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches, made, there = tmp_path / "launches.jsonl", tmp_path / "made", tmp_path / "there"
    launches.write_text("\n".join(line for line in recorded if '"write_blocks"' in line), encoding="utf-8")
    arguments = COMPILED, launches
    path = str(oldest_triton)
    said = json.loads(execute(*arguments, made, "90", PYTHONPATH=path).splitlines()[-1])
    assert said == {"triton": prebuild.TRITON, "launches": 1}
    assert prebuild.prune(made, tmp_path / "gpu" / "triton") == 1
    shutil.rmtree(made)  # what the group names first
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path / "gpu")
    monkeypatch.setattr(prebuilt, "CACHE", there)
    assert prebuilt.unpack() == 1
    before = keys(there)
    assert {p.suffix for p in before} == {".json", ".cubin", ".so"}
    execute(*arguments, there, "90", PYTHONPATH=path)
    assert keys(there) == before
