"""Pieces of ``make gpu``: processes apart, rows that were cut, clocks, what was prepared."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benches.gpu import clocks, prebuilt  # noqa: E402
from fastlora.bench.gpu import apart, rows  # noqa: E402


def test_rows_that_were_cut_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert rows.read(path) == []
    path.write_text('{"key": "a"}\nnonsense\n3\n{"key": "b"}\n{"key": "c", "sec')
    assert [row["key"] for row in rows.read(path)] == ["a", "b"]
    assert [row["key"] for row in rows.read(path, start=13)] == ["b"]


def fails() -> None:
    raise ValueError("on purpose")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> None:
    time.sleep(600)


def test_work_apart_spoils_no_other(capfd: pytest.CaptureFixture[str]) -> None:
    works = {"well": lambda: None, "fails": fails, "killed": killed, "after": lambda: None}
    found = {e.name: e.reason for e in apart.run(works.items(), limit=600)}
    assert [found[name] for name in works] == [None, "ended with 1", "ended by SIGKILL", None]
    assert "ValueError: on purpose" in capfd.readouterr().err


def test_works_side_by_side() -> None:
    """Each waits for all others."""
    meeting = multiprocessing.get_context("fork").Barrier(4)
    works = [(str(i), lambda: meeting.wait(600) and None) for i in range(4)]
    assert [e.reason for e in apart.run(works, limit=600, together=4)] == [None] * 4


def test_works_that_take_too_long_are_stopped() -> None:
    stopped = re.compile(r"stopped after \d+ s")
    for limits in ({"limit": 0.2}, {"limit": 600, "whole": 2.0}):
        found = {e.name: e.reason for e in apart.run([("hangs", hangs), ("late", hangs)], **limits)}
        assert stopped.fullmatch(found["hangs"] or "")
        assert found["late"] == "not begun: the time was up" if "whole" in limits else stopped.fullmatch(found["late"])


def test_works_end_with_who_started_them() -> None:
    """Also where that is killed, as a stage is at its limit."""
    ends, begins = os.pipe()

    def tells() -> None:
        os.write(begins, b"begun")
        hangs()

    starter = os.fork()
    if not starter:
        list(apart.run([("hangs", tells)], limit=600))
        os._exit(0)
    os.close(begins)
    assert os.read(ends, 5) == b"begun"
    os.kill(starter, signal.SIGKILL)
    os.waitpid(starter, 0)
    assert select.select([ends], [], [], 60)[0] and os.read(ends, 5) == b""  # nobody has the other end any more
    os.close(ends)


def test_clocks_in_a_sentence() -> None:
    samples = "1980, 650.5, 61, 100, 0x0000000000000000\n345, 80.1, 40, 0, 0x0000000000000001\n"
    assert clocks.summary(samples) == "1980 MHz, 650 W, 61 °C"
    slowed = samples + "1500, 700.0, 80, 100, 0x0000000000000004\n[N/A], 1, 2, 3, 0x0\n1755, 7"
    assert clocks.summary(slowed) == "1740 MHz, 700 W, 80 °C, slowed by 0x0000000000000004"
    assert clocks.summary("") == clocks.summary("No devices were found\n") == ""


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "gpu"
    (folder / "triton" / "KEY").mkdir(parents=True)
    paths = {name: f"/elsewhere/KEY/{name}" for name in ("k.cubin", "k.json")}
    (folder / "triton" / "KEY" / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
    for name in paths:
        (folder / "triton" / "KEY" / name).touch()
    (folder / "about.json").write_text(json.dumps({"sources": prebuilt.digest()}))
    monkeypatch.setattr(prebuilt, "FOLDER", folder)
    monkeypatch.setattr(prebuilt, "CACHE", tmp_path / "cache")
    return folder


def test_prepared_kernels_are_named_where_they_are(prepared: Path, tmp_path: Path) -> None:
    assert prebuilt.unpack() == 1 and prebuilt.unpack() == 1
    found = json.loads((tmp_path / "cache" / "KEY" / "__grp__k.json").read_text())["child_paths"]
    assert sorted(found) == ["k.cubin", "k.json"] and all(Path(path).is_file() for path in found.values())
    assert prebuilt.kernels() == {"KEY"}


def test_a_prepared_module_is_taken_only_for_its_sources_and_python(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prebuilt.core() == (None, f"nothing was prepared for {prebuilt.suffix()}")
    module = prepared / f"_core{prebuilt.suffix()}"
    module.touch()
    assert prebuilt.core() == (module, "")
    (prepared / "about.json").write_text('{"sources": "other"}')
    assert prebuilt.core() == (None, "what was prepared is of other sources")
    monkeypatch.setattr(prebuilt, "FOLDER", prepared / "none")
    assert prebuilt.core() == (None, "nothing was prepared")
