"""The JSON API of the page: models, example images, predictions and live figures."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from ladderstitch.api.page.models import describe_models
from ladderstitch.api.page.predict import MAX_IMAGE_BYTES
from ladderstitch.scheduling.requests import Deadlines, Request
from tests.api.openai.served_model import ServedModel, write_chat_bundle
from tests.api.page.served_page import MODEL, ServedPage, served_page
from tests.support.servers import picture

AMPLE_MS = 600_000.0
IMPOSSIBLE_MS = 0.001


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServedPage]:
    async with served_page(tmp_path_factory.mktemp("page")) as page:
        yield page


async def test_model_is_described_with_the_latencies_of_its_machine(served: ServedPage) -> None:
    answer = await served.get("/v1/page/models")
    assert (answer["replica"], answer["serving"]) == ("replica-7", True)
    (model,) = answer["models"]
    planner = served.model.scheduler.planner
    assert (model["name"], model["kind"]) == ("tiny", "images")
    assert model["frontier"] == list(planner.candidates.frontier)
    assert model["examples"] == ["first-01.png", "second.jpg"]
    assert {v["id"] for v in model["variants"]} == set(served.model.variants)
    profile = planner.latency.profile
    for variant in model["variants"]:
        alone_ms = 1e3 * profile.variants[variant["id"]].median_s[0]
        assert variant["latency_ms"] == pytest.approx(alone_ms)
        assert variant["quality"] == pytest.approx(0.5 + variant["id"] / 100)
        stages = [(s["anchor"], s["first"], s["last"]) for s in variant["stages"]]
        segments = served.model.variants[variant["id"]].segments
        assert stages == [(s.anchor, s.first, s.last) for s in segments]


async def test_answer_states_its_budget_its_stitch_and_its_cost(served: ServedPage) -> None:
    answer = (await served.predict(example="first-01.png", budget_ms=AMPLE_MS)).json()
    assert answer["met"] is True
    assert answer["budget_ms"] == pytest.approx(AMPLE_MS)
    assert answer["variant_id"] == served.model.scheduler.planner.candidates.best
    assert answer["replica"] == "replica-7"
    assert sum(found["probability"] for found in answer["top"]) == pytest.approx(1)
    assert answer["total_ms"] >= answer["queue_ms"] + answer["compute_ms"]


@pytest.mark.parametrize("budget_ms", [0.0145, 0.00333, 1.005, 77.7])
async def test_budget_of_an_answer_is_the_one_that_was_asked(
    served: ServedPage, budget_ms: float
) -> None:
    answer = (await served.predict(example="first-01.png", budget_ms=budget_ms)).json()
    assert answer["budget_ms"] == pytest.approx(budget_ms, rel=1e-3)


async def test_missed_budget_is_answered_late_by_the_fastest_stitch(served: ServedPage) -> None:
    answer = (await served.predict(example="first-01.png", budget_ms=IMPOSSIBLE_MS)).json()
    assert answer["met"] is False
    assert answer["total_ms"] > answer["budget_ms"]
    assert answer["variant_id"] == served.model.scheduler.planner.candidates.frontier[0]


async def test_hard_budget_that_cannot_be_met_is_refused(served: ServedPage) -> None:
    before = (await served.get(f"{MODEL}/figures"))["total"]
    answer = await served.predict(example="first-01.png", budget_ms=IMPOSSIBLE_MS, hard=True)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "BUDGET_INFEASIBLE"
    after = (await served.get(f"{MODEL}/figures"))["total"]
    changes = {field: after[field] - before[field] for field in ("answered", "rejected", "met")}
    assert changes == {"answered": 0, "rejected": 1, "met": 0}


async def test_own_image_gets_the_answer_of_the_same_example(served: ServedPage) -> None:
    example = (await served.predict(example="first-01.png", budget_ms=AMPLE_MS)).json()
    image = base64.b64encode(picture()).decode()
    own = (await served.predict(image=image, budget_ms=AMPLE_MS)).json()
    assert own["top"] == example["top"]
    assert (await served.predict(image=image)).json()["met"] is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "image: expected either example or image"),
        ({"example": "first-01.png", "image": "eA=="}, "image: expected either"),
        ({"example": "../model.yaml"}, "example: expected one of first-01.png"),
        ({"example": "README.md"}, "example: expected one of"),
        ({"image": "no base64"}, "image: expected base64"),
        ({"image": "\u00e9"}, "image: expected base64"),
        ({"image": "eA=="}, "image: expected"),
        ({"image": "A" * (4 * (MAX_IMAGE_BYTES // 3) + 8)}, f"at most {MAX_IMAGE_BYTES} bytes"),
        ({"example": "first-01.png", "budget_ms": -1}, "budget_ms: expected 0.001 to"),
        ({"example": "first-01.png", "budget_ms": "soon"}, "budget_ms: "),
        ({"example": "first-01.png", "hard": True}, "hard: expected budget_ms"),
        ({"example": "first-01.png", "size": 3}, "size: "),
    ],
)
async def test_malformed_request_is_named_and_the_next_one_answered(
    served: ServedPage, fields: dict[str, Any], message: str
) -> None:
    answer = await served.predict(**fields)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert (await served.predict(example="second.jpg")).status_code == 200


async def test_body_above_the_limit_of_the_page_is_not_read(served: ServedPage) -> None:
    answer = await served.predict(image="A" * (2 * MAX_IMAGE_BYTES))
    assert answer.status_code == 413


async def test_unknown_model_and_example_are_named(served: ServedPage) -> None:
    for path in ("/v1/page/models/other/figures", "/v1/page/models/other/examples/a.png"):
        answer = await served.http.get(path)
        assert answer.status_code == 404
        assert "no model 'other'" in answer.json()["error"]["message"]
    assert (await served.http.get(f"{MODEL}/examples/none.png")).status_code == 400


async def test_example_is_the_file_of_the_bundle(served: ServedPage) -> None:
    answer = await served.http.get(f"{MODEL}/examples/second.jpg")
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.content == picture(kind="JPEG")


async def test_figures_count_the_answers_of_all_callers_once(served: ServedPage) -> None:
    before = await served.get(f"{MODEL}/figures")
    now = time.monotonic()
    images = np.zeros((1, 1, 8, 8), np.float32)
    await served.model.scheduler.submit(Request("r", images, now, Deadlines(now + 600)))
    await served.predict(example="first-01.png", budget_ms=IMPOSSIBLE_MS)
    figures = await served.figures_after(before["number"] + 2)
    assert (figures["replica"], figures["queue"]) == ("replica-7", 0)
    total = figures["total"]
    assert total["met"] == before["total"]["met"] + 1
    assert total["missed"] == before["total"]["missed"] + 1
    assert total["attainment"] == pytest.approx(
        total["met"] / (total["met"] + total["missed"]), abs=1e-5
    )
    assert sum(bucket["answered"] for bucket in figures["series"]) == total["answered"]
    assert [answer["met"] for answer in figures["answers"][-2:]] == [True, False]
    best = served.model.scheduler.planner.candidates.best
    assert figures["answers"][-2]["variant_id"] == best


async def test_figures_hold_only_answers_that_the_page_does_not_know(served: ServedPage) -> None:
    first = (await served.get(f"{MODEL}/figures"))["number"] + 1
    for _ in range(3):
        await served.predict(example="first-01.png")
    await served.figures_after(first + 2)

    async def numbers(query: str) -> list[int]:
        answers = (await served.get(f"{MODEL}/figures?{query}"))["answers"]
        return [answer["number"] for answer in answers]

    assert await numbers(f"replica=replica-7&after={first + 1}") == [first + 2]
    others = await numbers(f"replica=replica-8&after={first + 1}")
    assert others[-3:] == [first, first + 1, first + 2], "the number was another replica's"
    answer = await served.http.get(f"{MODEL}/figures?after=-1")
    assert answer.status_code == 400


async def test_text_model_is_described_by_its_paths(tmp_path: Path) -> None:
    text = ServedModel(write_chat_bundle(tmp_path))
    (model,) = describe_models(text.registry)["models"]
    assert (model["kind"], model["name"]) == ("text", "tiny")
    assert model["frontier"] == text.scheduler.candidates.frontier
    times = text.scheduler.times.latency.profile
    latencies = {v["id"]: v["latency_ms"] for v in model["variants"]}
    assert latencies == {v: pytest.approx(1e3 * times.alone_s(v)) for v in times.variants}
    await text.scheduler.close()
