"""What a window found, as JSON and as a page, written anew after every stage."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastlora.bench.gpu import table

DONE, FAILED, SKIPPED, CUT, EARLIER = "done", "failed", "skipped", "cut off", "done earlier"
SHOWN = 40  # lines of a failure's output


@dataclass
class StageRecord:
    """How a stage ended; one that was cut off with its window says so, since that is written before it begins."""

    stage: str
    result: str
    seconds: float = 0.0
    detail: str = ""
    clocks: str = ""


@dataclass
class Report:
    """Everything that a window found.

    ``rows``: measurements, each with its ``key``; ``forms``: kernels that were tried, each with its ``form``;
    ``failures``: the output of what failed, run again alone; ``profile``: what a profiler counted, a kernel a row.
    ``before``: reports that a window goes on from, the newest first, until it has ended: it may be cut off again.
    """

    window: str
    out: Path
    facts: dict[str, Any] = field(default_factory=dict)
    stages: list[StageRecord] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    forms: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    profile: list[dict[str, Any]] = field(default_factory=list)
    before: list[dict[str, Any]] = field(default_factory=list)
    _stem: str | None = None

    @property
    def stem(self) -> str:
        """Of the files: the device, and the window unless it is the record."""
        name = re.sub(r"[^a-z0-9]+", "-", str(self.facts["device"]).lower()).strip("-")
        return f"gpu-{name}" + (f"-{self.window}" if self.window != "record" else "")

    def write(self) -> None:
        """Both files, each replaced as a whole; nothing before a device is known."""
        if not self.facts.get("device"):
            return
        if self._stem not in (None, self.stem):  # a better name came
            for path in self.files(self._stem):
                path.unlink(missing_ok=True)
        self._stem = self.stem
        data = {k: v for k, v in asdict(self).items() if k not in ("out", "_stem")}
        as_json, page = self.files(self.stem)
        _replace(as_json, json.dumps(data, indent=1) + "\n")
        _replace(page, self.markdown())

    def files(self, stem: str | None) -> tuple[Path, Path]:
        return self.out / f"{stem}.json", self.out / f"{stem}.md"

    def markdown(self) -> str:
        lines = ["# On a GPU", "", table.wrapped(table.facts_line(self.facts)), ""]
        lines += ["| stage | result | seconds | clocks | |", "|---|---|---|---|---|"]
        for s in self.stages:
            lines.append(f"| {s.stage} | {s.result} | {s.seconds:.0f} | {s.clocks} | {_cell(s.detail)} |")
        lines += ["", *table.target_table(self.rows), ""]
        if self.rows:
            lines += [*row_table(self.rows), ""]
        if self.forms:
            lines += [*form_table(self.forms), ""]
        if self.profile:
            lines += [*profile_table(self.profile), ""]
        for failure in self.failures:
            lines += [f"## {failure['stage']}, {failure['how']}", "", "```", f"$ {failure['command']}"]
            lines += [*failure["output"].replace("```", "'''").splitlines()[-SHOWN:], "```", ""]
        return "\n".join(lines).rstrip("\n") + "\n"


def earlier(window: str, out: Path) -> list[dict[str, Any]]:
    """The newest report of this window in the folder, and those that it went on from."""
    found = []
    for path in out.glob("gpu-*.json"):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(data, dict) and data.get("window") == window:
            found.append(data)
    if not found:
        return []
    newest = max(found, key=lambda d: str(d["facts"].get("time", "")))
    return [newest, *newest.pop("before", [])]


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(path.suffix + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def row_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every measurement as it came."""
    lines = ["| case | ours | floor | opponent | note |", "|---|---|---|---|---|"]
    for r in rows:
        note = _cell(str(r.get("note") or r.get("skipped") or r.get("failed") or ""))
        if "bytes_per_second" in r:
            lines.append(f"| {r['key']} | {r['bytes_per_second'] / 1e12:.2f} TB/s | – | – | {note} |")
            continue
        cells = (table.seconds(r.get(k)) for k in ("seconds", "floor", "opponent"))
        lines.append(f"| {_cell(r['key'])} | {' | '.join(cells)} | {note} |")
    return lines


def form_table(forms: Sequence[dict[str, Any]]) -> list[str]:
    """The kernels that were tried: what is wrong first."""
    lines = ["| form of a kernel | result | error | allowed | seconds |", "|---|---|---|---|---|"]
    for f in sorted(forms, key=lambda f: "failed" not in f):
        result = next((f"{word}: {f[word]}" for word in ("failed", "skipped") if word in f), "right")
        numbers = [f"{f[k]:.1e}" if k in f else "–" for k in ("error", "allowed")]
        lines.append(f"| {_cell(f['form'])} | {_cell(result)} | {' | '.join(numbers)} | {f.get('seconds', 0):.1f} |")
    return lines


def profile_table(profile: Sequence[dict[str, Any]]) -> list[str]:
    """What a profiler counted, a kernel a row."""
    columns = list(dict.fromkeys(name for row in profile for name in row if name != "stage"))
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return lines + [f"| {' | '.join(_cell(str(row.get(c, '–'))) for c in columns)} |" for row in profile]
