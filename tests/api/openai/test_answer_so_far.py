"""A stream that goes on at another replica has the events of one that never stopped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml

from ladderstitch.api.openai.event_marks import (
    ANSWER_HEADER,
    MARK,
    AnswerName,
    EventMark,
    split_mark,
)
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.messages import Step, StepOutput
from tests.api.openai.served_model import SECRET, ServedModel
from tests.support.language_models import END, write_tiny
from tests.system.api.openai_model import HERMES
from tests.text.scheduler.test_continued_sequences import FixedLogits

NAME = AnswerName("0123456789abcdef" * 2, 1_700_000_000)
CHAT, COMPLETION, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = [{"role": "user", "content": "x"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
USAGE = {"stream_options": {"include_usage": True}}
SAMPLED = {"temperature": 1.2, "seed": 4}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (COMPLETION, {"prompt": "x", "max_tokens": 12} | USAGE),
    (COMPLETION, {"prompt": "x", "max_tokens": 9, "echo": True, "logprobs": 2} | SAMPLED),
    (CHAT, {"messages": MESSAGES, "max_tokens": 12, "logprobs": True} | SAMPLED | USAGE),
    (CHAT, {"messages": MESSAGES, "max_tokens": 25, "tools": [TOOL], "tool_choice": "required"}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 20, "response_format": FORMAT}),
    (RESPONSE, {"input": "x", "max_output_tokens": 8}),
]
Event = tuple[EventMark | None, Any]


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[ServedModel]:
    path = write_tiny(tmp_path / "tiny")
    manifest = yaml.safe_load((path / "model.yaml").read_text())
    (path / "model.yaml").write_text(yaml.safe_dump(manifest | {"chat_template": HERMES}))
    served = ServedModel(TextBundle.load(path))
    served.scheduler.steps.run = FixedLogits().run  # type: ignore[method-assign]
    served.scheduler.end_tokens = frozenset({END})
    yield served
    await served.scheduler.close()


async def post(
    served: ServedModel, path: str, body: dict[str, Any], headers: dict[str, str]
) -> httpx.Response:
    """Return the response to a greedy stream's request."""
    given = {"authorization": f"Bearer {SECRET}"} | headers
    transport = httpx.ASGITransport(served.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        fields = {"model": "tiny", "temperature": 0, "stream": True} | body
        return await client.post(path, json=fields, headers=given)


async def stream(
    served: ServedModel, path: str, body: dict[str, Any], known: list[int] | None = None
) -> list[Event]:
    """Return the events of a stream that a gateway named; the caller has the `known` tokens."""
    if known:
        body = body | {"answer_so_far": {"token_ids": known, "first_token_us": 7000}}
    headers = {ANSWER_HEADER: str(NAME), "x-ladderstitch-held-us": "5000000"}
    response = await post(served, path, body, headers)
    assert response.status_code == 200, response.text
    assert response.headers[ANSWER_HEADER] == str(NAME)
    *events, rest = response.content.split(b"\n\n")
    assert rest == b""
    return [read_event(event, is_rest=bool(known)) for event in events]


def read_event(event: bytes, *, is_rest: bool) -> Event:
    """Return the mark and the content of an event, without what is measured."""
    mark, unmarked = split_mark(event)
    data = unmarked[unmarked.index(b"data: ") + 6 :]
    if data == b"[DONE]":
        return mark, "done"
    content = json.loads(data, object_hook=without_varying)
    measured = content.pop("ladderstitch", None)
    if measured is not None and is_rest:
        assert measured["first_token_ms"] == 7
        assert measured["total_ms"] >= 5000
    return mark, content


def without_varying(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields without the random id of a call of a tool and what was in the cache."""
    varying = {"cached_tokens"} | ({"id"} if "function" in fields else set())
    return {name: value for name, value in fields.items() if name not in varying}


@pytest.mark.parametrize("number", range(len(REQUESTS)))
async def test_rest_of_a_stream_has_its_events(served: ServedModel, number: int) -> None:
    path, body = REQUESTS[number]
    whole = await stream(served, path, body)
    marks = [mark for mark, _ in whole if mark is not None]
    assert [mark.index for mark in marks] == list(range(len(marks)))
    assert [mark.status for mark in marks] == [None] * (len(marks) - 1) + ["OK"]
    assert len(marks) > 4
    for known in range(1, len(marks)):
        tokens = [mark.token for mark in marks[:known] if mark.token is not None]
        rest = await stream(served, path, body, tokens)
        begin = next(n for n, (mark, _) in enumerate(whole) if mark == marks[known])
        assert rest == whole[begin:], known


async def test_stop_text_across_the_cut_ends_the_answer(served: ServedModel) -> None:
    body = {"prompt": "x", "max_tokens": 40} | SAMPLED
    text = text_of(await stream(served, COMPLETION, body))
    stop = text[len(text) // 2 :][:3]
    body["stop"] = stop
    whole = await stream(served, COMPLETION, body)
    assert text_of(whole) == text[: text.index(stop)]
    tokens = [mark.token for mark, _ in whole if mark is not None]
    for known in range(1, len(tokens)):
        rest = await stream(served, COMPLETION, body, tokens[:known])
        assert rest == whole[known:], known


def text_of(events: list[Event]) -> str:
    """Return the text of a completion."""
    return "".join(content["choices"][0]["text"] for _, content in events if content != "done")


async def test_streams_of_other_callers_have_no_marks(served: ServedModel) -> None:
    body = {"prompt": "x", "max_tokens": 3}
    plain = await post(served, COMPLETION, body, {})
    several = await post(served, COMPLETION, body | {"n": 2}, {ANSWER_HEADER: str(NAME)})
    for response in (plain, several):
        assert ANSWER_HEADER not in response.headers
        assert MARK.strip() not in response.content
        assert response.content.endswith(b"data: [DONE]\n\n")


async def test_error_of_a_named_stream_has_its_status(served: ServedModel) -> None:
    headers = {ANSWER_HEADER: str(NAME), "x-deadline-ms": "400"}
    body = {"prompt": "x", "max_tokens": 100, "ignore_eos": True}
    served.scheduler.steps.run = SlowLogits().run  # type: ignore[method-assign]
    response = await post(served, COMPLETION, body, headers)
    *_, (mark, content) = [
        read_event(event, is_rest=False) for event in response.content.split(b"\n\n")[:-1]
    ]
    assert mark == EventMark(status="DEADLINE_EXCEEDED")
    assert content["error"]["code"] == "EXPIRED_IN_COMPUTE"


class SlowLogits(FixedLogits):
    """Steps of which only the first ones end before a deadline."""

    async def run(self, step: Step) -> StepOutput:
        """Return the output of a step; from the fourth token on, wait for ever."""
        if step.inputs[0].start > 3:
            await asyncio.Event().wait()
        return await super().run(step)


@pytest.mark.parametrize(
    ("headers", "fields", "named"),
    [
        ({ANSWER_HEADER: "x"}, {}, f"{ANSWER_HEADER}: expected 32 hexadecimal digits"),
        ({"x-ladderstitch-held-us": "-1"}, {}, "x-ladderstitch-held-us: expected 0 to"),
        ({}, {"answer_so_far": {"token_ids": []}}, "answer_so_far.token_ids"),
        ({}, {"answer_so_far": {"token_ids": [1, 2, 3]}}, "answer_so_far: expected fewer than"),
        ({}, {"answer_so_far": {"token_ids": [999]}}, "answer_so_far: expected tokens 0 to"),
        ({}, {"answer_so_far": {"token_ids": [1]}, "n": 2}, "answer_so_far: expected the stream"),
        (
            {},
            {"answer_so_far": {"token_ids": [1]}, "stream": False},
            "answer_so_far: expected the stream",
        ),
        (
            {},
            {"answer_so_far": {"token_ids": [1], "first_token_us": 0}},
            "answer_so_far.first_token_us: expected 1 to",
        ),
    ],
)
async def test_wrong_beginnings_are_refused(
    served: ServedModel, headers: dict[str, str], fields: dict[str, Any], named: str
) -> None:
    response = await post(served, COMPLETION, {"prompt": "x", "max_tokens": 3} | fields, headers)
    assert response.status_code == 400
    assert named in response.json()["error"]["message"]
    served.scheduler.assert_empty()
