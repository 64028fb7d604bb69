"""The sequences of the experiment with a larger model: how they are read and split; whether its weights are right."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def test_genes_are_read_and_none_is_in_two_parts(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("peft", "transformers"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    antibodies = load("antibodies")
    file = tmp_path / "v.fasta"
    file.write_text(">IGHV1-1*01\natggc\nctgg\n>IGHV1-2*01\nATGTAA\n>IGHV1-3*01\nATGNNN\n>IGHV2-1*01\nTTTGG\n")
    monkeypatch.setattr(antibodies, "package_file", lambda package, name: file)
    assert antibodies.genes("a place of this test") == {"IGHV1-1*01": "MAW", "IGHV2-1*01": "F"}

    letters = "ACDEFGHIKL"
    classes = [{f"{label}{x}": [letters[label] + x * 40] for x in letters} for label in range(3)]
    monkeypatch.setitem(antibodies.TASKS, "made", lambda: classes)
    monkeypatch.setattr(antibodies, "LENGTH", 41)
    parts = {part: antibodies.rows_of("made", part, 100, 0) for part in antibodies.GENES}
    for rows in parts.values():
        assert [label for _, label in rows] == [i % 3 for i in range(100)]
        assert all(letters.index(text[0]) == label and len(text) == 81 for text, label in rows)
    known = [{text for text, _ in rows} for rows in parts.values()]
    assert sum(map(len, known)) == len(set.union(*known)) == 30, "of 10 genes each, all are drawn"
    assert antibodies.rows_of("made", "test", 100, 1) != parts["test"]


def test_the_model_of_antibodies_finds_masked_residues(load: Any) -> None:
    for package in ("peft", "transformers", "antiberty", "abstar"):  # of the last two only files are read
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    antibodies = load("antibodies")
    right, frequent = antibodies.masked([next(iter(antibodies.genes("bcr/human").values()))])
    assert right > 0.8 > 0.3 > frequent
