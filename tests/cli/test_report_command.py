"""``fastlora report`` and ``--html``: pages on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from builders import make_adapter
from command import ADAPTERS, done, refused, tree

SPAM, TREC = ADAPTERS / "spam", ADAPTERS / "trec_r16"


def test_a_folder_becomes_a_page(tmp_path: Path) -> None:
    found = done("report", ADAPTERS, "--out", "page.html", "--title", "Five of them", cwd=tmp_path)
    assert found.out.startswith("page.html: 5 adapters, 18 modules, 0.") and "left out" in found.err
    assert "<h1>Five of them</h1>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    data = done("report", ADAPTERS, "--out", "page.html", "--overwrite", "--json", cwd=tmp_path).json()
    assert data["out"] == "page.html" and data["adapters"] == 5 and data["bytes"] < 3e6
    assert set(tree(tmp_path)) == {"page.html"}


REFUSED = {
    "no page": (["report", SPAM, TREC, "--out", "page"], "--out page: a page is a file *.html"),
    "one adapter": (["report", SPAM, "--out", "page.html"], "a pool of one adapter has nothing to compare"),
    "a weight": (["report", f"{SPAM}:0.5", TREC, "--out", "page.html"], "weights have no meaning for this command"),
    "a threshold": (["report", SPAM, TREC, "--threshold", "2", "--out", "page.html"], "--threshold 2: must be"),
    "nowhere": (["report", SPAM, TREC, "--out", "no/page.html"], "there is no directory"),
}  # fmt: skip


@pytest.mark.parametrize("command, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(command: list[object], message: str, tmp_path: Path) -> None:
    assert message in refused(*command, cwd=tmp_path)


@pytest.mark.parametrize("package", ["jinja2", "scipy"])
def test_a_missing_package_is_told_before_any_work(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install fastlora[report]" in refused("report", SPAM, TREC, "--out", "page.html", cwd=tmp_path)


def test_an_earlier_page_is_replaced(tmp_path: Path) -> None:
    pool = [make_adapter(tmp_path / name, seed=i) for i, name in enumerate(("one", "two"))]
    done("report", *pool, "--out", "page.html", "--quiet", cwd=tmp_path)
    assert "exists; choose another name" in refused("report", *pool, "--out", "page.html", cwd=tmp_path)
    assert done("report", *pool, "--out", "page.html", "--overwrite", "--quiet", cwd=tmp_path).out == ""
