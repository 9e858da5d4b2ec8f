"""Limits of a token for the requests of streams: each is in flight until its last response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from ladderstitch.oip import grpc_service_pb2 as pb
from tests.support.fake_replicas import (
    INFER,
    STREAM,
    Context,
    FakeReplica,
    RunningGateway,
    StartGateway,
)

SECRET = "user-secret-0123456789"
METADATA = (("authorization", f"Bearer {SECRET}"),)
LIMIT_S = 300.0
FINAL = "triton_final_response"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.yaml"
    path.write_text(f"tokens:\n  - {{name: user, token: {SECRET}, concurrent_requests: 2}}\n")
    path.chmod(0o600)
    return path


class SlowReplica(FakeReplica):
    """A replica whose streams send the responses that the test puts into a queue."""

    def __init__(self, name: str = "r0") -> None:
        super().__init__(name)
        self.requests: asyncio.Queue[str] = asyncio.Queue()
        self.responses: asyncio.Queue[bytes] = asyncio.Queue()
        self.answer_stream = self._answer

    async def _answer(self, requests: Any, context: Context) -> None:
        async def read() -> None:
            async for request in requests:
                self.requests.put_nowait(pb.ModelInferRequest.FromString(request).id)

        reading = asyncio.create_task(read())
        try:
            while (response := await self.responses.get()) != b"end":
                await context.write(response)
        finally:
            reading.cancel()


def response(**marked: bool) -> bytes:
    """Return a response; `final` is its mark as the last one, absent unless given."""
    made = pb.ModelStreamInferResponse()
    made.infer_response.id = "answered"
    for value in marked.values():
        made.infer_response.parameters[FINAL].bool_param = value
    return made.SerializeToString()


class Caller:
    """A stream to the gateway."""

    def __init__(self, running: RunningGateway) -> None:
        self.call = running.channel.stream_stream(STREAM)(metadata=METADATA, timeout=LIMIT_S)

    async def send(self, name: str) -> None:
        """Send a request with this id."""
        await self.call.write(pb.ModelInferRequest(id=name).SerializeToString())

    async def read(self) -> tuple[str, str]:
        """Return the id of the next response, and the reason of a refusal."""
        found = pb.ModelStreamInferResponse.FromString(await self.call.read())
        return found.infer_response.id, found.error_message.partition(":")[0]


@asynccontextmanager
async def two_in_flight(
    start_gateway: StartGateway, token_file: Path
) -> AsyncIterator[tuple[RunningGateway, SlowReplica, Caller]]:
    """Run a gateway with two requests of one stream in flight."""
    replica = SlowReplica()
    async with start_gateway([replica], token_file=token_file) as running:
        caller = Caller(running)
        async with asyncio.timeout(LIMIT_S):
            for name in ("a", "b"):
                await caller.send(name)
                assert await replica.requests.get() == name
            yield running, replica, caller


def in_flight(running: RunningGateway) -> int:
    auth = running.gateway._listener.auth
    assert auth is not None
    return auth.limiter.in_flight("user")


async def wait_until_idle(running: RunningGateway) -> None:
    async with asyncio.timeout(LIMIT_S):
        while in_flight(running):  # noqa: ASYNC110 # no event says so
            await asyncio.sleep(0.01)


LAST_RESPONSES = {
    "final": response(final=True),
    "of a model with one response": response(),
    "error": pb.ModelStreamInferResponse(error_message="no").SerializeToString(),
    "no response": b"\xff",
}


@pytest.mark.parametrize("last", LAST_RESPONSES)
async def test_request_is_in_flight_until_its_last_response(
    start_gateway: StartGateway, token_file: Path, last: str
) -> None:
    async with two_in_flight(start_gateway, token_file) as (running, replica, caller):
        for name in ("c", "d"):
            await caller.send(name)
            assert await caller.read() == (name, "RATE_LIMITED")
        replica.responses.put_nowait(response(final=False))
        assert await caller.read() == ("answered", "")
        await caller.send("e")
        assert await caller.read() == ("e", "RATE_LIMITED")
        replica.responses.put_nowait(LAST_RESPONSES[last])
        await caller.call.read()
        await caller.send("f")
        assert await replica.requests.get() == "f"
        await caller.send("g")
        assert await caller.read() == ("g", "RATE_LIMITED")
        assert in_flight(running) == 2
        replica.responses.put_nowait(b"end")
        assert await caller.call.read() is grpc.aio.EOF
        await wait_until_idle(running)


async def test_streams_and_calls_share_the_limit(
    start_gateway: StartGateway, token_file: Path
) -> None:
    async with two_in_flight(start_gateway, token_file) as (running, replica, caller):
        other = Caller(running)
        await other.send("x")
        assert await other.read() == ("x", "RATE_LIMITED")
        with pytest.raises(grpc.aio.AioRpcError, match="RATE_LIMITED"):
            await running.infer(metadata=METADATA)
        replica.responses.put_nowait(response())
        await caller.read()
        assert await running.infer(b"!", metadata=METADATA) == b"r0!"
        other.call.cancel()
        caller.call.cancel()
        await wait_until_idle(running)


@pytest.mark.parametrize("end", ["caller leaves", "replica dies"])
async def test_end_of_a_stream_releases_its_requests(
    start_gateway: StartGateway, token_file: Path, end: str
) -> None:
    async with two_in_flight(start_gateway, token_file) as (running, replica, caller):
        if end == "caller leaves":
            caller.call.cancel()
        else:
            await replica.stop()
            with pytest.raises(grpc.aio.AioRpcError):
                await caller.call.read()
        await wait_until_idle(running)


async def test_call_in_flight_counts_for_a_stream(
    start_gateway: StartGateway, token_file: Path
) -> None:
    replica, arrived, may_end = SlowReplica(), asyncio.Semaphore(0), asyncio.Event()

    async def answer(request: bytes, context: Context) -> bytes:
        arrived.release()
        await may_end.wait()
        return b"answer"

    replica.answers[INFER] = answer
    async with asyncio.timeout(LIMIT_S), start_gateway([replica], token_file=token_file) as running:
        calls = [asyncio.ensure_future(running.infer(metadata=METADATA)) for _ in range(2)]
        for _ in calls:
            await arrived.acquire()
        caller = Caller(running)
        await caller.send("a")
        assert await caller.read() == ("a", "RATE_LIMITED")
        may_end.set()
        assert await asyncio.gather(*calls) == [b"answer"] * 2
        await caller.send("b")
        assert await replica.requests.get() == "b"
        caller.call.cancel()
