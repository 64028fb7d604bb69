"""What is worth telling of a file that is written in a dialect of its family: what its readers will not take of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fastlora.dialects.family import Family
from fastlora.dialects.file_facts import FileFacts, facts_from
from fastlora.dialects.readers import all_readers
from fastlora.dialects.verdicts import Reading

READERS = ("diffusers", "comfy")
LISTED = 4
WAY_OUT = "; write format='diffusers' (--format diffusers), which it reads whole"


def told_of_readers(
    name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: Family, file: Path
) -> list[str]:
    """Notes on the file of an adapter: which modules diffusers and ComfyUI lose or change, or why one refuses it.

    ``tensors``: as they will lie in the file; factors need shapes only.
    """
    facts = facts_from(tensors, metadata, family.name, file)
    readings = {reader: all_readers()[reader].read(facts) for reader in READERS}
    notes = []
    for reader, reading in readings.items():
        said = _said(reading, facts)
        if said is None:
            continue
        others = [all_readers()[o].TITLE for o, r in readings.items() if r.refused is None and not r.findings]
        alone = f", {' and '.join(others)} reads all of it" if others else ""
        way_out = WAY_OUT if reader == "diffusers" else ""
        notes.append(f"adapter {name!r}: {all_readers()[reader].TITLE} {said}{alone}{way_out}")
    return notes


def _said(reading: Reading, facts: FileFacts) -> str | None:
    if reading.has_no_model:
        return None
    if reading.refused is not None:
        return f"refuses such a file ({reading.refused[1]})"
    lost = [stem for stem, finding in reading.findings.items() if finding.fault == "lost"]
    wrong = [stem for stem, finding in reading.findings.items() if finding.fault in ("scaled", "wrong")]
    told = []
    if lost:
        told.append(f"leaves out {_listed(lost, facts)} of such a file without a word")
    if wrong:
        told.append(f"changes {_listed(wrong, facts)} otherwise than meant")
    return " and ".join(told) or None


def _listed(stems: list[str], facts: FileFacts) -> str:
    more = f" and {len(stems) - LISTED} more" if len(stems) > LISTED else ""
    return ", ".join(facts.modules[stem].named.module for stem in stems[:LISTED]) + more
