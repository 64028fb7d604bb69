"""Pages as files: complete, escaped, loading nothing; what a browser makes of them is in ``test_in_a_browser.py``."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pools
import pytest
import torch
from builders import gaussian

import fastlora as fl
from fastlora.analysis.chance import wachter_edge
from fastlora.pages.packing import MISSING, QUANTUM, packed, packed_shares
from fastlora.pages.rendering import script_data
from fastlora.pages.report import closest_reports, weak_threshold
from fastlora.pages.spectra import chosen

MODULES = [f"layers.{i}.{kind}" for i in range(2) for kind in ("q", "v")]
HOSTILE = "</script><script>document.title='x'</script> \"'&\u2028\u202e"


def adapter(name: str, seed: int, near: int | None = None) -> fl.Adapter:
    """Random factors; ``near``: those of another seed, and a little of its own."""
    parts = {}
    for m, module in enumerate(MODULES):
        left, right = gaussian(30, 3, seed=100 * seed + m), gaussian(3, 20, seed=100 * seed + 50 + m)
        if near is not None:
            left = gaussian(30, 3, seed=100 * near + m) + 0.2 * left
            right = gaussian(3, 20, seed=100 * near + 50 + m)
        parts[module] = (left.float(), right.float(), 1.0)
    return pools.make_adapter(name, parts)


def family_pool(k: int = 5) -> fl.Pool:
    """The second one is like the first."""
    return fl.Pool([adapter("first", 1), adapter("second", 2, near=1), *(adapter(f"a{i}", i) for i in range(3, k + 1))])


class Page(HTMLParser):
    """The elements of a page, their attributes, and the texts of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.words: list[str] = []
        self._inside: tuple[str, dict[str, str | None]] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs)) if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, text: str) -> None:
        if self._inside is None:
            self.words.append(text)
        else:
            self.raw.append((*self._inside, text))

    @property
    def data(self) -> Any:
        (text,) = [text for _, attributes, text in self.raw if attributes.get("type") == "application/json"]
        return json.loads(text)


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def numbers(stored: dict[str, Any]) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(stored["b"]), dtype=f"<{stored['t']}").reshape(stored["s"]).astype(float)
    if "q" in stored:
        values = np.where(values == MISSING, np.nan, values / stored["q"])
    return values


def test_the_page_has_the_numbers(tmp_path: Path) -> None:
    pool = family_pool()
    data = read(fl.report(pool, tmp_path / "page.html")).data
    similar = fl.overlap(pool)
    upper = np.triu_indices(len(pool), 1)
    for measure in ("cosine", "subspace"):
        expected = getattr(similar, measure).numpy()[upper]
        np.testing.assert_allclose(numbers(data["similar"][measure]), expected, atol=1 / QUANTUM)
    assert data["similar"]["order"] == similar.order()
    np.testing.assert_allclose(numbers(data["similar"]["joints"]), similar.joints()[:, :3], rtol=1e-6)
    np.testing.assert_allclose(numbers(data["norm"]), similar.norms.numpy(), rtol=1e-6)
    assert data["modules"] == pool.modules and data["layers"] == ["0", "1"] and data["kinds"] == ["q", "v"]
    assert [a["family"] for a in data["adapters"]] == [0, 0, None, None, None]


def test_reports_are_those_of_the_decompositions(tmp_path: Path) -> None:
    pool = family_pool(3)
    data = read(fl.report(pool, tmp_path / "page.html", threshold=0.4)).data["decompositions"]
    pairs = [(a, b) for i, a in enumerate(pool.names) for b in pool.names[i + 1 :]]
    assert [[pool.names[i] for i in r["adapters"]] for r in data["reports"]] == [list(pair) for pair in pairs]
    assert data["first"] == 0 and data["threshold"] == 0.4
    values, energy, edge = (numbers(data[name]) for name in ("values", "energy", "edge"))
    at = 0
    for pair in pairs:
        for row in fl.decompose(pool.subset(pair), 0.4).report.rows:
            np.testing.assert_allclose(values[at, : len(row.eigenvalues)], row.eigenvalues, atol=1 / QUANTUM)
            assert np.isnan(values[at, len(row.eigenvalues) :]).all()
            shares = [row.energy_shared[name] for name in pair]
            np.testing.assert_allclose(energy[2 * at : 2 * at + 2], shares, atol=1 / QUANTUM)
            assert edge[at] == pytest.approx(row.chance_edge, abs=1 / QUANTUM)
            assert numbers(data["shared"])[at] == row.shared and data["starts"][-1] == len(values)
            at += 1


