"""Headers of the Gateway API's inference extension change no answer, over HTTP and gRPC.

Names: gateway-api-inference-extension, `pkg/epp/metadata` and the endpoint picker's protocol.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from ladderstitch.v1 import generation_pb2, generation_pb2_grpc
from tests.support.language_models import write_tiny
from tests.support.servers import RunningServer, start_server, stop_server

HEADERS = {
    "x-gateway-inference-objective": "batch",
    "x-gateway-inference-fairness-id": "tenant-7",
    "x-gateway-model-name": "another",
    "x-gateway-model-name-rewrite": "another-v2",
    "x-gateway-destination-endpoint": "10.0.0.9:8081,10.0.0.8:8081",
    "x-gateway-destination-endpoint-subset": "10.0.0.9:8081",
    "x-gateway-destination-endpoint-served": "10.0.0.9:8081",
}


@pytest.fixture(scope="module")
def text_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("headers")
    running = start_server(write_tiny(folder / "tiny"), folder / "log", "--http-port", "0")
    yield running
    assert stop_server(running) == 0
    assert "Traceback" not in running.log.read_text()


def complete(server: RunningServer, headers: dict[str, str]) -> Any:
    """Return the answer of a completion over HTTP, without its id and time."""
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 5, "temperature": 0}
    request = urllib.request.Request(
        f"{server.http}/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"} | headers,
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"]


def test_http_answers_are_the_same_with_the_headers(text_server: RunningServer) -> None:
    assert complete(text_server, HEADERS) == complete(text_server, {})


def test_grpc_answers_are_the_same_with_the_headers(text_server: RunningServer) -> None:
    request = generation_pb2.GenerateRequest(model_name="tiny", text="abc", max_tokens=5)
    with grpc.insecure_channel(text_server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        texts = [
            "".join(part.text for part in stub.Generate(request, metadata=given, timeout=300))
            for given in ((), tuple(HEADERS.items()))
        ]
    assert texts[0] == texts[1]
