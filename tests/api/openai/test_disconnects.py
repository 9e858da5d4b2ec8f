"""A client that disconnects frees its blocks and its place in the limits, at every moment."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable

import pytest
from starlette.requests import ClientDisconnect

from ladderstitch.api.http_server import HttpServer
from ladderstitch.api.openai.app import replica_app
from ladderstitch.config import ServerConfig
from ladderstitch.text.bundle import TextBundle
from tests.api.openai.served_model import (
    AsgiCall,
    Message,
    ServedModel,
    raw_request,
    write_chat_bundle,
)

LIMIT_S = 300.0
HEAD, BODY = "http.response.start", "http.response.body"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    return write_chat_bundle(tmp_path_factory.mktemp("openai"))


@pytest.fixture
async def served(bundle: TextBundle) -> AsyncIterator[ServedModel]:
    served = ServedModel(bundle)
    yield served
    await served.scheduler.close()


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("moment", [HEAD, BODY])
async def test_send_that_fails_frees_the_stream(
    served: ServedModel, chat: bool, moment: str
) -> None:
    """A server of ASGI 2.4 raises `OSError` when it sends to a client that disconnected."""
    served.scheduler.steps.release(1)
    call = AsgiCall(chat, spec_version="2.4", stream=True, max_tokens=100)

    def disconnect(message: Message) -> None:
        assert served.in_flight == 1
        assert served.scheduler.num_running == 1
        if message["type"] == moment:
            raise OSError("the client disconnected")

    with pytest.raises(ClientDisconnect):
        await call.run(served, disconnect)
    served.assert_released()
    assert served.counter.ends == {"CANCELLED": 1}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("moment", [HEAD, BODY])
@pytest.mark.parametrize("cancelled", [False, True])
async def test_blocked_send_that_is_cancelled_frees_the_stream(
    served: ServedModel, chat: bool, moment: str, cancelled: bool
) -> None:
    """The client reads nothing; then it disconnects, or the server stops and cancels the task."""
    served.scheduler.steps.release(1)
    call = AsgiCall(chat, stream=True, max_tokens=100)
    blocked, never = asyncio.Event(), asyncio.Event()

    async def block() -> None:
        blocked.set()
        await never.wait()

    task = asyncio.create_task(
        call.run(served, lambda message: block() if message["type"] == moment else None)
    )
    await asyncio.wait_for(blocked.wait(), LIMIT_S)
    assert (served.in_flight, served.scheduler.num_running) == (1, 1)
    if cancelled:
        task.cancel()
    else:
        call.disconnected.set()
    await asyncio.wait({task}, timeout=LIMIT_S)
    assert task.done()
    assert task.cancelled() is cancelled
    served.assert_released()
    assert served.counter.ends == {"CANCELLED": 1}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("cancelled", [False, True])
async def test_end_before_the_first_token_frees_the_stream(
    served: ServedModel, chat: bool, stream: bool, cancelled: bool
) -> None:
    call = AsgiCall(chat, stream=stream, max_tokens=100)
    task = asyncio.create_task(call.run(served, lambda message: None))
    await asyncio.wait_for(served.scheduler.steps.step_running.wait(), LIMIT_S)
    assert served.in_flight == 1
    if cancelled:
        task.cancel()
    else:
        call.disconnected.set()
    await asyncio.wait({task}, timeout=LIMIT_S)
    served.assert_released()
    assert served.counter.ends == {"CANCELLED": 1}
    assert [message.get("status") for message in call.sent[:1]] == [] if cancelled else [499]


@pytest.mark.parametrize("stream", [False, True])
async def test_cancel_at_every_turn_frees_the_stream(served: ServedModel, stream: bool) -> None:
    """The task is cancelled after each number of turns of the event loop until it is complete."""
    served.scheduler.steps.release()
    for turns in range(1, 1000):
        call = AsgiCall(False, stream=stream, max_tokens=20)
        task = asyncio.create_task(call.run(served, lambda message: None))
        for _ in range(turns):
            await asyncio.sleep(0)
        complete = task.done()
        task.cancel()
        await asyncio.wait({task}, timeout=LIMIT_S)
        served.assert_released()
        assert served.counter.ends.total() <= turns
        if complete:
            break
    assert complete
    assert served.counter.ends["CANCELLED"] > 0


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_limits_are_released_before_the_end_is_sent(
    served: ServedModel, chat: bool, stream: bool
) -> None:
    """A client may send its next request as soon as it has read the last event."""
    served.scheduler.steps.release()
    call = AsgiCall(chat, stream=stream, max_tokens=3)
    in_flight_at_end: list[int] = []

    def record(message: Message) -> None:
        is_last = message["type"] == BODY and not message.get("more_body", False)
        if is_last or b"[DONE]" in message.get("body", b""):
            in_flight_at_end.append(served.in_flight)

    await call.run(served, record)
    assert in_flight_at_end
    assert set(in_flight_at_end) == {0}
    served.assert_released()
    assert served.counter.ends == {"OK": 1}


@contextlib.asynccontextmanager
async def running_server(served: ServedModel) -> AsyncIterator[int]:
    config = ServerConfig(bundle=served.registry.text_model("tiny").bundle.path)
    server = HttpServer(config, replica_app(config, served.registry, served.auth))
    try:
        yield await server.start(0)
    finally:
        await server.stop()


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        for _ in iter(condition, True):
            await asyncio.sleep(0.001)


async def wait_until_released(served: ServedModel, ends: int) -> None:
    """Wait until `ends` requests have ended, and assert that they left nothing behind."""
    await wait_until(lambda: served.counter.ends.total() >= ends and not served.in_flight)
    served.assert_released()
    assert served.counter.ends.total() == ends


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
async def test_sockets_closed_before_the_head_free_everything(
    served: ServedModel, chat: bool, stream: bool, reset: bool
) -> None:
    async with running_server(served) as port:
        sockets = [await open_socket(port) for _ in range(8)]
        for _, writer in sockets:
            writer.write(raw_request(chat, stream=stream, max_tokens=100))
        await wait_until(lambda: served.in_flight == len(sockets))
        for _, writer in sockets:
            disconnect(writer, reset=reset)
        await wait_until_released(served, len(sockets))
    assert served.counter.ends == {"CANCELLED": len(sockets)}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("num_events", [0, 3])
async def test_sockets_closed_in_a_stream_free_everything(
    served: ServedModel, chat: bool, reset: bool, num_events: int
) -> None:
    """The head is sent with the first token, so `num_events` 0 reads only the head of it."""
    async with running_server(served) as port:
        sockets = [await open_socket(port) for _ in range(8)]
        for _, writer in sockets:
            writer.write(raw_request(chat, stream=True, max_tokens=100))
        scheduler = served.scheduler
        await wait_until(lambda: scheduler.num_running + scheduler.num_waiting == len(sockets))
        scheduler.steps.release(max(2, num_events) + 1)
        for reader, writer in sockets:
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(num_events):
                await reader.readuntil(b"data: ")
            disconnect(writer, reset=reset)
        await wait_until_released(served, len(sockets))
    assert served.counter.ends == {"CANCELLED": len(sockets)}


async def open_socket(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


def disconnect(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    """Close a connection with FIN, or with RST."""
    if reset:
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    else:
        writer.close()