def test_it_loads_nothing_and_allows_its_own_script_alone(tmp_path: Path) -> None:
    path = fl.report(family_pool(), tmp_path / "page.html")
    page, text = read(path), path.read_text(encoding="utf-8")
    (policy,) = [a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a]
    assert policy is not None and "default-src 'none'" in policy and "unsafe" not in policy
    scripts = [t for tag, a, t in page.raw if tag == "script" and "type" not in a]
    styles = [t for tag, _, t in page.raw if tag == "style"]
    for what, texts in (("script", scripts), ("style", styles)):
        (content,) = texts
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{what}-src 'sha256-{digest}'" in policy
    assert not [a for _, a in page.elements if "style" in a or any(name.startswith("on") for name in a)]
    assert {a["href"] for t, a in page.elements if "href" in a} <= {
        "data:,",
        *(f"#{a.get('id')}" for _, a in page.elements),
    }
    assert not [a for _, a in page.elements if "src" in a]
    assert re.findall(r"https?://[^\s'\"]+", text) == ["http://www.w3.org/2000/svg"]


@pytest.mark.parametrize(
    "name", ["<img src=x onerror=alert(1)>", HOSTILE.replace("/", "|"), "{{ 7 * 7 }}", "ünïcode-模型"]
)
def test_names_are_text(name: str, tmp_path: Path) -> None:
    plain = read(fl.report(family_pool(), tmp_path / "plain.html"))
    pool = fl.Pool([adapter(name, 1), adapter("second", 2, near=1), *(adapter(f"a{i}", i) for i in range(3, 6))])
    page = read(fl.report(pool, tmp_path / "page.html"))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    shown = name.replace("\u2028", "\\u2028").replace("\u202e", "\\u202e")
    assert page.data["adapters"][0]["name"] == shown
    assert shown in page.words or shown in "".join(page.words)


def test_modules_bases_and_notes_are_text(tmp_path: Path) -> None:
    parts = {f"layers.0.{HOSTILE}": (gaussian(30, 3, seed=1).float(), gaussian(3, 20, seed=2).float(), 1.0)}
    hostile = pools.make_adapter("first", parts)
    hostile = replace(
        hostile, base=replace(hostile.base, model=HOSTILE), notes=(HOSTILE,), provenance={HOSTILE: HOSTILE}
    )
    path = fl.report(fl.Pool([hostile, replace(hostile, name="second")]), tmp_path / "page.html", title=HOSTILE)
    page = read(path)
    assert sum(tag == "script" for tag, _ in page.elements) == 2
    assert "\u2028" not in path.read_text(encoding="utf-8")
    data = page.data
    assert data["adapters"][0]["base"] == HOSTILE.replace("\u2028", "\\u2028").replace("\u202e", "\\u202e")
    assert "</script>" in data["modules"][0] and "</script>" in data["provenance"][0]


def test_data_of_scripts_cannot_end_a_script() -> None:
    text = script_data({"</script>": "<!--\u2028&"})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {"</script>": "<!--\u2028&"}


def test_odd_adapters_are_told(tmp_path: Path) -> None:
    empty = {m: (torch.zeros(30, 3), gaussian(3, 20, seed=9).float(), 1.0) for m in MODULES}
    some = {
        m: (gaussian(30, 3, seed=8).float() * (i > 0), gaussian(3, 20, seed=7).float(), 1.0)
        for i, m in enumerate(MODULES[:3])
    }
    pool = fl.Pool(
        [adapter("first", 1), adapter("copy", 1), adapter("a3", 3), pools.make_adapter("empty", empty),
         pools.make_adapter("some", some)]
    )  # fmt: skip
    told = {a["name"]: a["oddities"] for a in read(fl.report(pool, tmp_path / "page.html")).data["adapters"]}
    assert told["first"] == ["like 'copy': cosine 1.000000"] and told["a3"] == []
    assert told["empty"] == ["changes nothing"]
    assert "1 modules change nothing" in told["some"] and "1 of 4 modules are missing" in told["some"]


