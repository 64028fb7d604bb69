"""The documents: lines that fit a screen, links and paths that lead somewhere, a first use that runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [str(p.relative_to(ROOT)) for p in PAGES]
WIDTH = 120

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
REPOSITORY_PATH = re.compile(r"`((?:benches|csrc|docs|examples|fastlora|tests|tritonkernels)/[\w./-]+)`")
MADE = ("benches/results/", "examples/out")
"""What commands make: it need not be there."""


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines outside of code blocks, fenced or indented; list items may be indented too."""
    fenced = code = False
    blank = True
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            if line.startswith("    ") and blank and not re.match(r"\s+([*-]|\d+\.) ", line):
                code = True
            elif line.strip() and not line.startswith("    "):
                code = False
            if not code:
                yield number, line
            blank = not line.strip()


def too_wide(text: str) -> list[int]:
    """Lines of prose that are too wide; rows of tables and lines that are a link alone cannot be broken."""
    rows = [(n, line) for n, line in prose(text) if len(line) > WIDTH and not line.lstrip().startswith("|")]
    return [n for n, line in rows if not LINK.fullmatch(line.strip().removeprefix("* "))]


def anchors(text: str) -> set[str]:
    """What headings are called in links, as forges make it of them."""
    headings = [line.lstrip("#").strip() for _, line in prose(text) if re.match(r"#+ ", line)]
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h)) for h in headings]
    return {h.lower().replace(" ", "-") for h in plain}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a page that lead nowhere."""
    broken = []
    for _, line in prose(text):
        for link in LINK.findall(re.sub(r"`[^`]*`", "", line)):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if link.startswith(("http://", "https://", "mailto:")):
                continue
            if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
                broken.append(link)
    return broken


@pytest.mark.parametrize("name", NAMES)
def test_lines_of_prose_fit_a_screen(name: str) -> None:
    wide = too_wide((ROOT / name).read_text(encoding="utf-8"))
    assert not wide, f"{name}: lines {wide} are wider than {WIDTH} columns"


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    broken = broken_links(ROOT / name, (ROOT / name).read_text(encoding="utf-8"))
    assert not broken, f"{name}: {', '.join(broken)}"


@pytest.mark.parametrize("name", NAMES)
def test_paths_that_are_named_exist(name: str) -> None:
    text = "\n".join(line for _, line in prose((ROOT / name).read_text(encoding="utf-8")))
    named = [p for p in REPOSITORY_PATH.findall(text) if not p.startswith(MADE)]
    missing = [p for p in named if not (ROOT / p).exists()]
    assert not missing, f"{name}: {', '.join(missing)}"


def test_bad_pages_are_found() -> None:
    """The rules of this file can fail."""
    wide = "word " * 30
    text = (
        f"# A page\n{wide}\n| {wide} |\n\n    {wide}\n\n```\n{wide}\n```\n* [a link](https://a.b/{'c' * 200})\n* {wide}"
    )
    assert too_wide(text) == [2, 11]
    page = ROOT / "docs" / "none.md"
    links = "[a](../README.md#first-use) [b](../CHANGELOG.md) [c](../README.md#no) [d](nothing.md) ![e](../docs/no.svg)"
    assert broken_links(page, links) == [
        "../README.md#no", "nothing.md", "../docs/no.svg",
    ]  # fmt: skip
    assert anchors("# What *is* `read`, and written?\n## 4. Two") == {"what-is-read-and-written", "4-two"}


@pytest.mark.parametrize("name", sorted(p.name for p in ROOT.glob("docs/*.svg")))
def test_pictures_parse_and_have_a_description(name: str) -> None:
    tree = ElementTree.parse(ROOT / "docs" / name)
    described = [e.text for e in tree.getroot() if e.tag.endswith(("}title", "}desc"))]
    assert len(described) == 2 and all(described)


def test_the_first_use_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"## First use\n.*?```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert block is not None
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(block[1], "README.md", "exec"), {})
    made = {str(p.parent.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("adapter_config.json")}
    assert made == {"both", "parts/shared", "parts/unique/trec_r16", "parts/unique/trec_rslora"}


def test_results_of_experiments_are_those_of_the_book() -> None:
    """A number with its error that stands on the page of results stands in the laboratory book."""
    numbers = re.compile(r"-?\d\.\d{3} ± \d\.\d{3}")
    pages = ("experiments.md", "experiments_book.md")
    page, book = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in pages)
    assert len(numbers.findall(page)) > 30
    assert set(numbers.findall(page)) <= set(numbers.findall(book))
