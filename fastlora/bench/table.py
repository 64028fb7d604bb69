"""The results as plain data, as a table for a terminal and as the page docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

from fastlora.bench.contest import Row
from fastlora.bench.gpu import table
from fastlora.bench.timing import Machine, describe

HEADER = (
    "what",
    "opponent",
    "its time",
    "ours, 1 thread",
    "ours, 2 threads",
    "ratio, 1 / 2",
    "1 thread ÷ 2",
    "floor",
    "ours ÷ floor",
)

PREAMBLE = """# Benchmarks

`fastlora bench --markdown docs/benchmarks.md` writes this page. Every answer is checked before it is timed.

* **Times** are medians of seven alternated rounds, or of as many as the notes say. A round repeats a short run until
  50 ms have passed and counts the median.
* **Ratios** are what counts, since machines differ and are noisy: the opponent's time over ours on one thread and on
  two. The opponent runs at its best thread count, which is named.
* **1 thread ÷ 2** is what the second thread brings.
* **Floor** is what the operation must at least cost on the most threads measured. It is the longer of two times: bytes
  read and written over the speed of a large copy in memory, and operations over the speed of a large matrix product.
* **Operations** are counted for three ops; bytes are counted everywhere. `eigh` takes 14/3·n³, as divide and conquer
  does, 10/3·n³ where eigenvalues cluster, and none for the identity. `svd` takes 9·n³: that, AᵀA, A·V and a check. The
  third is the Gram pass. A processor with AMX multiplies bfloat16 faster than that product, so a Gram pass can be
  below its floor.

The workloads are seeded adapters with the shapes of real models (`fastlora/bench/workloads.py`). They have decaying
spectra and four planted common directions; `minilm` is the trained adapters in `examples/adapters`.
`fastlora bench --list` names all cases and workloads.
"""


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def cells(row: Row) -> tuple[str, ...]:
    ratios = " / ".join(f"{row.ratio(c):.2f}" if row.ratio(c) < 100 else f"{row.ratio(c):,.0f}" for c in row.ours)
    most = row.ours[max(row.ours)]
    above = "–" if row.floor is None else f"{most / row.floor:.2f}"
    ours = [milliseconds(row.ours.get(c)) for c in (1, 2)]
    second = f"{row.ours[1] / row.ours[2]:.2f}" if row.ours.keys() >= {1, 2} else "–"
    return (row.what, row.opponent, milliseconds(row.theirs), *ours, ratios, second, milliseconds(row.floor), above)


def notes(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.note for row in rows if row.note))


def as_dict(machine: Machine, rows: list[Row]) -> dict[str, Any]:
    return {
        "machine": describe(),
        "copy_bytes_per_second": machine.copy,
        "fp32_operations_per_second": machine.fp32,
        "fp64_operations_per_second": machine.fp64,
        "rows": [
            {
                "what": r.what,
                "ours": r.ours,
                "opponent": r.opponent,
                "theirs": r.theirs,
                "floor": r.floor,
                "note": r.note,
            }
            for r in rows
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
    head = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    lines = [PREAMBLE, table.wrapped(machine_line(machine)), "", *head]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    lines += ["", *(table.wrapped(f"* {note}.", "  ") for note in notes(rows))] if notes(rows) else []
    return "\n".join(lines) + "\n" + table.section()
