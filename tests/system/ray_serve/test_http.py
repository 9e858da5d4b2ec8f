"""HTTP through the gateways of `serve --replicas 2` on Ray: answers, streams, the page, metrics."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.servers import RunningServer, start_server, stop_server
from tests.system.api.openai_model import write_tool_bundle

FLAGS = ("--ray", "--replicas", "2", "--http-port", "0")


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("ray-http")
    running = start_server(write_tool_bundle(folder / "tiny"), folder / "log", *FLAGS)
    yield running
    assert stop_server(running) == 0


def call(deployed: RunningServer, path: str, body: Any = None, **headers: str) -> bytes:
    """Return the body of the response to a request."""
    url = deployed.http.removesuffix("/v1") + path
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"} | headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        found: bytes = response.read()
    return found


def test_gateways_forward_http_to_replicas_on_ray(deployed: RunningServer) -> None:
    assert json.loads(call(deployed, "/health")) == {"serving": True}
    (model,) = json.loads(call(deployed, "/v1/models"))["data"]
    assert model["id"] == "tiny"
    asked = {"model": "tiny", "prompt": "a prompt", "max_tokens": 9, "temperature": 0}
    whole = json.loads(call(deployed, "/v1/completions", asked))["choices"][0]["text"]
    streamed = call(deployed, "/v1/completions", asked | {"stream": True})
    *events, done, rest = streamed.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    parts = [json.loads(event.removeprefix(b"data: "))["choices"][0] for event in events]
    assert "".join(part["text"] for part in parts) == whole
    assert b"<html" in call(deployed, "/")
    assert json.loads(call(deployed, "/v1/page/models"))["models"][0]["name"] == "tiny"


def test_gateways_on_ray_refuse_foreign_names(deployed: RunningServer) -> None:
    with pytest.raises(urllib.error.HTTPError) as failure:
        call(deployed, "/v1/models", host="evil.example")
    with failure.value as refused:
        assert refused.code == 421
