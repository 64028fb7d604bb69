"""Children of the benches: what they print, and how far they say they are."""

from __future__ import annotations

import sys

import pytest

from fastlora.bench import children


@pytest.mark.parametrize(
    ("line", "share"),
    [
        ("[3/26] Building CXX object", 3 / 26),
        (".......... [ 45%]\n", 0.45),
        ("ss. [100%]", 1.0),
        ("[0/0] nothing", None),
        ("[27/26]", 1.0),
        ("E assert x[1]", None),
    ],
)
def test_how_far_a_child_says_it_is(line: str, share: float | None) -> None:
    assert children.share_done(line) == share


SCRIPT = r"""
import sys
print("[1/2]", flush=True)
sys.stderr.write("x" * 200_000)  # more than a pipe holds
sys.stdout.buffer.write(b"[2/2] \xff")
sys.exit(3)
"""


def test_what_a_child_prints_comes_back() -> None:
    shares: list[float] = []
    ended = children.run([sys.executable, "-c", SCRIPT], steps=shares.append)
    assert (ended.returncode, shares, ended.stdout) == (3, [0.5, 1.0], "[1/2]\n[2/2] \ufffd")
    assert ended.stderr == "x" * 200_000 and children.last_words(ended) == "x" * 600
    assert children.last_words(children.run([sys.executable, "-c", "exit(4)"])) == "exit code 4"
