"""``fastlora report`` and ``--html``: pages on the command line."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import make_adapter
from command import ADAPTERS, done, refused, tree

import fastlora as fl

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


COMMANDS = {
    "overlap": ["overlap", SPAM, TREC],
    "decompose": ["decompose", SPAM, TREC, "--threshold", "0.2", "--out", "out"],
    "pairs": ["decompose", ADAPTERS, "--mode", "pairs", "--threshold", "0.2", "--out", "out"],
    "iterative": ["decompose", ADAPTERS, "--mode", "iterative", "--target", "spam", "--threshold", "0.1", "-o", "out"],
    "merge": ["merge", f"{SPAM}:0.6", f"{TREC}:0.4", "--rank", "8", "--out", "out"],
    "compose": ["compose", "0.6*a - unique(b | a)", f"a={SPAM}", f"b={TREC}", "--out", "out"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_other_commands_write_pages(name: str, tmp_path: Path) -> None:
    done(*COMMANDS[name], "--quiet", cwd=tmp_path)
    plain = tree(tmp_path)
    found = done(*COMMANDS[name], "--quiet", "--overwrite", "--html", "page.html", cwd=tmp_path)
    page = tree(tmp_path)
    assert found.out == "" and page.pop("page.html") and page == plain
    data = page_data(tmp_path / "page.html")
    names = [a["name"] for a in data["adapters"]]
    reports = data["decompositions"]["reports"]
    if name in ("merge", "compose"):
        assert names[-1] == "result" and data["adapters"][-1]["is_result"] and data["provenance"][-1]
    else:
        assert not any(a["is_result"] for a in data["adapters"])
    assert len(reports) == {"decompose": 1, "pairs": 10, "iterative": 4}.get(name, 0)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    if name == "merge":
        assert "merge_method: svd" in text and "energy kept of spam" in text


def test_energy_that_steps_share_is_that_of_the_adapter(tmp_path: Path) -> None:
    """What all steps took from the target and what is left of it are all of it."""
    done(*COMMANDS["iterative"], "--html", "page.html", "--quiet", cwd=tmp_path)
    data = page_data(tmp_path / "page.html")
    stored = data["decompositions"]
    energy = np.frombuffer(base64.b64decode(stored["energy"]["b"]), "<i2") / stored["energy"]["q"]
    taken: dict[int, float] = {}
    modules = np.frombuffer(base64.b64decode(stored["module"]["b"]), "<i4")
    for row, module in enumerate(modules.tolist()):
        taken[module] = taken.get(module, 0.0) + energy[2 * row]
    spam, left = fl.load(SPAM), fl.load(tmp_path / "out" / "unique" / "spam")
    assert max(taken.values()) > 0.05
    for module, share in taken.items():
        name = data["modules"][module]
        kept = float((left.delta(name).norm() / spam.delta(name).norm()) ** 2)
        assert share == pytest.approx(1 - kept, abs=1e-3)


def test_a_recipe_writes_its_page(tmp_path: Path) -> None:
    weighed = f"{SPAM}:0.6", f"{TREC}:0.4"
    done("merge", *weighed, "--out", "first", "--save-recipe", "r.yaml", "--quiet", cwd=tmp_path)
    done("merge", "r.yaml", "--out", "second", "--html", "page.html", "--quiet", cwd=tmp_path)
    assert page_data(tmp_path / "page.html")["adapters"][-1]["name"] == "result"


def test_a_result_is_told_from_an_adapter_of_its_name(tmp_path: Path) -> None:
    pool = [make_adapter(tmp_path / name, seed=i) for i, name in enumerate(("result", "two"))]
    done("merge", *pool, "--out", "out", "--html", "page.html", "--quiet", cwd=tmp_path)
    assert [a["name"] for a in page_data(tmp_path / "page.html")["adapters"]] == ["result", "two", "result-2"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_that_cannot_be_written_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    assert "a page is a file *.html" in refused(*COMMANDS[name], "--html", "page", cwd=tmp_path)
    (tmp_path / "page.html").write_text("mine")
    message = refused(*COMMANDS[name], "--html", "page.html", "--overwrite", cwd=tmp_path)
    assert "was not written by fastlora" in message


def page_data(path: Path) -> Any:
    """What the scripts of a page draw."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text.partition('<script type="application/json" id="data">')[2].partition("</script>")[0])
