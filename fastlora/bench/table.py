"""The results as plain data, as a table for a terminal and as the page docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

from fastlora.bench.cases import Row
from fastlora.bench.timing import Machine, describe

HEADER = ("what", "opponent", "its time", "ours, 1 thread", "ours, 2 threads", "ratio, 1 / 2", "floor", "ours ÷ floor")

PREAMBLE = """# Benchmarks

Written by `fastlora bench --markdown docs/benchmarks.md`; every answer was checked before it was timed. Times are
medians of seven alternated rounds; machines differ and are noisy, so the ratios are what counts. The opponent runs at
its best thread count, which is named. The floor is what the operation must at least cost on the most threads measured:
bytes moved over the speed of a large copy, or operations over the speed of a large matrix product, whichever is longer;
for `eigh` and `svd` operations alone, counted as 14/3·n³ (divide and conquer) and 9·n³ (that, AᵀA, A·V, a check).
"""

GPU = """
## GPU

Not measured: this version computes on the CPU.
"""


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def cells(row: Row) -> tuple[str, ...]:
    ratios = " / ".join(f"{row.ratio(c):.2f}" if row.ratio(c) < 100 else f"{row.ratio(c):,.0f}" for c in row.ours)
    most = row.ours[max(row.ours)]
    above = "–" if row.floor is None else f"{most / row.floor:.2f}"
    ours = [milliseconds(row.ours.get(c)) for c in (1, 2)]
    return (row.what, row.opponent, milliseconds(row.theirs), *ours, ratios, milliseconds(row.floor), above)


def as_dict(machine: Machine, rows: list[Row]) -> dict[str, Any]:
    return {
        "machine": describe(),
        "copy_bytes_per_second": machine.copy,
        "fp32_operations_per_second": machine.fp32,
        "fp64_operations_per_second": machine.fp64,
        "rows": [
            {"what": r.what, "ours": r.ours, "opponent": r.opponent, "theirs": r.theirs, "floor": r.floor} for r in rows
        ],
    }


def machine_line(machine: Machine) -> str:
    counts = ", ".join(
        f"{c} thread{'s' * (c > 1)}: copy {machine.copy[c] / 1e9:.1f} GB/s (read + written), "
        f"fp32 {machine.fp32[c] / 1e9:.0f} and fp64 {machine.fp64[c] / 1e9:.0f} Gop/s"
        for c in machine.copy
    )
    return f"{describe()}. Measured limits: {counts}."


def as_markdown(machine: Machine, rows: list[Row]) -> str:
    lines = [PREAMBLE, machine_line(machine), "", "| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n" + GPU
