"""Reserved ports: what is taken, by which addresses, and when two processes start at once."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ladderstitch.runtime.process import (
    address_family,
    free_port,
    port_is_free,
    release_ports,
    reserve_port,
)

RACER = """
import sys
from ladderstitch.runtime.process import reserve_port
sys.stdin.readline()
try:
    held = reserve_port("127.0.0.1", int(sys.argv[1]))
    print("held", flush=True)
except OSError as error:
    print(error.strerror, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def port() -> Iterator[int]:
    """Return a port that is reserved on 127.0.0.1."""
    found = free_port("127.0.0.1")
    held = reserve_port("127.0.0.1", found)
    yield found
    release_ports(held)
    assert port_is_free("127.0.0.1", found)


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "0.0.0.0", "::", "[::]"])
def test_overlapping_address_of_a_reserved_port_is_taken(port: int, address: str) -> None:
    assert not port_is_free(address, port)


@pytest.mark.parametrize("address", ["127.0.0.2", "::1", "[::1]"])
def test_other_address_with_a_reserved_port_is_free(port: int, address: str) -> None:
    assert port_is_free(address, port)


def test_reserved_port_lets_only_sharing_servers_listen(port: int) -> None:
    with socket.socket() as sharing, socket.socket() as other:
        for option in (socket.SO_REUSEPORT, socket.SO_REUSEADDR):  # as gRPC does
            sharing.setsockopt(socket.SOL_SOCKET, option, 1)
        sharing.bind(("127.0.0.1", port))
        sharing.listen()
        with socket.create_connection(("127.0.0.1", port)), sharing.accept()[0]:
            pass  # the reserving socket gets no connections
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))


def test_port_with_ended_connections_can_be_reserved() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()  # the side that closes first waits
            assert client.recv(1) == b""
    assert port_is_free("127.0.0.1", port)


def test_processes_that_reserve_a_port_at_once_exclude_each_other() -> None:
    port = free_port("127.0.0.1")
    command = [sys.executable, "-c", RACER, str(port)]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
    for racer in racers:
        racer.communicate("\n")
    assert sorted(said) == ["Address already in use"] * 3 + ["held"]


def test_address_of_another_machine_cannot_be_reserved() -> None:
    with pytest.raises(OSError, match="Cannot assign requested address"):
        reserve_port("2001:db8::1", free_port("127.0.0.1"))


def test_family_follows_the_address() -> None:
    assert address_family("[::1]") == socket.AF_INET6
    assert address_family("127.0.0.1") == socket.AF_INET
