"""Connections to the server of /metrics that are idle, slow or too many."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.request import urlopen

import pytest

from ladderstitch.telemetry import metrics_server
from ladderstitch.telemetry.metrics import Metrics

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
