"""Measurements of a GPU as tables, beside what was to be reached and what was predicted."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlora.bench.gpu.targets import BANDWIDTH, PREDICTIONS, TARGETS, WARPS

Rows = Sequence[dict[str, Any]]
NOT_MEASURED = "not measured"
RESULTS = Path(__file__).resolve().parents[3] / "benches" / "results"
WIDTH = 120  # columns of prose in documents

FACTS = (
    "device",
    "driver",
    "highest clock",
    "power limit",
    "cuda",
    "nvcc",
    "torch",
    "triton",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "python",
    "kernels prepared",
    "kernels compiled here",
    "commit",
    "time",
)


def facts_line(facts: dict[str, Any]) -> str:
    """Device, versions and commit: a result without them means nothing."""
    return "; ".join(f"{name} {facts[name]}" for name in FACTS if facts.get(name)) + "."


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph of a document, or an item of a list whose further lines are indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def seconds(value: float | None) -> str:
    """A time in µs, ms or s with three digits."""
    if value is None:
        return "–"
    return f"{1e6 * value:.3g} µs" if value < 1e-3 else f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def target_table(rows: Rows) -> list[str]:
    """What was to be reached, with what was measured or "not measured"."""
    by_key = {r["key"]: r for r in rows}
    lines = ["| what | floor | must | aim | measured | reached |", "|---|---|---|---|---|---|"]
    for t in TARGETS:
        row = by_key.get(t.key, {})
        measured, reached = NOT_MEASURED, "–"
        reference = row.get("opponent") if t.unit == "opponent" else row.get("floor")
        if "seconds" in row and (reference or t.unit == "s"):
            value = t.reached(row["seconds"], reference or 1.0)
            measured = seconds(row["seconds"]) + (f" ({value:.2f} ×)" if t.unit != "s" else "")
            reached = "aim" if t.holds(value, t.aim) else "must" if t.holds(value, t.must) else "no"
        elif "skipped" in row or "failed" in row:
            measured = f"{NOT_MEASURED}: {row.get('skipped') or row.get('failed')}"
        floor = seconds(row["floor"]) if row.get("floor") else t.floor
        lines.append(f"| {t.what} | {floor} | {t.limit(t.must)} | {t.limit(t.aim)} | {measured} | {reached} |")
    return lines


def prediction_table() -> list[str]:
    """What an H100 needs at the least by its peaks, from bytes and operations."""
    lines = [
        "| kernel | work | bytes | operations | blocks × warps | predicted | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in PREDICTIONS:
        cells = [
            p.kernel,
            p.work,
            f"{p.moved / 1e6:.4g} MB",
            f"{p.operations / 1e9:.4g} G {p.rate}",
            ", ".join(map(str, p.resident)),
            seconds(p.seconds),
            p.note,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def latest(folder: Path = RESULTS) -> dict[str, Any] | None:
    """The newest record in a folder, else the newest result of a first window, or ``None``."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("gpu-*.json")]
    return max(found, key=lambda d: (d["window"] == "record", str(d["facts"].get("time", ""))), default=None)


def section() -> str:
    """The part of docs/benchmarks.md about GPUs."""
    result = latest()
    rows: Rows = result["rows"] if result else []
    head = (
        facts_line(result["facts"])
        if result
        else "Not measured: no result of `make gpu` lies in benches/results/. Only a real device's times stand here."
    )
    intro = (
        "Predictions for an H100, to hold a measurement against, are the longest of three times: bytes over "
        f"{BANDWIDTH / 1e12:.2f} TB/s, operations over the peak of the unit that does them, and the steps that depend "
        "on each other ([gpu_kernels.md](gpu_kernels.md)). A launch adds 2–4 µs in a CUDA graph. Blocks × warps are "
        f"what a multiprocessor holds at once, of its {WARPS} warps, by the compiled kernels' registers and shared "
        "memory."
    )
    tables = [*target_table(rows), "", wrapped(intro), "", *prediction_table()]
    return "\n".join(["", "## GPU", "", wrapped(head), "", *tables, ""])
