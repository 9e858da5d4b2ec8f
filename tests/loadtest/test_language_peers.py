"""Tests of how `language-peers` reads streamed answers, against a server of the test."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from ladderstitch_loadtest.benchmarks.language_peers import long_prompt, measure_server, stream
from ladderstitch_loadtest.servers.peer_packages import PeerError
from ladderstitch_loadtest.servers.processes import StartError, port_server


@contextmanager
def openai_server(status: int = 200, *, usage: bool = True) -> Iterator[str]:
    """Answer each completion with as many chunks as it asks for; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["model"] == "m"
            assert body["stream"] is True
            assert body["temperature"] == 0
            self.send_response(status)
            self.end_headers()
            for _ in range(body["max_tokens"]):
                self._send({"choices": [{"text": "a"}], "usage": None})
            if usage:
                self._send({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
            self.wfile.write(b"data: [DONE]\n\n")

        def _send(self, chunk: dict[str, object]) -> None:
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_stream_counts_tokens_and_times_the_first_one() -> None:
    with openai_server() as address:
        found = stream(address, "m", "a", 7)
    assert found.tokens == 7
    assert 0 < found.first_s <= found.last_s


def test_measure_server_reports_every_quantity() -> None:
    with openai_server() as address:
        found = measure_server(address, "m", 1)
    assert list(found) == [
        "one stream, tokens/s",
        "first token of a long prompt, ms",
        "8 streams, tokens/s",
    ]
    assert all(value > 0 for value in found.values())


def test_failed_answers_are_errors() -> None:
    with openai_server(status=503) as address, pytest.raises(PeerError, match="status 503"):
        stream(address, "m", "a", 3)
    with openai_server(usage=False) as address, pytest.raises(PeerError, match="number of tokens"):
        stream(address, "m", "a", 3)


def test_a_server_that_does_not_start_is_reported_with_its_log() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(StartError, match="no such model"), port_server(command):
        pass


def test_long_prompts_share_no_beginning() -> None:
    prompts = [long_prompt(number) for number in range(12)]
    assert len({prompt.split()[0] for prompt in prompts}) == 12
    assert all(len(prompt.split()) == 481 for prompt in prompts)
