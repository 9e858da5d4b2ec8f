"""Sends cases over HTTP/1.1 on sockets, and returns the responses."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import h11

from ladderstitch_loadtest.faults.fuzzing.cases import Answer, Case, Protocol
from ladderstitch_loadtest.faults.fuzzing.http_bytes import encode_request

HANG_S = 60.0
"""Time after which a request without a response counts as a hang."""
INCOMPLETE_S = 0.3
"""Time to wait for the response to bytes that may be the start of a request only."""
READ_BYTES = 1 << 16


class HttpSender:
    """Sends requests to one address and keeps idle connections for later ones."""

    def __init__(self, address: str, hang_s: float = HANG_S) -> None:
        self._host, _, port = address.rpartition(":")
        self._port, self._hang_s = int(port), hang_s
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, case: Case) -> Answer:
        """Send a case and wait for its response."""
        if case.entrance.protocol is Protocol.SOCKET:
            return await self._send_bytes(case.messages[0])
        request = encode_request(case.entrance.method, case.messages[0], case.headers)
        while self._idle:  # the server may have closed an idle connection meanwhile
            reader, writer = self._idle.pop()
            answer = await self._exchange(reader, writer, request)
            if answer.status not in ("closed", "reset"):
                return answer
        return await self._exchange(*await self._connect(), request)

    async def post(self, path: str, body: bytes) -> Answer:
        """Send a well-formed request on a new connection and wait for its response."""
        request = encode_request(path, body, close=True)
        return await self._exchange(*await self._connect(), request)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._port)

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
    ) -> Answer:
        answer, reusable = Answer("hang"), False
        try:
            async with asyncio.timeout(self._hang_s):
                writer.write(request)
                reusable = await read_response(reader, answer, "POST")
        except TimeoutError:
            answer.status = "hang"
        except (ConnectionError, h11.RemoteProtocolError) as error:
            answer.status, answer.message = "reset", repr(error)
        if reusable:
            self._idle.append((reader, writer))
        else:
            await _close(writer)
        return answer

    async def _send_bytes(self, request: bytes) -> Answer:
        """Send bytes that may be no request, and wait for a response if they are a whole one."""
        reader, writer = await self._connect()
        is_whole = is_whole_request(request)
        answer = Answer("hang")
        try:
            async with asyncio.timeout(self._hang_s if is_whole else INCOMPLETE_S):
                writer.write(request)
                await read_response(reader, answer, request.partition(b" ")[0].decode("latin-1"))
        except TimeoutError:
            answer.status = "hang" if is_whole else "incomplete"
        except (ConnectionError, h11.RemoteProtocolError) as error:
            answer.status, answer.message = "closed", repr(error)
        await _close(writer)
        return answer

    async def close(self) -> None:
        """Close the idle connections."""
        for _, writer in self._idle:
            await _close(writer)
        self._idle.clear()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


def is_whole_request(request: bytes) -> bool:
    """Return whether the bytes start with a whole request of HTTP/1.1."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(request)
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.EndOfMessage):
                return True
            if event in (h11.NEED_DATA, h11.PAUSED) or isinstance(event, h11.ConnectionClosed):
                return False  # no bytes at all count as a closed connection
    except h11.RemoteProtocolError:
        return False


async def read_response(reader: asyncio.StreamReader, answer: Answer, method: str) -> bool:
    """Read a response into `answer` and return whether the connection can be used again.

    The status is `closed` if the server closes the connection before it responds. Raises
    `h11.RemoteProtocolError` for a response that is malformed or cut off.
    """
    connection = h11.Connection(h11.CLIENT)
    known = method if method == "HEAD" else "POST"
    connection.send(h11.Request(method=known, target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    parts: list[bytes] = []
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await reader.read(READ_BYTES)
            if not data and answer.status == "hang":
                answer.status = "closed"
                return False
            connection.receive_data(data)
        elif isinstance(event, h11.Response):
            answer.status = str(event.status_code)
            answer.headers = {k.decode(): v.decode("latin-1") for k, v in event.headers}
        elif isinstance(event, h11.Data):
            parts.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            answer.body = [b"".join(parts)]
            return connection.their_state is h11.DONE and connection.our_state is h11.DONE
        elif event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
            return False
