"""What the HTTP server reads, and for how long: the token first, then size and time limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ladderstitch.api.http_server import HttpServer
from ladderstitch.api.openai import body as body_module
from ladderstitch.api.openai.app import replica_app
from ladderstitch.api.openai.body import MAX_VALUES, SMALL_BYTES, max_body_bytes
from ladderstitch.config import ServerConfig
from tests.api.openai.served_model import SECRET, ServedModel, request_body, write_chat_bundle

LIMIT_S = 300.0
KNOWN = f"authorization: Bearer {SECRET}\r\n"
JSON = "content-type: application/json\r\n"


@pytest.fixture
def served(tmp_path: Path) -> ServedModel:
    return ServedModel(write_chat_bundle(tmp_path))


@contextlib.asynccontextmanager
async def serving(served: ServedModel, **fields: Any) -> AsyncIterator[int]:
    """Run the HTTP server with fields of its configuration; yield its port."""
    config = ServerConfig(bundle=served.registry.text_model("tiny").bundle.path, **fields)
    server = HttpServer(config, replica_app(config, served.registry, served.auth))
    try:
        yield await server.start(0)
    finally:
        await server.stop()


class Connection:
    """A connection that sends bytes and reads responses."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def request(self, text: str, body: bytes = b"") -> tuple[int, Any]:
        """Send a request; return the status and the JSON of the response."""
        self.writer.write(text.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        return await self.response()

    async def response(self) -> tuple[int, Any]:
        """Return the status and the JSON of the next response."""
        async with asyncio.timeout(LIMIT_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
            size = int(head.partition("content-length: ")[2].partition("\r\n")[0] or 0)
            text = await self.reader.readexactly(size)
        return int(head.split()[1]), json.loads(text or b"null")

    async def wait_until_closed(self) -> bytes:
        """Return what arrives before the server closes the connection."""
        data = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(LIMIT_S):
                while part := await self.reader.read(4096):
                    data += part
        return data

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


def post(path: str, size: int, headers: str = "") -> str:
    """Return the head of a request without the empty line at its end."""
    return f"POST {path} HTTP/1.1\nhost: x\ncontent-length: {size}\n{headers}".strip()


async def call(port: int, head: str, body: bytes = b"") -> tuple[int, Any]:
    """Return the status and the JSON of the response to one request."""
    connection = await Connection.open(port)
    try:
        return await connection.request(head.replace("\r\n", "\n"), body)
    finally:
        await connection.close()


@pytest.mark.parametrize(
    "head",
    [
        post("/v1/completions", 57_000_000),
        post("/v1/chat/completions", 57_000_000, "authorization: Bearer wrong-0123456789"),
        post("/v1/completions", 12, "content-type: text/plain"),
        post("/no/such/path", 10),
        "POST /v1/completions HTTP/1.1\nhost: x\ntransfer-encoding: chunked",
        "GET /v1/models HTTP/1.1\nhost: x",
        "GET /v1/models/other HTTP/1.1\nhost: x",
        "GET /no/such/path HTTP/1.1\nhost: x",
        "PUT /v1/completions HTTP/1.1\nhost: x\ncontent-length: 5",
        "DELETE /docs HTTP/1.1\nhost: x",
    ],
)
async def test_stranger_gets_401_before_a_byte_of_the_body(served: ServedModel, head: str) -> None:
    async with serving(served) as port:
        status, answer = await call(port, head)
    assert status == 401
    assert answer["error"]["code"] == "UNAUTHENTICATED"


@pytest.mark.parametrize("body", [b'{"nonsense":1}', b"{not json", b"\xff\xfe", b"[" * 5000])
async def test_stranger_with_a_malformed_body_gets_401(served: ServedModel, body: bytes) -> None:
    async with serving(served) as port:
        status, _ = await call(port, post("/v1/completions", len(body), JSON), body)
    assert status == 401


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_health_needs_no_token(served: ServedModel, method: str) -> None:
    async with serving(served) as port:
        connection = await Connection.open(port)
        connection.writer.write(f"{method} /health HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        async with asyncio.timeout(LIMIT_S):
            head = await connection.reader.readuntil(b"\r\n\r\n")
        await connection.close()
    assert head.startswith(b"HTTP/1.1 200")


async def test_body_larger_than_any_prompt_gets_413_before_it_arrives(served: ServedModel) -> None:
    limit = max_body_bytes(served.registry, 64 << 20)
    assert limit < 1 << 20
    async with serving(served) as port:
        for size in (limit + 1, 57_000_000, 10**15):
            status, answer = await call(port, post("/v1/completions", size, KNOWN + JSON))
            assert status == 413
            assert answer["error"]["message"].startswith(f"body: expected at most {limit} bytes")
        chunked = (
            f"POST /v1/completions HTTP/1.1\nhost: x\ntransfer-encoding: chunked\n{KNOWN}{JSON}"
        )
        chunk = f"{limit + 1:x}\r\n".encode() + b" " * (limit + 1)
        assert (await call(port, chunked.strip(), chunk))[0] == 413


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{not json", "body: expected JSON"),
        (b'{"model": "tiny",\n "prompt": }', "line 2, column 12"),
        (b"\xff\xfe{}", "body: expected JSON in UTF-8"),
        (b"[" * 20_000, "nested"),
        (b"[" * 100 + b"]" * 100 + b" " * SMALL_BYTES, "dictionary"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "body: expected JSON"),
        (json.dumps({"prompt": [[]] * (MAX_VALUES + 1)}).encode(), "prompt: expected at most"),
        (json.dumps({"x": [{"y": 1}] * MAX_VALUES}).encode(), "x: expected at most"),
        (b'"' + b"x" * SMALL_BYTES + b'"', "dictionary"),
        (b"", "body: expected JSON"),
    ],
)
async def test_body_that_is_no_request_gets_400(
    served: ServedModel, body: bytes, message: str
) -> None:
    async with serving(served) as port:
        status, answer = await call(port, post("/v1/completions", len(body), KNOWN + JSON), body)
        assert status == 400
        assert message in answer["error"]["message"]
        assert len(answer["error"]["message"]) < 1000


async def test_body_of_another_type_is_not_parsed(served: ServedModel) -> None:
    """Web pages may send text/plain anywhere without asking."""
    body = request_body(False)
    async with serving(served) as port:
        for kind in ("content-type: text/plain\n", ""):
            status, answer = await call(
                port, post("/v1/completions", len(body), KNOWN + kind), body
            )
            assert status == 400
            assert answer["error"]["param"] == "content-type"


async def test_large_body_is_parsed_while_others_are_answered(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsing, may_end = threading.Event(), threading.Event()
    parse = body_module._parse

    def slow_parse(*given: Any) -> Any:
        parsing.set()
        assert may_end.wait(LIMIT_S)
        return parse(*given)

    monkeypatch.setattr(body_module, "_parse", slow_parse)
    body = b"{not json" + b" " * SMALL_BYTES
    async with serving(served) as port:
        slow = asyncio.create_task(
            call(port, post("/v1/completions", len(body), KNOWN + JSON), body)
        )
        assert await asyncio.to_thread(parsing.wait, LIMIT_S)
        assert (await call(port, "GET /health HTTP/1.1\nhost: x"))[0] == 200
        may_end.set()
        assert (await slow)[0] == 400


@pytest.mark.parametrize("values", ["[]", "{}", '"\\u0041"', "1", '{"a":[1]}'])
def test_decoder_of_large_bodies_lets_other_threads_run(values: str) -> None:
    text = "[" + ",".join([values] * 100_000) + "]"
    found: list[Any] = []
    decoder = body_module._InterruptibleDecoder()
    thread = threading.Thread(target=lambda: found.append(decoder.decode(text)))
    turns = 0
    thread.start()
    while thread.is_alive():
        thread.join(0.0001)
        turns += 1
    assert found == [json.loads(text)]
    assert turns > 2


async def test_unfinished_body_gets_408(served: ServedModel) -> None:
    async with serving(served, message_timeout_s=0.2) as port:
        head = post("/v1/completions", 1000, KNOWN + JSON)
        status, answer = await call(port, head, b'{"model"')
    assert status == 408
    assert "within 0.2 s" in answer["error"]["message"]
    served.assert_released()


async def test_unfinished_bodies_are_limited_in_number(served: ServedModel) -> None:
    async with serving(served, max_unfinished_messages=2) as port:
        slow = [await Connection.open(port) for _ in range(2)]
        for connection in slow:
            head = post("/v1/completions", 1000, KNOWN + JSON).replace("\r\n", "\n")
            connection.writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n{")
        async with asyncio.timeout(LIMIT_S):
            while served.in_flight < 2:  # noqa: ASYNC110 # no event says so
                await asyncio.sleep(0.001)
        status, answer = await call(port, post("/v1/completions", 1000, KNOWN + JSON))
        assert (status, answer["error"]["code"]) == (429, "OVERLOADED")
        for connection in slow:
            await connection.close()


@pytest.mark.parametrize("begun", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: x\r\n"])
async def test_slow_headers_end_the_connection(served: ServedModel, begun: bytes) -> None:
    async with serving(served, header_timeout_s=0.2) as port:
        connection = await Connection.open(port)
        connection.writer.write(begun)
        assert b"408" in (await connection.wait_until_closed())[:20]
        await connection.close()


async def test_headers_that_drip_end_the_connection(served: ServedModel) -> None:
    async with serving(served, header_timeout_s=0.3) as port:
        connection = await Connection.open(port)
        connection.writer.write(b"GET /health HTTP/1.1\r\n")
        closed = asyncio.create_task(connection.wait_until_closed())
        while not closed.done():
            connection.writer.write(b"x: y\r\n")
            await asyncio.sleep(0.02)
        await connection.close()


@pytest.mark.parametrize("part", [b"x-note: y\r\n", b"x-%d: " + b"v" * 10_000 + b"\r\n"])
async def test_headers_without_end_are_too_large(served: ServedModel, part: bytes) -> None:
    async with serving(served) as port:
        connection = await Connection.open(port)
        connection.writer.write(b"GET /health HTTP/1.1\r\n" + part * (200_000 // len(part)))
        assert b"431" in (await connection.wait_until_closed())[:20]
        await connection.close()


async def test_idle_connection_stays_open_for_its_configured_time(served: ServedModel) -> None:
    assert ServerConfig(bundle=Path("x")).idle_timeout_s >= 75
    async with serving(served, idle_timeout_s=1, header_timeout_s=0.1) as port:
        connection = await Connection.open(port)
        for _ in range(2):
            assert (await connection.request("GET /health HTTP/1.1\nhost: x"))[0] == 200
            await asyncio.sleep(0.3)
        assert await connection.wait_until_closed() == b""
        await connection.close()


async def test_new_connection_takes_the_place_of_an_idle_one(served: ServedModel) -> None:
    async with serving(served, max_connections=4) as port:
        idle = [await Connection.open(port) for _ in range(4)]
        for connection in idle[1:]:
            assert (await connection.request("GET /health HTTP/1.1\nhost: x"))[0] == 200
        assert (await call(port, "GET /health HTTP/1.1\nhost: x"))[0] == 200
        await idle[0].wait_until_closed()
        for connection in idle:
            await connection.close()


async def test_health_is_answered_while_all_connections_are_busy(served: ServedModel) -> None:
    body = request_body(False, max_tokens=100)
    head = post("/v1/completions", len(body), KNOWN + JSON).replace("\r\n", "\n")
    async with serving(served, max_connections=4) as port:
        busy = [await Connection.open(port) for _ in range(4)]
        for connection in busy:
            connection.writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        async with asyncio.timeout(LIMIT_S):
            while served.in_flight < 4:  # noqa: ASYNC110 # no event says so
                await asyncio.sleep(0.001)
        assert (await call(port, "GET /health HTTP/1.1\nhost: x"))[0] == 200
        status, answer = await call(port, head, body)
        assert (status, answer["error"]["code"]) == (429, "OVERLOADED")
        for connection in busy:
            await connection.close()
