"""What Nsight Compute counts in one run of each kernel: what bounds it. Clocks are left as they are."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from typing import TYPE_CHECKING

from benches.gpu.processes import Failed, Skipped, tool

if TYPE_CHECKING:
    from benches.gpu.running import Visit

PROFILED = "fastlora.bench.gpu.profiled"
SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")
COLUMNS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "memory moved",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessors %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "launch__registers_per_thread": "registers",
    "lts__t_sector_hit_rate.pct": "L2 hits %",
}
"""A metric → a column of the table; the file has all that were counted."""
STALL = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
STALLS = 3  # that are named


def run(visit: Visit, limit: float) -> str:
    """One eager run of a decomposition, eigh and svd under ncu."""
    program = tool("ncu")
    if program is None:
        raise Skipped("ncu was not found")
    path = visit.folder / "profile.csv"
    options = ["--target-processes", "all", "--profile-from-start", "off", "--clock-control", "none"]
    options += [word for section in SECTIONS for word in ("--section", section)]
    options += ["--csv", "--page", "raw", "--log-file", str(path)]
    command = visit.shell.python_command("-m", PROFILED, *(["--tiny"] if visit.tiny else []))
    try:
        visit.shell.run(command.under(program, *options), limit)
    except Failed as failure:
        visit.report.profile += _kept(visit, path)
        said = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        if "ERR_NVGPUCTRPERM" in said + failure.output or "LibraryNotLoaded" in said + failure.output:
            raise Skipped("the counters of this device cannot be read here") from None
        raise
    visit.report.profile += _kept(visit, path)
    return f"{len(visit.report.profile)} kernels"


def _kept(visit: Visit, path: object) -> list[dict[str, str]]:
    try:
        with open(str(path), encoding="utf-8", errors="replace") as file:
            return [{**row, "stage": visit.stage} for row in table_of(file)]
    except FileNotFoundError:
        return []


def table_of(lines: Iterable[str]) -> list[dict[str, str]]:
    """A row a kernel of what ncu printed as raw CSV: its name, :data:`COLUMNS` with their units, why warps waited."""
    rows = list(csv.reader(line for line in lines if line.startswith('"')))
    if len(rows) < 3 or "Kernel Name" not in rows[0]:
        return []
    names, units = rows[0], dict(zip(rows[0], rows[1], strict=False))
    found = []
    for cells in rows[2:]:
        if len(cells) != len(names):
            continue  # a line that was cut
        values = dict(zip(names, cells, strict=True))
        row = {"kernel": values["Kernel Name"].split("(")[0]}
        for metric, column in COLUMNS.items():
            if values.get(metric):
                unit = "" if units.get(metric) in ("%", "", None) or column == "registers" else f" {units[metric]}"
                row[column] = values[metric] + unit
        row["waits for"] = ", ".join(_stalls(values))
        found.append(row)
    return found


def _stalls(values: dict[str, str]) -> list[str]:
    """The reasons why warps waited longest, with the cycles of each an instruction."""
    cycles = []
    for metric, value in values.items():
        if metric.startswith(STALL[0]) and metric.endswith(STALL[1]):
            try:
                cycles.append((float(value.replace(",", "")), metric[len(STALL[0]) : -len(STALL[1])]))
            except ValueError:
                continue
    return [f"{name} {count:.1f}" for count, name in sorted(cycles, reverse=True)[:STALLS]]
