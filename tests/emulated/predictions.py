"""What occupancy and latencies predict for the CUDA solvers on an H100.

``python tests/emulated/predictions.py`` puts the table into docs/gpu_kernels.md. The latencies are estimates: the
first measurement is to be held against them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from occupancy import resident_blocks

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "gpu_kernels.md"
BEGIN, END = "<!-- predictions -->\n\n", "\n<!-- end of predictions -->\n"
LIMITS = json.loads(Path(__file__).with_name("resources.json").read_text())["sm_90"]

# H100 SXM.
CLOCK, PROCESSORS, SCHEDULERS = 1.755e9, 132, 4
BANDWIDTH, L2_BANDWIDTH = 3.35e12, 5.5e12
BATCH = 1792

# Estimates, in cycles.
ROTATION = {4: 75, 8: 150}  # one step of the QL recurrence: a square root and a dozen dependent operations
RECURRENCE = 49  # its instructions, as compiled
BARRIERS = 400  # the four barriers and two reductions of a Householder step
ROW = {False: 20, True: 150}  # a row of a Householder step, from shared memory or from L2
LEAF, MATRICES = 16, {4: 8, 8: 7}  # kLeaf and kMatricesPerBlock
LEAF_BARRIER = 40
DEFLATED = 130  # a column that one thread looks at: four loads that wait for each other
POLE = {4: 25, 8: 50}  # a pole in a sum of the secular equation: a quotient and a dozen operations
ROOT_STEPS = 7
TILE, FOUR_PARTS = 150, 60  # entries of four new vectors, and four parts of them times the old ones
STAGE = 1000  # eight reflectors from L2, and their products with each other
PAIR = 450  # a pair of columns: product, reduction, angle, rotation
SWEEPS = {4: 8, 8: 10}


@dataclass
class Work:
    """Of one matrix: cycles alone, instructions of a scheduler, accesses of a warp to shared memory."""

    latency: float
    issued: float
    shared: float


@dataclass(frozen=True)
class Case:
    """One kernel on ``BATCH`` matrices of n x n."""

    source: str
    kernel: str
    n: int
    size: int  # bytes of an element
    threads: int  # of a block
    matrices: int  # of a block
    dynamic: int  # bytes of shared memory
    latency: float  # cycles of one matrix alone
    busy: float  # cycles of a multiprocessor that one matrix takes
    traffic: float  # bytes beyond reading and writing each matrix once

    @property
    def blocks(self) -> int:
        """Resident on a multiprocessor."""
        limits = LIMITS[self.source][self.kernel]
        return resident_blocks(limits["registers"], self.threads // 32, limits["shared"] + self.dynamic)

    @property
    def bytes(self) -> float:
        arrays = 2 if self.source == "eigh.cu" else 3
        return BATCH * self.size * self.n * (arrays * self.n + 1)

    @property
    def seconds(self) -> float:
        waves = max(1.0, BATCH / (PROCESSORS * self.blocks * self.matrices))
        most = -(-BATCH // (PROCESSORS * self.matrices)) * self.matrices  # matrices of the busiest multiprocessor
        return max(
            waves * self.latency / CLOCK,
            most * self.busy / CLOCK,
            self.bytes / BANDWIDTH,
            BATCH * self.traffic / L2_BANDWIDTH,
        )


def _rows(n: int) -> float:
    """Rows of all steps of a reduction, each by the warps that have columns left."""
    return sum((n - j) * ((n - j + 31) // 32) for j in range(1, n))


def _joined(n: int, size: int, work: Work) -> Work:
    """From solved leaves to the whole: ``work`` so far, and what joining and the reflectors take."""
    warps, words = (n + 31) // 32, size // 4
    half = LEAF
    while half < n:
        columns = min(2 * half, n)
        work.latency += columns * DEFLATED + (ROOT_STEPS + 3) * columns * POLE[size]
        work.latency += columns / 4 * (TILE + half / 4 * FOUR_PARTS)
        work.issued += (ROOT_STEPS + 3) * columns * 14 * warps + columns / 4 * (30 + half / 4 * 25) * warps
        work.shared += (ROOT_STEPS + 3) * columns * 2 * warps * words + columns / 4 * half / 4 * 5 * warps * words
        half *= 2
    stages, rows = n / 8, n / 2
    work.latency += stages * (STAGE + 24 * rows)
    work.issued += stages * rows * (2 * 12 * warps + 4)
    work.shared += stages * rows * (7 * warps + 2) * words
    return work


def eigh(n: int, size: int) -> Case:
    """As csrc/cuda/eigh.cu launches it."""
    name = {4: "float", 8: "double"}[size]
    words, warps, divided = size // 4, (n + 31) // 32, LEAF < n <= 128
    step = (n + 3) // 4 * 4
    vectors = (16 if divided else 7) * step * size + 4 * (
        (4 if divided else 1) * step + (4 * -(-n // LEAF) + 4) // 4 * 4
    )
    matrix = (n * (n | 1) + 3) // 4 * 4 * size
    in_place = n > 32 and vectors + matrix + 1024 > 227 * 1024
    matrices = MATRICES[size] if n <= 32 else 1
    # The reduction: a row takes 2 accesses to the matrix and 3/4 to vectors, and 3 multiply-adds.
    work = Work(n * (BARRIERS + ROW[in_place] * n / 2), 7 * _rows(n), 2.75 * words * _rows(n))
    if divided or n <= LEAF:
        leaf = min(n, LEAF)
        work.latency += 1.12 * leaf * leaf * ROTATION[size] + 2 * leaf * LEAF_BARRIER
        work.issued += 1.05 * leaf * leaf * (RECURRENCE / matrices + 8 * warps)
        work.shared += 1.05 * leaf * leaf * 4 * warps * words
    else:
        work.latency += 0.85 * n * n * ROTATION[size]
        work.issued += 0.85 * n * n * (RECURRENCE + 8 * warps)
        work.shared += 0.85 * n * n * 4 * warps * words
    if divided:
        work = _joined(n, size, work)
    else:  # Q
        work.latency += ROW[in_place] * n * n / 2
        work.issued += 6 * _rows(n)
        work.shared += 2.5 * words * _rows(n)
    busy = max(work.issued / SCHEDULERS, work.shared)
    traffic = size * n**3 * 4.0 if in_place else 0.0
    if n <= 32:
        banks, more = 128 // size, 16 // size
        share = (-(-((vectors + matrix) // size - more) // banks) * banks + more) * size
        return Case(
            "eigh.cu", f"eigh_warp_kernel<{name}>", n, size, 32 * (matrices + 1), matrices, matrices * share,
            work.latency, busy, traffic,
        )  # fmt: skip
    if divided:
        kernel = f"eigh_divide_kernel<{name}, {32 if n <= 64 else 64}>"
    else:
        kernel = f"eigh_block_kernel<{name}, {str(in_place).lower()}>"
    dynamic = vectors + (0 if in_place else matrix)
    return Case("eigh.cu", kernel, n, size, 32 + 32 * warps, 1, dynamic, work.latency, busy, traffic)


def svd(n: int, size: int) -> Case:
    """As csrc/cuda/svd.cu launches it."""
    name, words = {4: "float", 8: "double"}[size], size // 4
    if n <= 32:
        lanes = 16 if n <= 16 else 32
        shuffles = SWEEPS[size] * (lanes - 1) * (2 * lanes + 4) * words
        latency, busy = SWEEPS[size] * (lanes - 1) * (PAIR - 200) + shuffles, shuffles * lanes / 32
        return Case("svd.cu", f"svd_warp_kernel<{name}, {lanes}>", n, size, 64, 64 // lanes, 0, latency, busy, 0)
    matrices = 2 * n * (n | 1) * size
    in_place = matrices + 1024 > 227 * 1024
    pairs, warps = n * (n - 1) / 2, min(8, n // 2)
    accesses = (2 + 4 + 4) * n / 32 + 8  # of a pair, by a warp: the product, the columns of X and of V
    return Case(
        "svd.cu", f"svd_block_kernel<{name}, {str(in_place).lower()}>", n, size, 32 * warps, 1,
        0 if in_place else matrices, SWEEPS[size] * pairs / warps * PAIR, SWEEPS[size] * pairs * accesses * words,
        SWEEPS[size] * pairs * 10 * n * size if in_place else 0,
    )  # fmt: skip


CASES = [make(n, size) for make in (eigh, svd) for size in (4, 8) for n in (16, 32, 64, 128, 256)]


def table() -> str:
    lines = [
        "| kernel | n | registers | shared KiB | blocks × warps | bytes | predicted | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        limits = LIMITS[case.source][case.kernel]
        shared = (limits["shared"] + case.dynamic) / 1024
        milliseconds = 1e3 * case.seconds
        cells = [
            f"`{case.kernel}`",
            f"{case.n}",
            f"{limits['registers']}",
            f"{shared:.1f}",
            f"{case.blocks} × {case.threads // 32}",
            f"{case.bytes / 1e6:.1f} MB",
            f"{milliseconds:.{2 if milliseconds < 100 else 3}g} ms",
            "not measured",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table_in_document() -> str:
    return DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    head, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(head + BEGIN + table() + END + rest.partition(END)[2])
