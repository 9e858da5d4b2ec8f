"""HTTP with TLS: handshakes that do not end are closed, and count as connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ladderstitch.api.http_server import HttpServer
from ladderstitch.api.openai.app import replica_app
from ladderstitch.config import ServerConfig
from tests.api.openai.served_model import ServedModel, write_chat_bundle
from tests.api.openai.test_access import Connection
from tests.support.certificates import Authority

LIMIT_S = 50.0
"""Below the 60 s that asyncio grants a handshake."""
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture
def served(tmp_path: Path) -> ServedModel:
    return ServedModel(write_chat_bundle(tmp_path))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@contextlib.asynccontextmanager
async def serving(
    served: ServedModel, authority: Authority, **fields: Any
) -> AsyncIterator[HttpServer]:
    """Run the HTTP server with a certificate; after it has stopped, no connection is left."""
    pair = authority.issue("server")
    config = ServerConfig(
        bundle=served.registry.text_model("tiny").bundle.path,
        tls_certificate=pair.certificate,
        tls_key=pair.key,
        **fields,
    )
    server = HttpServer(config, replica_app(config, served.registry, served.auth))
    await server.start(0)
    try:
        yield server
    finally:
        async with asyncio.timeout(LIMIT_S):
            await server.stop()
        assert num_connections(server) == 0


def num_connections(server: HttpServer) -> int:
    """Return the number of connections that count."""
    return len(server._server.server_state.connections)


async def wait_for_connections(server: HttpServer, number: int) -> None:
    async with asyncio.timeout(LIMIT_S):
        while num_connections(server) != number:  # noqa: ASYNC110 # no event says so
            await asyncio.sleep(0.01)


class TlsClient:
    """The client's side of a handshake, which sends what and when the test says so."""

    def __init__(self, authority: Authority) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context(cafile=str(authority.path))
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="127.0.0.1")

    def continue_handshake(self) -> bytes:
        """Return what the client sends next."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self.outgoing.read()


async def is_healthy(server: HttpServer, authority: Authority) -> bool:
    """Return whether a new encrypted connection gets an answer."""
    context = ssl.create_default_context(cafile=str(authority.path))
    streams = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
    connection = Connection(*streams)
    try:
        return (await connection.request("GET /health HTTP/1.1\nhost: x"))[0] == 200
    finally:
        await connection.close()


@pytest.mark.parametrize("begun", ["nothing", "byte", "half", "hello", "no TLS"])
async def test_handshake_that_does_not_end_is_closed(
    served: ServedModel, authority: Authority, begun: str
) -> None:
    hello = TlsClient(authority).continue_handshake()
    sent = {"nothing": b"", "byte": hello[:1], "half": hello[: len(hello) // 2]}
    async with serving(served, authority, header_timeout_s=0.2) as server:
        connection = await Connection.open(server.port)
        connection.writer.write({**sent, "hello": hello, "no TLS": HEALTH}[begun])
        async with asyncio.timeout(LIMIT_S):
            await connection.wait_until_closed()
        await connection.close()
        await wait_for_connections(server, 0)
        assert await is_healthy(server, authority)


async def test_handshake_that_drips_is_closed(served: ServedModel, authority: Authority) -> None:
    hello = TlsClient(authority).continue_handshake()
    async with serving(served, authority, header_timeout_s=0.3) as server:
        connection = await Connection.open(server.port)
        closed = asyncio.create_task(connection.wait_until_closed())
        async with asyncio.timeout(LIMIT_S):
            for number in range(len(hello) - 1):
                if closed.done():
                    break
                connection.writer.write(hello[number : number + 1])
                await asyncio.sleep(0.02)
            await closed
        await connection.close()


async def test_new_connection_takes_the_place_of_a_handshake(
    served: ServedModel, authority: Authority
) -> None:
    async with serving(served, authority, max_connections=4, header_timeout_s=300) as server:
        begun = [await Connection.open(server.port) for _ in range(4)]
        await wait_for_connections(server, 4)
        for number in range(2):
            assert await is_healthy(server, authority)
            async with asyncio.timeout(LIMIT_S):
                await begun[number].wait_until_closed()
            await wait_for_connections(server, 3)
            begun.append(await Connection.open(server.port))
            await wait_for_connections(server, 4)
        for connection in begun:
            await connection.close()


async def test_handshakes_are_closed_when_the_server_stops(
    served: ServedModel, authority: Authority
) -> None:
    async with serving(served, authority, header_timeout_s=300) as server:
        begun = [await Connection.open(server.port) for _ in range(3)]
        begun[0].writer.write(TlsClient(authority).continue_handshake())
        await wait_for_connections(server, 3)
    for connection in begun:
        await connection.wait_until_closed()
        await connection.close()


async def test_client_that_leaves_during_the_handshake_is_forgotten(
    served: ServedModel, authority: Authority
) -> None:
    hello = TlsClient(authority).continue_handshake()
    async with serving(served, authority, header_timeout_s=300) as server:
        for sent in (b"", hello[:50], hello):
            connection = await Connection.open(server.port)
            connection.writer.write(sent)
            await connection.close()
        for sent in (b"", hello[:50]):
            connection = await Connection.open(server.port)
            connection.writer.write(sent)
            await wait_for_connections(server, 1)
            connection.writer.transport.abort()
            await wait_for_connections(server, 0)


@pytest.mark.parametrize("leaves", [False, True])
async def test_request_that_arrives_with_the_end_of_the_handshake(
    served: ServedModel, authority: Authority, leaves: bool
) -> None:
    """The request is in the same packet; so may be the end of the connection."""
    async with serving(served, authority) as server:
        client, connection = TlsClient(authority), await Connection.open(server.port)
        connection.writer.write(client.continue_handshake())
        answer, end = b"", b""
        async with asyncio.timeout(LIMIT_S):
            while not end:
                client.incoming.write(await connection.reader.read(4096))
                end = client.continue_handshake()
            client.tls.write(HEALTH)
            connection.writer.write(end + client.outgoing.read())
            if leaves:
                connection.writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
            while b"\r\n\r\n" not in answer and (part := await connection.reader.read(4096)):
                client.incoming.write(part)
                with contextlib.suppress(ssl.SSLWantReadError):
                    answer += client.tls.read()
        assert leaves or answer.startswith(b"HTTP/1.1 200")
        await connection.close()
        await wait_for_connections(server, 0)


async def test_client_without_a_certificate_is_rejected(
    served: ServedModel, authority: Authority
) -> None:
    async with serving(served, authority, tls_client_ca=authority.path) as server:
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            await is_healthy(server, authority)
        await wait_for_connections(server, 0)


def test_server_on_uvloop_answers(served: ServedModel, authority: Authority) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def call() -> bool:
        async with serving(served, authority) as server:
            healthy = await is_healthy(server, authority)
            await wait_for_connections(server, 0)
            return healthy

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(call())
