"""Pages in Chromium: scripts run under their policy, tables and the heat map react, nothing is loaded.

What follows an action may come later, in an event or a frame of its own: it is waited for (``expect``, ``until``), and
never read at once.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pools
import pytest
import torch
from builders import gaussian

import fastlora as fl

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
NEEDED = os.environ.get("FASTLORA_NEEDS_BROWSER") == "1"
"""Whether a browser that is missing is a failure: where tests are meant to be complete."""

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
MODULES = [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("q_proj", "v_proj")]
PATIENCE = 300
"""Seconds that anything may take on a machine that is slow or busy: it only ends what hangs."""

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"> '\u2028 & <b>bold</b>"
LARGE = 60


FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
"""Two frames: what was due for the next one, and what that changed, is done."""


def missing(reason: str) -> Any:
    return pytest.fail(reason) if NEEDED else pytest.skip(reason)


def expect(seen: Any) -> Any:
    """Assertions on a locator or page that wait until they hold."""
    from playwright.sync_api import expect as waiting

    waiting.set_options(timeout=1000 * PATIENCE)
    return waiting(seen)


def until(holds: Callable[[], bool]) -> None:
    """Waits for what no assertion of :func:`expect` tells; a page's policy lets no expressions wait there."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        missing(f"there is no browser to open pages in ({', '.join(NAMES)}); `apt-get install chromium`")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright, which drives the browser, is not installed (pip install 'fastlora[dev]')")
    with sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=1000 * PATIENCE)
        yield launched
        launched.close()


