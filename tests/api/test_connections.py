"""Connections to gRPC ports: handshakes of TLS that do not end, and room for probes."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ladderstitch.api.health import SERVING
from ladderstitch.api.server import ACCEPTORS
from ladderstitch.client import Credentials
from tests.api.http2 import RawConnection
from tests.api.test_auth import call_status, serving, tls_fields
from tests.support.certificates import Authority

LIMIT_S = 50.0
"""Below the 120 s that gRPC grants a handshake unless it is configured."""
MAX_CONNECTIONS = 4
Code = grpc.StatusCode


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def client_hello(authority: Authority) -> bytes:
    """Return the first message of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context(cafile=str(authority.path))
    client = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


async def wait_until_closed(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(LIMIT_S):
            while await reader.read(4096):
                pass


async def health(port: int) -> int:
    """Return the status that a probe gets on a port."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        status: int = (await stub.Check(health_pb2.HealthCheckRequest(), timeout=LIMIT_S)).status
    return status


@pytest.mark.parametrize("part", ["nothing", "half", "hello"])
async def test_tls_handshake_that_does_not_end_is_closed(authority: Authority, part: str) -> None:
    hello = client_hello(authority)
    sent = {"nothing": b"", "half": hello[: len(hello) // 2], "hello": hello}[part]
    async with serving(**tls_fields(authority.issue("server")), header_timeout_s=0.3) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(sent)
        await wait_until_closed(reader)
        writer.close()
        assert await call_status(server.port, Credentials(ca=authority.path)) == Code.OK


async def wait_until_full(readers: list[asyncio.StreamReader]) -> None:
    """Wait until all but the connections that the four servers of a port keep are closed."""
    ends = {asyncio.create_task(wait_until_closed(reader)) for reader in readers}
    left = ends
    async with asyncio.timeout(LIMIT_S):
        while len(left) > MAX_CONNECTIONS * ACCEPTORS:
            _, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
    for end in left:
        end.cancel()


async def test_tls_handshakes_count_as_connections(authority: Authority) -> None:
    """With the port full of them, a further connection is closed at once."""
    fields = tls_fields(authority.issue("server"), max_connections=MAX_CONNECTIONS)
    async with serving(**fields, header_timeout_s=300) as server:
        begun = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(100)]
        await wait_until_full([reader for reader, _ in begun])
        for _, writer in begun:
            writer.close()


@pytest.mark.parametrize("encrypted", [False, True])
async def test_probes_are_answered_while_the_main_port_is_full(
    authority: Authority, encrypted: bool
) -> None:
    fields = tls_fields(authority.issue("server")) if encrypted else {}
    fields |= {"max_connections": MAX_CONNECTIONS, "health_port": 0, "header_timeout_s": 300}
    async with serving(**fields) as server:
        raws = [await RawConnection.open(server.port) for _ in range(100)]
        await wait_until_full([raw.reader for raw in raws])
        for _ in range(20):
            assert await health(server.health_port) == SERVING
        for raw in raws:
            await raw.close()
