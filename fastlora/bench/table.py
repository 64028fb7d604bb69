"""The results as plain data and as the page docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

from fastlora.bench.contest import ContestRow
from fastlora.bench.gpu import table
from fastlora.bench.timing import Machine, describe
from fastlora.views import benchmarks
from fastlora.views.benchmarks import HEADER, machine_line, notes

PREAMBLE = """# Benchmarks

`fastlora bench --markdown docs/benchmarks.md --overwrite` writes this page. Every answer is checked before it is timed.

* **Times** are medians of seven alternated rounds, or of as many as the notes say. A round repeats a short run until
  50 ms have passed and counts the median.
* **Ratios** are what counts, since machines differ and are noisy: the opponent's time over ours on one thread and on
  two. The opponent runs at its best thread count, which is named.
* **1 thread ÷ 2** is what the second thread brings.
* **Floor** is what the operation must at least cost, on one thread and on two. It is the longer of two times: bytes
  read and written over the speed of a large copy in memory, and operations over the speed of a large matrix product.
  All three speeds are measured in the same run.
* **Operations** are counted for four ops; bytes are counted everywhere. `eigh` takes 14/3·n³, as divide and conquer
  does, 10/3·n³ where eigenvalues cluster, and none for the identity. `svd` takes 9·n³: that, AᵀA, A·V and a check. The
  third is the Gram pass, in float64, with one triangle of each block on the diagonal. A decomposition in memory takes
  these, and combines through the shared directions (`fastlora/bench/counts.py`); it reads every factor once, and writes
  every unique `B` and the shared factors once.

The workloads are seeded adapters with the shapes of real models (`fastlora/bench/workloads.py`). They have decaying
spectra and four planted common directions; `minilm` is the trained adapters in `examples/adapters`.
`fastlora bench --list` names all cases and workloads.
"""


def cells(row: ContestRow) -> tuple[str, ...]:
    """One row of the table as text."""
    return benchmarks.cells(_row(row))


def _row(row: ContestRow) -> dict[str, Any]:
    return {
        "what": row.what,
        "ours": row.ours,
        "opponent": row.opponent,
        "theirs": row.theirs,
        "floor": row.floor,
        "note": row.note,
    }


def as_dict(machine: Machine, rows: list[ContestRow]) -> dict[str, Any]:
    """The facts about the machine and all rows, as plain data."""
    return {
        "machine": describe(),
        "copy_bytes_per_second": machine.copy,
        "fp32_operations_per_second": machine.fp32,
        "fp64_operations_per_second": machine.fp64,
        "rows": [_row(row) for row in rows],
    }


def as_markdown(machine: Machine, rows: list[ContestRow]) -> str:
    """The page docs/benchmarks.md: the table of all rows and the part about GPUs."""
    data = as_dict(machine, rows)
    heading = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    lines = [PREAMBLE, machine_line(data), "", *heading]
    lines += ["| " + " | ".join(benchmarks.cells(row)) + " |" for row in data["rows"]]
    lines += ["", *(f"* {note}." for note in notes(data))] if notes(data) else []
    return "\n".join(lines) + "\n" + table.section()
