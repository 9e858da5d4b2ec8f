"""The page in a real browser: budgets, stitches, keyboard, phone width, and no other host."""

from __future__ import annotations

import itertools
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ladderstitch.client import Client
from tests.api.page.served_page import SECRET, write_examples
from tests.conftest import make_tiny_bundle
from tests.support.language_models import write_tiny
from tests.support.servers import RunningServer, picture, start_server, stop_server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import Browser, Page, Route, expect, sync_playwright  # noqa: E402

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
LIMIT_MS = 60_000.0
PHONE = {"width": 390, "height": 844}
ALIGNED = """() => {
    const plot = document.querySelector('#chart .u-over').getBoundingClientRect();
    const track = document.getElementById('budget').getBoundingClientRect();
    const [left, right] = [track.left + 12 - plot.left, track.right - 12 - plot.right];
    return plot.width > 200 && Math.abs(left) < 2 && Math.abs(right) < 2;
}"""
"""Whether the centre of the thumb, 24 pixels wide, runs over the width of the plot."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"expected a browser, one of {', '.join(NAMES)}, got none")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("page")
    bundle = make_tiny_bundle(folder / "tiny").path
    write_examples(bundle)
    running = start_server(bundle, folder / "log", "--http-port", "0")
    yield running
    assert stop_server(running) == 0


@pytest.fixture
def page(browser: Browser, server: RunningServer) -> Iterator[Page]:
    with browser.new_context() as context:
        page = context.new_page()
        open_page(page, server)
        yield page


def url_of(server: RunningServer) -> str:
    return server.http.removesuffix("/v1") + "/"


def open_page(page: Page, server: RunningServer) -> None:
    page.set_default_timeout(LIMIT_MS)
    expect.set_options(timeout=LIMIT_MS)
    page.goto(url_of(server))
    expect(page.locator("#app")).to_be_visible()
    expect(page.locator("#state")).to_have_text("serving")


def is_about(shown: str, budget_ms: float) -> bool:
    """Return whether a text such as `1.2 of 3.25 ms` has this budget, in as many digits as fit."""
    found = re.search(r"of ([0-9.]+) ms", shown)
    return found is not None and abs(float(found[1]) - budget_ms) <= 0.1 * budget_ms


def stitch_at(page: Page, key: str) -> str:
    """Move the slider to an end by keyboard; return the stitch of the answer that follows."""
    rows = page.locator("#log tr")
    slider = page.locator("#budget")
    slider.focus()
    page.keyboard.press("ArrowLeft" if key == "End" else "ArrowRight")  # both ends are moves
    page.keyboard.press(key)
    budget_ms = float(page.locator("#budget-value").inner_text().removesuffix(" ms"))
    end = time.monotonic() + 300
    while not is_about(rows.first.locator(".time").inner_text(), budget_ms):
        assert time.monotonic() < end, f"no answer with a budget of {budget_ms} ms"
        page.wait_for_timeout(50)
    return rows.first.locator(".name").inner_text()


def test_moving_the_slider_changes_the_stitch(page: Page) -> None:
    fastest = stitch_at(page, "Home")
    assert fastest == "anchor-0"
    expect(page.locator("#stitch")).to_have_text("Stitch anchor-0")
    end = time.monotonic() + 300
    while stitch_at(page, "End") == fastest:  # the server plans with long times after a slow phase
        assert time.monotonic() < end, "a longer budget is answered by the fastest stitch"
    expect(page.locator("#answer .strip .block").first).to_be_visible()


def test_missed_budget_is_shown_as_missed_in_words_and_by_shape(page: Page) -> None:
    stitch_at(page, "Home")
    expect(page.locator("#answer .badge")).to_have_text("✕ Missed")
    expect(page.locator("#log tr").first.locator(".badge")).to_have_text("✕ Missed")
    expect(page.locator("#attainment-about")).to_have_text(re.compile("missed"))
    expect(page.locator("#status")).to_have_text(re.compile("^Missed"))
    page.locator("#hard").check()
    page.locator("#send").click()
    expect(page.locator("#answer .badge")).to_have_text("✕ Missed: refused")
    expect(page.locator("#log tr").first.locator(".name")).to_have_text("BUDGET_INFEASIBLE")


@pytest.mark.parametrize(
    ("taken", "budget", "shown"),
    [
        (10.04, 10, ["10.04", "10.00"]),
        (10.4, 10, ["10.4", "10.0"]),
        (0.5, 2, ["0.50", "2.0"]),
        (3, 3, ["3.0", "3.0"]),
    ],
)
def test_unequal_times_are_shown_with_unequal_digits(
    page: Page, taken: float, budget: float, shown: list[str]
) -> None:
    pair = page.evaluate(
        "async ([a, b]) => (await import('/page/js/format.js')).plainPair(a, b)", [taken, budget]
    )
    assert pair == shown


def test_page_asks_no_other_host_and_logs_no_error(browser: Browser, server: RunningServer) -> None:
    """Blocked by the content policy, a request to another host would be an error, too."""
    with browser.new_context() as context:
        page, asked, errors = context.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        open_page(page, server)
        stitch_at(page, "End")
        page.locator("summary").click()
        with page.expect_request(re.compile("/figures")):
            pass  # the page asks by itself, every second
        assert len(asked) > 10
        assert [url for url in asked if not url.startswith(url_of(server))] == []
        assert errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_needs_no_horizontal_scrolling(
    browser: Browser, server: RunningServer, scheme: str
) -> None:
    with browser.new_context(viewport=PHONE, color_scheme=scheme) as context:
        page = context.new_page()
        open_page(page, server)
        stitch_at(page, "End")
        page.locator("summary").click()
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        chart = page.locator("#chart").bounding_box()
        assert chart is not None
        assert chart["width"] > 300
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        is_dark = max(map(int, re.findall(r"\d+", ground)[:3])) < 60
        assert is_dark == (scheme == "dark")


def test_image_of_the_user_is_answered(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "own.png"
    file.write_bytes(picture((40, 20)))
    page.locator("#upload").set_input_files(file)
    expect(page.locator("input[value=own]")).to_be_checked()
    expect(page.locator("#stitch")).to_have_text(re.compile("^Stitch "))
    expect(page.locator("#answer .classes li")).to_have_count(3)
    file.write_text("no image")
    page.locator("#upload").set_input_files(file)
    expect(page.locator("#answer")).to_contain_text("own.png: expected a PNG or JPEG image")


def test_page_goes_on_when_its_server_answers_again(page: Page) -> None:
    page.route("**/v1/page/**", lambda route: route.abort())
    expect(page.locator("#state")).to_have_text("no answer")
    page.locator("#send").click()
    expect(page.locator("#answer .badge")).to_have_text("✕ Refused")
    page.unroute_all(behavior="wait")
    expect(page.locator("#state")).to_have_text("serving")
    page.locator("#send").click()
    expect(page.locator("#stitch")).to_be_visible()


def test_model_without_examples_asks_for_an_image(browser: Browser, server: RunningServer) -> None:
    def without_examples(route: Route) -> None:
        response = route.fetch()
        models = [model | {"examples": []} for model in response.json()["models"]]
        route.fulfill(response=response, json=response.json() | {"models": models})

    with browser.new_context() as context:
        page = context.new_page()
        page.route("**/v1/page/models", without_examples)
        open_page(page, server)
        page.locator("#send").click()
        expect(page.locator("#answer")).to_have_text("Choose an image of your own first.")
        page.unroute_all(behavior="wait")


def test_figures_of_several_replicas_are_listed_by_name(page: Page) -> None:
    """A balancer in front of two replicas is imitated: they answer in turn."""
    turns = itertools.cycle(("one", "two"))

    def answer_in_turn(route: Route) -> None:
        response = route.fetch()
        total = {"answered": 4, "rejected": 1, "met": 3, "missed": 1, "longest_queue": 2}
        figures = response.json() | {"replica": next(turns), "queue": 2}
        figures["total"] = total | {"attainment": 0.75, "quality": 0.5}
        route.fulfill(response=response, json=figures)

    page.route("**/figures?*", answer_in_turn)
    replicas = page.locator("#replicas tr")
    expect(replicas.filter(has_text="one")).to_have_text("one75.0 %50.0 %241")
    expect(replicas.filter(has_text="two")).to_have_text("two75.0 %50.0 %241")
    expect(page.locator("#figures-about")).to_contain_text("replicas")
    page.unroute_all(behavior="wait")


def test_thumb_is_below_the_line_that_it_moves(page: Page) -> None:
    """Also after the chart was drawn again for another width or other colours."""
    for width, scheme in ((1280, "light"), (390, "dark"), (800, "light")):
        page.set_viewport_size({"width": width, "height": 844})
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type] # of two literals
        page.wait_for_function(ALIGNED)


def test_every_control_works_by_keyboard_alone(page: Page) -> None:
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        if reached[-1] == "send":
            break
    assert [name for name in ("budget", "image", "upload", "send") if name in reached] == [
        "budget",
        "image",
        "upload",
        "send",
    ]
    page.keyboard.press("Enter")
    expect(page.locator("#log .badge").first).to_be_visible()
    page.locator("input[name=image]:checked").focus()
    page.keyboard.press("ArrowRight")  # another image, which is sent
    expect(page.locator("input[name=image]").nth(1)).to_be_checked()
    expect(page.locator("#log tr")).to_have_count(2)
    for control in page.locator("input, select, textarea, button").all():
        handle = control.evaluate("e => (e.labels?.length ?? 0) + e.textContent.trim().length")
        assert handle, "every control has a name"


def test_answers_of_other_callers_are_counted(page: Page, server: RunningServer) -> None:
    expect(page.locator("#queue-about")).to_contain_text("waiting now")
    before = page.locator("#quality-about").inner_text()
    with Client(server.address) as other:
        other.predict(picture())
    expect(page.locator("#quality-about")).not_to_have_text(before)
    expect(page.locator("#log")).to_have_text("None yet.")


def test_page_asks_for_the_token_and_shows_nothing_without_it(
    browser: Browser, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(yaml.safe_dump({"tokens": [{"name": "user", "token": SECRET}]}))
    tokens.chmod(0o600)
    bundle = write_tiny(tmp_path / "tiny")
    server = start_server(bundle, tmp_path / "log", "--http-port", "0", "--token-file", str(tokens))
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(LIMIT_MS)
        page.goto(url_of(server))
        expect(page.locator("#login")).to_be_visible()
        assert "tiny" not in page.inner_text("body")
        page.locator("#token").fill("wrong-secret-16-letters")
        page.keyboard.press("Enter")
        expect(page.locator("#token-error")).to_contain_text("expected a known token")
        page.locator("#token").fill(SECRET)
        page.keyboard.press("Enter")
        expect(page.locator("#app")).to_be_visible()
        page.locator("#tokens").fill("5")
        page.locator("#send").click()
        expect(page.locator("#log .name").first).to_have_text(re.compile(" 5$"))
        page.locator("#forget").click()
        expect(page.locator("#login")).to_be_visible()
    assert stop_server(server) == 0
