"""Time the quick start of the README after the install: ready, first answer, page open.

Run it in a fresh clone, with the Python of its `.venv`. The first start has an empty cache, so that
it measures the machine, as on a new one; the second start finds what the first one has left. The
commands are those of the README: `make serve` runs `ladderstitch serve`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from page_pictures import open_browser
from playwright.sync_api import expect

from ladderstitch.runtime.cache import CACHE_VARIABLE
from ladderstitch_loadtest.servers.results_io import write

ROOT = Path(__file__).resolve().parents[1]
LADDERSTITCH = str(Path(sys.executable).with_name("ladderstitch"))
PORTS = {"port": 8001, "metrics-port": 9464, "http-port": 8081}
DRAWN = "document.querySelector('#chart canvas') !== null"
LIMIT_S = 300.0


def time_start(ports: dict[str, int], cache: Path) -> dict[str, float]:
    """Start the server, classify the examples, open the page; return seconds since the start."""
    environment = os.environ | {CACHE_VARIABLE: str(cache)}
    flags = [f"--{name}={port}" for name, port in ports.items()]
    images = sorted(map(str, (ROOT / "examples/fashion-mnist/images").glob("*.png")))
    address = ["--address", f"127.0.0.1:{ports['port']}"]
    started = time.monotonic()
    server = subprocess.Popen(
        [LADDERSTITCH, "serve", *flags], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        assert line.startswith("ready"), line
        found = {"ready_s": time.monotonic() - started}
        predict = [LADDERSTITCH, "predict", *images, "--budget", "5ms", *address]
        subprocess.run(predict, check=True, stdout=subprocess.DEVNULL, timeout=LIMIT_S)
        found["answered_s"] = time.monotonic() - started
        with open_browser() as browser:
            opened = time.monotonic()
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{ports['http-port']}/")
            expect(page.locator("#state")).to_have_text("serving")
            page.wait_for_function(DRAWN)
            found["page_s"] = time.monotonic() - opened
            found["page_open_s"] = time.monotonic() - started
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(LIMIT_S)
    return {name: round(seconds, 2) for name, seconds in found.items()}


def main() -> None:
    """Time a first and a second start, and write both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, port in PORTS.items():
        parser.add_argument(f"--{name}", type=int, default=port)
    parser.add_argument("--out", type=Path, help="folder for fresh-start.json")
    options = parser.parse_args()
    ports = {name: getattr(options, name.replace("-", "_")) for name in PORTS}
    with tempfile.TemporaryDirectory() as cache:
        starts = {name: time_start(ports, Path(cache)) for name in ("first", "second")}
    write(options.out, "fresh-start", {"limit_s": 60.0, "starts": starts})


if __name__ == "__main__":
    main()
