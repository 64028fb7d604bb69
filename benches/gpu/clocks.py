"""Clocks, power and temperature of the device while stages run: a slow time may be a slow clock."""

from __future__ import annotations

import statistics
from pathlib import Path

from benches.gpu.processes import Command, Running, Shell, tool

FIELDS = ("clocks.sm", "power.draw", "temperature.gpu", "utilization.gpu", "clocks_event_reasons.active")
IDLE = "0x0000000000000001"  # a reason for a low clock that is none: there is no work


class Clocks:
    """Samples twice a second for as long as a window lasts; without nvidia-smi it has nothing to say."""

    def __init__(self, shell: Shell, folder: Path) -> None:
        self.file = folder / "clocks.csv"
        self.begins = 0
        self._running: Running | None = None
        if (program := tool("nvidia-smi")) is not None:
            query = [program, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits", "-lms", "500"]
            self._running = Shell(self.file).start(Command(tuple(query)))

    def begin(self) -> None:
        self.begins = self.file.stat().st_size if self.file.exists() else 0

    def end(self) -> str:
        """Of the samples since :meth:`begin`: the clock under load, the most power and heat, reasons to slow down."""
        if not self.file.exists():
            return ""
        return summary(self.file.read_bytes()[self.begins :].decode(errors="replace"))

    def stop(self) -> None:
        if self._running is not None:
            self._running.stop()


def summary(samples: str) -> str:
    """Lines of :data:`FIELDS` in a sentence."""
    rows = []
    for line in samples.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        try:
            rows.append(([float(cell) for cell in cells[:4]], cells[4]))
        except (ValueError, IndexError):
            continue  # a line that was cut, or a value that this device does not tell
    if not rows:
        return ""
    busy = [row for row in rows if row[0][3] > 0] or rows
    reasons = sorted({reason for _, reason in busy} - {"0x0000000000000000", IDLE})
    clock = statistics.median(numbers[0] for numbers, _ in busy)
    power, heat = (max(numbers[i] for numbers, _ in busy) for i in (1, 2))
    said = f"{clock:.0f} MHz, {power:.0f} W, {heat:.0f} °C"
    return f"{said}, slowed by {' '.join(reasons)}" if reasons else said
