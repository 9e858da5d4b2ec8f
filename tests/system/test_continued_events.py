"""Streams of events of real replicas behind a gateway go on when one replica is killed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.gateway import Gateway
from ladderstitch.gateway.replica_pool import Discovery
from tests.support.servers import RunningServer, start_server, stop_server
from tests.system.api.openai_model import write_tool_bundle

NUM_TOKENS = 300
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
RESPONSE = "/v1/responses"
COMMON: dict[str, Any] = {
    "model": "tiny",
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
}
LONG = COMMON | {"max_tokens": NUM_TOKENS, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "a prompt of bytes"}]
TOOL = {"type": "function", "function": {"name": "weigh", "parameters": {"type": "object"}}}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": (COMPLETION, LONG | {"prompt": "a prompt"}),
    "chat": (CHAT, LONG | {"messages": MESSAGES}),
    "sampled": (CHAT, LONG | {"messages": MESSAGES, "temperature": 1, "seed": 3}),
    "logprobs": (COMPLETION, LONG | {"prompt": "a prompt", "logprobs": 1, "echo": True}),
    "tools": (CHAT, LONG | {"messages": MESSAGES, "tools": [TOOL], "logprobs": True}),
    "json": (CHAT, LONG | {"messages": MESSAGES, "response_format": {"type": "json_object"}}),
    "response": (RESPONSE, COMMON | {"input": "a prompt", "max_output_tokens": NUM_TOKENS}),
}
VARYING = {"id", "item_id", "created", "created_at", "ladderstitch", "cached_tokens"}
"""Fields that differ between two answers to one request: names, times, what was in the cache."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tool_bundle(tmp_path_factory.mktemp("continued") / "tiny")


@pytest.fixture
def replicas(bundle: Path, tmp_path: Path) -> Iterator[list[RunningServer]]:
    flags = ("--http-port", "0")
    servers = [start_server(bundle, tmp_path / f"log{number}", *flags) for number in range(2)]
    yield servers
    for server in servers:
        if server.process.poll() is None:
            assert stop_server(server) == 0
        elif server.process.stdout is not None:
            server.process.stdout.close()


@asynccontextmanager
async def gateway_of(replicas: list[RunningServer]) -> AsyncIterator[str]:
    """Run a gateway in front of the replicas; yields the URL of its HTTP port."""

    async def discover() -> Discovery:
        yield frozenset(server.address for server in replicas)

    config = GatewayConfig(port=0, metrics_port=0, http_port=0, drain_announce_s=0.0)
    front = Gateway(config, discover())
    await front.start()
    try:
        async with asyncio.timeout(60):
            while len(front.pool.serving) < len(replicas):
                await front.pool.wait_for_change(0.1)
        assert front.http is not None
        yield f"http://127.0.0.1:{front.http.port}"
    finally:
        await front.stop()


async def ask(url: str, name: str, begun: asyncio.Event | None = None) -> list[bytes]:
    """Return the events of the answer to a request; set `begun` after a few."""
    path, body = REQUESTS[name]
    received = b""
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as response:
        assert response.status == 200, await response.text()
        assert "x-ladderstitch-answer" not in response.headers
        async for part in response.content.iter_any():
            received += part
            if begun is not None and received.count(b"\n\n") >= 8:
                begun.set()
    *events, rest = received.split(b"\n\n")
    assert rest == b""
    return events


def without_varying(value: Any) -> Any:
    """Return a JSON value without the fields that two answers to one request do not share."""
    if isinstance(value, dict):
        return {k: without_varying(v) for k, v in value.items() if k not in VARYING}
    return [without_varying(v) for v in value] if isinstance(value, list) else value


def bodies(events: list[bytes]) -> list[dict[str, Any]]:
    """Return the JSON of events; [DONE] has none."""
    data = [event[event.index(b"data: ") + 6 :] for event in events]
    return [json.loads(text) for text in data if text != b"[DONE]"]


async def test_killed_replica_loses_and_repeats_no_event(replicas: list[RunningServer]) -> None:
    direct = replicas[1].http.removesuffix("/v1")
    expected = {name: await ask(direct, name) for name in REQUESTS}
    async with gateway_of(replicas) as url:
        events = {name: asyncio.Event() for name in REQUESTS for _ in range(2)}
        calls = {
            (name, number): asyncio.create_task(ask(url, name, events[name] if number else None))
            for name in REQUESTS
            for number in range(2)
        }
        for event in events.values():
            await event.wait()
        replicas[0].process.kill()
        answers = {key: await call for key, call in calls.items()}
    continued = 0
    for (name, _), answer in answers.items():
        parsed = bodies(answer)
        assert without_varying(parsed) == without_varying(bodies(expected[name])), name
        assert (answer[-1] == b"data: [DONE]") == (name != "response")
        if name == "response":
            ids = {body["item_id"] for body in parsed if "item_id" in body}
            assert parsed[0]["response"]["id"] == parsed[-1]["response"]["id"]
        else:
            ids = {(body["id"], body["created"]) for body in parsed}
            spans = parsed[-1]["ladderstitch"]["spans"]
            usage = parsed[-1]["usage"]
            continued += sum(span["tokens"] for span in spans) < usage["completion_tokens"]
        assert len(ids) == 1
    assert continued >= 3, "too few streams were at the replica that was killed"
