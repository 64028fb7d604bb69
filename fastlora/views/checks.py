"""What programs make of a single file, as plain data and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fastlora.dialects.check import FileCheck
from fastlora.dialects.families import families
from fastlora.dialects.readers import all_readers
from fastlora.dialects.verdicts import Finding, Reading
from fastlora.views.tables import Data, Table
from fastlora.views.text import print_paragraph, shorten_apart

FAULTS = ("lost", "scaled", "wrong", "unsure")
SAID: Mapping[str, str] = {
    "lost": "lost",
    "scaled": "scaled otherwise",
    "wrong": "changed otherwise",
    "unsure": "not known",
}
NAMED, LONGEST = 3, 60
"""Modules that a paragraph names, and columns that a name has there."""


def check_data(check: FileCheck) -> Data:
    """What ``--json`` prints about a check."""
    modules = check.facts.modules
    return {
        "file": str(check.path),
        "family": check.facts.family,
        "modules": len(modules),
        "clean": check.is_clean,
        "readers": {name: _reader_data(check, name, reading) for name, reading in check.readings.items()},
        "advice": check.advice,
    }


def _reader_data(check: FileCheck, name: str, reading: Reading) -> Data:
    modules = check.facts.modules
    counts: Counter[str] = Counter(finding.fault for finding in reading.findings.values())
    refused = reading.refused is not None
    return {
        "title": all_readers()[name].TITLE,
        "version": all_readers()[name].VERSION,
        "basis": all_readers()[name].BASIS,
        "verdict": _verdict(check, name, reading),
        "error": reading.refused[0] if reading.refused is not None else None,
        "why": reading.refused[1] if reading.refused is not None else None,
        "read": 0 if refused else len(modules) - sum(counts.values()),
        **{fault: counts[fault] for fault in FAULTS},
        "findings": [
            {"module": modules[stem].named.module, "key": stem, **_finding_data(finding)}
            for stem, finding in reading.findings.items()
        ],
    }


def _verdict(check: FileCheck, name: str, reading: Reading) -> str:
    if reading.has_no_model:
        return "no such model"
    if reading.refused is not None:
        return "refuses"
    return "right" if check.is_right(name) else "differs"


def _finding_data(finding: Finding) -> Data:
    return {
        "fault": finding.fault,
        "factor": finding.factor,
        "scale_meant": finding.meant,
        "scale_read": finding.found,
        "why": finding.why,
    }


def show_check(data: Data, every: bool) -> None:
    """Prints a check: a table of readers, then what they do otherwise and why; ``every``: all modules by name."""
    family = data["family"]
    known = families().get(family)
    title = known.title if known is not None else family
    print_paragraph(f": {title}, {data['modules']} modules", start=data["file"])
    _table(data).print()
    for reader in data["readers"].values():
        _tell(reader, data["modules"])
        if every and reader["findings"]:
            _show_findings(reader)
    if data["advice"]:
        print_paragraph(f"way out: {data['advice']}")


def _table(data: Data) -> Table:
    shown = [fault for fault in FAULTS if any(reader[fault] for reader in data["readers"].values())]
    table = Table("text:reader", "number:as meant", *(f"number:{SAID[fault]}" for fault in shown), "text:verdict")
    for reader in data["readers"].values():
        is_read = reader["verdict"] in ("right", "differs")
        counts = [reader[what] if is_read else "–" for what in ("read", *shown)]
        refused = f"refuses ({reader['error']})" if reader["verdict"] == "refuses" else reader["verdict"]
        table.add(f"{reader['title']} {reader['version']}", *counts, refused)
    return table


def _show_findings(reader: Data) -> None:
    table = Table("name:module of the file", "text:is", "number:factor", title=f"{reader['title']}:")
    for finding in reader["findings"]:
        factor = "–" if finding["factor"] is None else f"{finding['factor']:.4g}"
        table.add(finding["key"], SAID[finding["fault"]], factor)
    table.print()


def _tell(reader: Data, modules: int) -> None:
    if reader["verdict"] == "right":
        return
    start = reader["title"]
    if reader["why"] is not None:
        print_paragraph(f": {reader['why']}", start=start)
    groups: dict[tuple[str, str], list[Data]] = {}
    for finding in reader["findings"]:
        groups.setdefault((finding["fault"], finding["why"]), []).append(finding)
    for (fault, why), found in groups.items():
        print_paragraph(
            f": {len(found)} of {modules} {SAID[fault]}{_factors(found)}: {why} {_listed(found)}", start=start
        )


def _factors(found: Sequence[Data]) -> str:
    """The factors of scales, the most frequent first."""
    factors = [f"{f['factor']:.3g}" for f in found if f["fault"] == "scaled" and f["factor"] is not None]
    if not factors:
        scales = [(f["scale_meant"], f["scale_read"]) for f in found if f["fault"] == "scaled"]
        return f" ({scales[0][1]:g} in place of {scales[0][0]:g})" if scales else ""
    common = [factor for factor, _ in Counter(factors).most_common(4)]
    return f" (× {', '.join(common)}{', …' if len(set(factors)) > 4 else ''})"


def _listed(found: Sequence[Data]) -> str:
    names = shorten_apart([f["key"] for f in found[:NAMED]], LONGEST)
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"({', '.join(names)}{more})"


def check_rows(data: Data) -> list[list[object]]:
    """A row for each finding, with a heading; a reader that refuses the file has one row."""
    heading = ["reader", "module", "key", "fault", "factor", "scale_meant", "scale_read", "why"]
    rows: list[list[object]] = [list(heading)]
    for name, reader in data["readers"].items():
        if reader["why"] is not None:
            rows.append([name, "", "", reader["verdict"], "", "", "", f"{reader['error']}: {reader['why']}"])
        for finding in reader["findings"]:
            values = [finding[column] for column in heading[1:]]
            rows.append([name, *("" if value is None else value for value in values)])
    return rows