def adapter(name: str, family: int, seed: int) -> fl.Adapter:
    parts = {}
    for m, module in enumerate(MODULES):
        left, right = gaussian(24, 3, seed=1000 * family + m), gaussian(3, 16, seed=1000 * family + 50 + m)
        own = 0.3 * gaussian(24, 3, seed=100_000 + 100 * seed + m)
        parts[module] = ((left + own).float() * (1 + seed % 5), right.float(), 1.0)
    return pools.make_adapter(name, parts)


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names and words of others that are markup, everywhere where a page shows them."""
    names = [HOSTILE.replace("/", "|"), "__proto__", "{{ 7 * 7 }}", "ünïcode 模型", "a3", "empty"]
    adapters = [adapter(name, i // 2, i) for i, name in enumerate(names[:-1])]
    first = adapters[0]
    updates = {f"{module}.{HOSTILE}": update for module, update in first.updates.items()}
    adapters[0] = replace(
        first, notes=(HOSTILE,), provenance={"merge": HOSTILE}, base=replace(first.base, model=HOSTILE),
        updates={**first.updates, **updates},
    )  # fmt: skip
    zero = {m: (torch.zeros(24, 3), gaussian(3, 16, seed=9).float(), 1.0) for m in MODULES}
    pool = fl.Pool([*adapters, pools.make_adapter("empty", zero)], align=False)
    return fl.report(pool, tmp_path_factory.mktemp("hostile") / "page.html", title=HOSTILE)


@pytest.fixture(scope="module")
def large_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pool = fl.Pool([adapter(f"a{i:02d}", i % 4, i) for i in range(LARGE)])
    return fl.report(pool, tmp_path_factory.mktemp("large") / "page.html")


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """``visit(path, **context)``: the page, opened. At the end nothing went wrong in it and nothing was loaded."""
    contexts, told, requests = [], [], []

    def opened(path: Path, **settings: Any) -> Any:
        usual = {"viewport": {"width": 1200, "height": 900}, "reduced_motion": "reduce"}  # scrolling takes no time
        context = browser.new_context(**usual | settings)
        context.set_default_timeout(1000 * PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: told.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.add_init_script(
            "window.refused = []; addEventListener('securitypolicyviolation', e => refused.push(e.violatedDirective))"
        )
        page.goto(path.as_uri())
        page.wait_for_selector("#heat-map[data-cells]")
        page.evaluate(FRAMES)  # what observers and media change at first is done
        return page

    yield opened
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("refused") == []
        context.close()
    assert told == []
    assert len(requests) == len(contexts) and all(url.startswith("file:") for url in requests)


def pixels(page: Any, selector: str = "#heat-map", seen: bool = False) -> torch.Tensor:
    """What a canvas holds, or what is ``seen`` of any element: ``[height, width, 3]``."""
    image = pytest.importorskip("PIL.Image", reason="Pillow, to look at what is drawn, is not installed")
    import numpy as np

    if seen:
        shot = page.locator(selector).screenshot()
    else:
        shot = base64.b64decode(page.locator(selector).evaluate("e => e.toDataURL()").partition(",")[2])
    return torch.from_numpy(np.asarray(image.open(io.BytesIO(shot)).convert("RGB")).copy())


def colours(picture: torch.Tensor) -> int:
    return len((picture.int() @ torch.tensor([65536, 256, 1], dtype=torch.int32)).unique())


def column(page: Any, table: str, index: int) -> list[str]:
    """The visible cells of a column."""
    rows = page.locator(f"#{table} tbody tr")
    shown: list[str] = rows.evaluate_all(f"rows => rows.filter(r => !r.hidden).map(r => r.cells[{index}].innerText)")
    return shown


def heading(page: Any, table: str, name: str) -> Any:
    return page.locator(f"#{table} thead th").filter(has_text=name).first


def test_the_examples_are_shown(visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit(fl.report(fl.Pool.load(ADAPTERS), tmp_path / "page.html"))
    assert page.locator("h1").inner_text() == "5 adapters"
    assert page.locator(".card").count() == 5 and page.locator("#report-table tbody tr").count() == 10
    assert page.locator("#report svg circle").count() > 100
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")


def test_words_of_others_are_text(visit: Callable[..., Any], hostile_page: Path) -> None:
    page = visit(hostile_page)
    shown = HOSTILE.replace("\u2028", "\\u2028")
    assert page.title() == f"{shown} · fastlora" and page.locator("h1").inner_text() == shown
    name = shown.replace("/", "|")
    assert name in column(page, "adapter-table", 0) and "{{ 7 * 7 }}" in column(page, "adapter-table", 0)
    card = page.locator("#card-0")
    details = card.locator("details")
    for i in range(details.count()):
        details.nth(i).locator("summary").click()
        expect(details.nth(i).locator("> :not(summary)")).to_have_count(1)
    told = card.inner_text()
    assert details.count() == 3 and told.count(shown) >= 3
    assert "merge: '</script>" in told.replace('"</script>', "'</script>")
    page.locator("#heat-find").fill("__proto__")
    page.locator("#heat-find").press("Tab")
    expect(page.locator("#heat-told")).to_contain_text("__proto__ with itself")
    assert page.locator("img, b:has-text('bold'), script[src]").count() == 0
    assert page.locator("script").count() == 2
    page.evaluate(FRAMES)
    assert page.title() == f"{shown} · fastlora"  # nor has anything run meanwhile


def test_tables_sort(visit: Callable[..., Any], large_page: Path) -> None:
    page = visit(large_page)
    norm = heading(page, "adapter-table", "‖ΔW‖")
    norm.locator("button").click()
    expect(norm).to_have_attribute("aria-sort", "descending")
    values = [float(v) for v in column(page, "adapter-table", 6)]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    norm.locator("button").press("Enter")
    expect(norm).to_have_attribute("aria-sort", "ascending")
    values = [float(v) for v in column(page, "adapter-table", 6)]
    assert values == sorted(values)
    names = heading(page, "adapter-table", "adapter")
    names.locator("button").click()
    expect(names).to_have_attribute("aria-sort", "ascending")
    assert column(page, "adapter-table", 0) == [f"a{i:02d}" for i in range(LARGE)]
    assert norm.get_attribute("aria-sort") is None


def test_what_has_no_value_comes_last(visit: Callable[..., Any], hostile_page: Path) -> None:
    page = visit(hostile_page)
    cosine = heading(page, "adapter-table", "cosine")
    for direction in ("descending", "ascending"):
        cosine.locator("button").click()
        expect(cosine).to_have_attribute("aria-sort", direction)
        assert column(page, "adapter-table", 0)[-1] == "empty"


def test_tables_filter(visit: Callable[..., Any], large_page: Path) -> None:
    page = visit(large_page)
    box = page.get_by_label("Filter adapters")
    count = page.locator("#adapter-table-count")
    expect(count).to_have_text(f"{LARGE} of {LARGE}")
    box.fill("A1")
    expect(count).not_to_have_text(f"{LARGE} of {LARGE}")
    shown = column(page, "adapter-table", 0)
    assert count.inner_text() == f"{len(shown)} of {LARGE}" and {f"a1{i}" for i in range(10)} <= set(shown)
    box.fill("")
    expect(count).to_have_text(f"{LARGE} of {LARGE}")
    page.get_by_label("Family").select_option("2")
    expect(count).to_have_text(f"{LARGE // 4} of {LARGE}")
    families = column(page, "adapter-table", 1)
    assert len(families) == LARGE // 4 and set(families) == {"2"}
    box.fill("nobody")
    expect(count).to_have_text(f"0 of {LARGE}")


def test_only_odd_adapters(visit: Callable[..., Any], hostile_page: Path) -> None:
    page = visit(hostile_page)
    count = page.locator("#adapter-table-count")
    expect(count).to_have_text("6 of 6")
    page.get_by_label("with oddities only").check()
    expect(count).not_to_have_text("6 of 6")
    shown = column(page, "adapter-table", 0)
    assert "empty" in shown and all(column(page, "adapter-table", 9))


def test_the_heat_map_is_drawn_and_zooms(visit: Callable[..., Any], large_page: Path) -> None:
    page = visit(large_page)
    canvas = page.locator("#heat-map")
    whole = pixels(page)
    assert colours(whole) > 20 and whole.float().std() > 10
    # Families of fifteen in the order of the tree: squares of strong colour on the diagonal, pale elsewhere.
    expect(canvas).to_have_attribute("data-cells", f"{LARGE}.00")
    page.get_by_role("button", name="Zoom in").click()
    expect(canvas).to_have_attribute("data-cells", f"{LARGE / 2:.2f}")
    assert not torch.equal(pixels(page), whole)
    page.get_by_role("button", name="Zoom out").click()
    expect(canvas).to_have_attribute("data-cells", f"{LARGE}.00")
    for _ in range(2):
        page.get_by_role("button", name="Zoom in").click()
    expect(canvas).to_have_attribute("data-cells", f"{LARGE / 4:.2f}")
    page.get_by_role("button", name="All").click()
    expect(canvas).to_have_attribute("data-cells", f"{LARGE}.00")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 200)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -400)
    page.keyboard.up("Control")
    until(lambda: float(canvas.get_attribute("data-cells")) < 40)
    page.locator("#heat-find").fill("a42")
    page.locator("#heat-find").press("Tab")
    expect(page.locator("#heat-told")).to_contain_text("a42 with itself: cosine 1.000")
    page.locator("#heat-find").fill("nobody")
    page.locator("#heat-find").press("Tab")
    expect(page.locator("#heat-told")).to_contain_text("No adapter is called nobody")


def test_dragging_moves_the_heat_map(visit: Callable[..., Any], large_page: Path) -> None:
    page = visit(large_page)
    canvas = page.locator("#heat-map")
    canvas.scroll_into_view_if_needed()
    for _ in range(2):
        page.get_by_role("button", name="Zoom in").click()
    expect(canvas).to_have_attribute("data-cells", f"{LARGE / 4:.2f}")
    canvas.focus()  # the cell under the pointer is not marked then, so that only the dragging changes the picture
    before, box = pixels(page), canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + 100
    page.mouse.move(x, y)
    page.evaluate(FRAMES)
    assert torch.equal(pixels(page), before)
    page.mouse.down()
    page.mouse.move(x - 200, y - 60, steps=4)
    page.mouse.up()
    until(lambda: not torch.equal(pixels(page), before))


def test_both_measures_and_orders(visit: Callable[..., Any], large_page: Path) -> None:
    page = visit(large_page)
    seen = [pixels(page)]
    for box, value in (("Show", "subspace"), ("Order", "given"), ("Order", "norm"), ("Colours up to", "one")):
        page.get_by_label(box).select_option(value)
        until(lambda: not torch.equal(pixels(page), seen[-1]))
        seen.append(pixels(page))
        assert colours(seen[-1]) > 5


def test_it_is_used_by_keyboard(visit: Callable[..., Any], large_page: Path) -> None:
    page = visit(large_page)
    canvas, cards = page.locator("#heat-map"), page.locator(".card")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    canvas.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Shift+ArrowRight")
    expect(canvas).to_have_attribute("data-at", "1,11")
    page.keyboard.press("+")
    expect(canvas).to_have_attribute("data-cells", f"{LARGE / 2:.2f}")
    page.keyboard.press("End")
    page.keyboard.press("PageDown")
    expect(canvas).to_have_attribute("data-at", f"{LARGE - 1},{LARGE - 1}")
    page.keyboard.press("0")
    page.keyboard.press("ArrowLeft")
    expect(canvas).to_have_attribute("data-at", f"{LARGE - 1},{LARGE - 2}")
    there = cards.count()
    page.keyboard.press("Enter")
    expect(cards).to_have_count(there + 2)
    expect(page.locator(".card:focus")).to_have_count(1)
    stop = "e => { const last = window.last; window.last = e; return e !== last }"
    for _ in range(40):  # every stop on the way has a name
        page.keyboard.press("Tab")
        until(lambda: page.evaluate(f"({stop})(document.activeElement)"))
        named = "e => e.ariaLabel || e.getAttribute('aria-labelledby') || e.innerText || e.labels?.length"
        assert page.evaluate(f"({named})(document.activeElement)")


def test_cards_and_decompositions_open(visit: Callable[..., Any], large_page: Path) -> None:
    page = visit(large_page)
    page.locator("#adapter-table").get_by_role("button", name="a17", exact=True).first.click()
    card = page.locator("#card-17")
    expect(card).to_be_focused()
    assert card.locator("svg").count() > 3 and "a17" in card.inner_text()
    card.get_by_text("All modules").click()
    expect(card.locator("details table tbody tr")).to_have_count(len(MODULES))
    card.get_by_role("button", name="Close the card of a17").click()
    expect(card).to_have_count(0)
    row = page.locator("#report-table tbody tr").nth(3).locator("button")
    title = row.inner_text()
    row.click()
    expect(page.locator("#report h3")).to_have_text(title)
    expect(page.locator("#report table tbody tr")).to_have_count(len(MODULES))


def test_dark_is_dark_and_paper_is_white(visit: Callable[..., Any], large_page: Path) -> None:
    light, dark = (visit(large_page, color_scheme=scheme) for scheme in ("light", "dark"))
    for selector in ("body", "#heat-map", ".card >> nth=0"):
        bright, dim = (pixels(page, selector, seen=True).float().mean() for page in (light, dark))
        assert bright > 150 > 110 > dim, selector
    dark.emulate_media(media="print")
    until(lambda: bool(pixels(dark).float().mean() > 150))
    expect(dark.locator("nav")).to_be_hidden()
    expect(dark.locator("#adapter-table tbody tr").last).to_be_visible()
    pdf = dark.pdf()
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000


def test_a_narrow_screen(visit: Callable[..., Any], large_page: Path) -> None:
    page = visit(large_page, viewport={"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_without_scripts_there_are_tables(browser: Any, large_page: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    context.set_default_timeout(1000 * PATIENCE)
    page = context.new_page()
    page.goto(large_page.as_uri())
    assert page.locator("#adapter-table tbody tr").count() == LARGE
    assert page.get_by_text("Scripts are off").is_visible() and page.locator("#heat").is_hidden()
    context.close()