def test_of_many_each_is_decomposed_with_the_closest(tmp_path: Path) -> None:
    pool = fl.Pool([adapter(f"a{i}", i // 2, near=i // 2) if i % 2 else adapter(f"a{i}", i // 2) for i in range(10)])
    reports = closest_reports(pool, fl.overlap(pool))
    assert [r.settings["adapters"] for r in reports] == [[f"a{i}", f"a{i + 1}"] for i in range(0, 10, 2)]


def test_the_threshold_is_twice_what_chance_gives(tmp_path: Path) -> None:
    pool = family_pool(3)
    edge = wachter_edge(30, 3, 3)
    assert weak_threshold(pool, [("first", "second")]) == max(0.3, 2 * edge) > 0.3
    full = {m: (gaussian(4, 4, seed=1).float(), gaussian(4, 6, seed=2).float(), 1.0) for m in MODULES}
    both = fl.Pool([pools.make_adapter(name, full) for name in ("a", "b")])
    assert weak_threshold(both, [("a", "b")]) == 0.85


def test_the_reports_that_stand_out_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = closest_reports(family_pool(4), fl.overlap(family_pool(4)))
    assert chosen(reports) == reports
    monkeypatch.setattr("fastlora.pages.spectra.MOST_REPORTS", 2)
    kept = chosen(reports)
    assert len(kept) == 2 and kept[0].title == "first + second"


@pytest.mark.parametrize("k", [2, 20])
def test_pools_without_anything_in_common(k: int, tmp_path: Path) -> None:
    parts = [
        {f"layers.{i}.q": (gaussian(8, 2, seed=i).float(), gaussian(2, 6, seed=k + i).float(), 1.0)} for i in range(k)
    ]
    pool = fl.Pool([pools.make_adapter(f"a{i}", part) for i, part in enumerate(parts)], align=False)
    data = read(fl.report(pool, tmp_path / "page.html")).data
    assert np.isnan(numbers(data["similar"]["cosine"])).all()
    assert data["adapters"][0]["nearest"] is None


def test_shares_in_two_bytes() -> None:
    values = [[-1.0, 1.0, 0.0], [math.nan, 0.123456, 1.5]]
    found = numbers(packed_shares(values))
    np.testing.assert_allclose(found, [[-1, 1, 0], [math.nan, 0.123456, 1]], atol=0.5 / QUANTUM)
    assert numbers(packed([70000, 3], "u2")).tolist() == [65535, 3]


def test_the_same_pool_makes_the_same_page(tmp_path: Path) -> None:
    first, second = (fl.report(family_pool(), tmp_path / f"{i}.html").read_bytes() for i in range(2))
    assert first == second


def test_a_page_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = fl.report(family_pool(2), tmp_path / "page.html")
    with pytest.raises(fl.OutputError, match="exists"):
        fl.report(family_pool(2), path)
    fl.report(family_pool(2), path, overwrite=True)
    path.write_text("<!doctype html><title>mine</title>")
    with pytest.raises(fl.OutputError, match="not written by fastlora"):
        fl.report(family_pool(2), path, overwrite=True)
    fl.report(family_pool(2), path, overwrite="force")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("package", ["jinja2", "scipy"])
def test_a_package_that_is_missing(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(fl.InputError, match=rf"needs {package}.*`pip install fastlora\[report\]`"):
        fl.report(family_pool(2), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(fl.InputError, match="a pool of one adapter"):
        fl.report(fl.Pool([adapter("first", 1)]), tmp_path / "page.html")
    with pytest.raises(fl.InputError, match=r"threshold=1.0: must be"):
        fl.report(family_pool(2), tmp_path / "page.html", threshold=1.0)
