"""The server of the metrics port: its pages, and connections that are idle, slow or too many."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from http.client import HTTPConnection
from urllib.request import urlopen

import pytest

import ladderstitch
from ladderstitch.telemetry import metrics_server
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.metrics_server import Probes

LIMIT_S = 300


@pytest.fixture
def port() -> Iterator[int]:
    port, close = Metrics().expose(0, "127.0.0.1")
    yield port
    close()


def connect(port: int, sent: bytes) -> socket.socket:
    """Return a connection that has sent some bytes."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S)
    connection.sendall(sent)
    return connection


def scrape(port: int) -> bytes:
    """Return the page of the metrics."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT_S) as reply:
        page: bytes = reply.read()
    return page


@pytest.mark.parametrize("sent", [b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nhost: x\r\n"])
def test_slow_connections_end_at_their_time_limit(
    port: int, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(metrics_server, "CONNECTION_TIMEOUT_S", 0.3)
    with connect(port, sent) as slow:
        assert b"ladderstitch" not in slow.recv(4096)  # it returns when the server has closed
    assert b"ladderstitch" in scrape(port)


@pytest.mark.parametrize("sent", [b"", b"GET /metr"])
def test_many_open_connections_leave_room_for_a_scrape(port: int, sent: bytes) -> None:
    slow = [connect(port, sent) for _ in range(metrics_server.MAX_CONNECTIONS + 8)]
    assert b"ladderstitch" in scrape(port)
    assert b"ladderstitch" not in slow[0].recv(4096)  # the oldest one was closed
    for connection in slow:
        connection.close()


def ask(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    """Return the status and the body of a page."""
    connection = HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    connection.request(method, path)
    reply = connection.getresponse()
    body = reply.read().decode()
    connection.close()
    return reply.status, body


def test_only_known_paths_and_methods_are_answered(port: int) -> None:
    assert ask(port, "/metrics/")[0] == 200
    assert ask(port, "/metrics", "HEAD") == (200, "")
    assert ask(port, "/healthz") == (200, "ok\n")
    assert ask(port, "/readyz") == (200, "ok\n")
    for path in ("/", "/livez", "/metrics/x", "/favicon.ico"):
        status, body = ask(port, path)
        assert status == 404
        assert "/metrics, /healthz, /readyz" in body
    assert ask(port, "/metrics", "POST")[0] == 405


def test_probes_report_why_not() -> None:
    reasons = {"alive": "", "ready": "the replica is loading its models"}
    probes = Probes(lambda: reasons["alive"], lambda: reasons["ready"])
    port, close = Metrics().expose(0, "127.0.0.1", probes=probes)
    assert ask(port, "/healthz") == (200, "ok\n")
    assert ask(port, "/readyz") == (503, "the replica is loading its models\n")
    reasons.update(alive="the event loop has been held for 11 s", ready="")
    assert ask(port, "/healthz") == (503, "the event loop has been held for 11 s\n")
    assert ask(port, "/readyz") == (200, "ok\n")
    close()


def test_page_has_the_build_and_no_times_of_creation(port: int) -> None:
    page = scrape(port).decode()
    assert "_created" not in page
    version = ladderstitch.__version__
    assert f'version="{version}"}} 1.0' in page
    assert 'process_cpu_seconds_total{process="replica"}' in page
