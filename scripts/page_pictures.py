"""Take the pictures of the page in the docs, of a desktop and of a phone; needs Chromium.

A server with the embedded model is started on free ports. The slider moves over the budgets for
`SECONDS`, so that the chart and the figures show answers of all kinds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from playwright.sync_api import Browser, Page, expect, sync_playwright

from ladderstitch.bundles import EMBEDDED
from tests.support.servers import start_server, stop_server

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
SECONDS, PAUSE_MS = 75.0, 250.0
PLACES, SHOWN = range(220, 401, 20), 310
"""Places of the slider, 0 to 400, whose equal steps are equal ratios; and that of the pictures."""
LIMIT_MS = 60_000.0
SCREENS: dict[str, dict[str, Any]] = {
    "page.png": {"viewport": {"width": 1280, "height": 1050}},
    "page-phone.png": {"viewport": {"width": 390, "height": 1475}, "device_scale_factor": 2},
}
"""The sizes of the pictures, in the pixels of a style sheet; that of the phone ends with a card."""


def move_for(page: Page, seconds: float) -> None:
    """Move the slider over the places, with another image at each of them."""
    end = time.monotonic() + seconds
    examples, slider = page.locator("input[name=image]"), page.locator("#budget")
    for number, place in enumerate(itertools.cycle(PLACES)):
        examples.nth(number % examples.count()).check(force=True)
        slider.fill(str(place))
        page.wait_for_timeout(PAUSE_MS)
        if time.monotonic() > end:
            break
    slider.fill(str(SHOWN))


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """Yield the Chromium of this machine, without a window."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise SystemExit(f"expected a browser, one of {', '.join(BROWSERS)}, got none")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def take_pictures(url: str, folder: Path, seconds: float) -> None:
    """Write the pictures of the page at this address into a folder."""
    with open_browser() as browser:
        for number, (name, screen) in enumerate(SCREENS.items()):
            with browser.new_context(**screen) as context:
                page = context.new_page()
                page.set_default_timeout(LIMIT_MS)
                page.goto(url)
                expect(page.locator("#state")).to_have_text("serving")
                move_for(page, seconds if number == 0 else seconds / 5)
                expect(page.locator("#stitch")).to_be_visible()
                page.locator("#budget").blur()
                page.wait_for_timeout(1500)  # the figures are asked for once a second
                page.screenshot(path=folder / name)


def main() -> None:
    """Run the server, and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--into", type=Path, default=IMAGES, help="folder of the pictures")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long answers are asked")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = start_server(EMBEDDED, Path(folder) / "log", "--http-port", "0")
        try:
            take_pictures(server.http.removesuffix("/v1") + "/", options.into, options.seconds)
        finally:
            stop_server(server)


if __name__ == "__main__":
    main()
