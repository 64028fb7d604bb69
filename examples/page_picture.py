"""The picture of a page in the README: that of the example adapters, as Chromium shows it.

python examples/page_picture.py --out docs/page.png
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import fastlora as fl

ADAPTERS = Path(__file__).parent / "adapters"
NAMES = ["movie_a", "movie_b", "spam", "trec_r16", "trec_rslora"]
WIDTH, HEIGHT = 1180, 1000
COLOURS = 64  # of the picture: it is small then, and text stays sharp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/page.png"), help="the picture to write")
    out: Path = parser.parse_args().out
    pool = fl.Pool.load([ADAPTERS / name for name in NAMES])
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page_file = fl.report(pool, Path(folder) / "page.html")
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(page_file.as_uri())
        shot = page.screenshot()
        browser.close()
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(COLOURS).save(out, optimize=True)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
