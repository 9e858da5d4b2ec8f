"""What strangers and careless clients cost a server: nothing is read, inflated or kept for them."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ladderstitch.api import receiving
from ladderstitch.api.health import NOT_SERVING, SERVING, HealthService
from ladderstitch.api.receiving import MessageReceiver, OpenMessageReceiver
from ladderstitch.api.server import Server
from ladderstitch.client import AsyncClient, Credentials, RequestFailed
from ladderstitch.errors import InvalidArgument, Overloaded
from ladderstitch.oip import grpc_service_pb2 as oip_pb
from ladderstitch.oip import grpc_service_pb2_grpc as oip_grpc
from ladderstitch.v1 import replica_pb2, replica_pb2_grpc
from tests.api.http2 import GOAWAY, HEADERS, PING, WINDOW, RawConnection
from tests.api.test_auth import USER, call_status, serving

INFER = "/ladderstitch.v1.InferenceService/Infer"
MODELS = "/ladderstitch.v1.InferenceService/ListModels"
HEALTH = "/grpc.health.v1.Health/Check"
METHODS = (
    INFER,
    "/ladderstitch.v1.GenerationService/Generate",
    "/inference.GRPCInferenceService/ModelStreamInfer",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/inference.GRPCInferenceService/NoSuchMethod",
)
WINDOW_BYTES = 1 << 16
"""Bytes that HTTP/2 lets a client send before the server reads."""
Code = grpc.StatusCode
LIMITED = "limited-secret-0123456789"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.yaml"
    path.write_text(
        f"tokens:\n  - {{name: user, token: {USER}}}\n"
        f"  - {{name: limited, token: {LIMITED}, requests_per_s: 0.01, watchers: 2}}\n"
    )
    path.chmod(0o600)
    return path


@pytest.fixture
async def guarded(token_file: Path) -> AsyncIterator[Server]:
    async with serving(token_file=token_file) as server:
        yield server


def status_in(payload: bytes) -> str:
    """Return the number of the status in a frame of trailers."""
    at = payload.index(b"grpc-status") + len(b"grpc-status")
    return payload[at + 1 : at + 1 + payload[at]].decode()


@pytest.mark.parametrize("method", METHODS)
async def test_stranger_is_rejected_before_any_message(guarded: Server, method: str) -> None:
    raw = await RawConnection.open(guarded.port)
    raw.start_call(method)
    async with asyncio.timeout(300):
        status = status_in(await raw.read_until(HEADERS))
    await raw.close()
    assert status == ("12" if method.endswith("NoSuchMethod") else "16")


@pytest.mark.parametrize("method", METHODS)
async def test_stranger_gets_no_window_for_a_large_message(guarded: Server, method: str) -> None:
    """A server that reads a message of 62 MB widens the window of its stream."""
    raw = await RawConnection.open(guarded.port)
    raw.start_call(method)
    raw.send_message(b"x" * 16_000, declared=62_000_000)
    widened = 0
    async with asyncio.timeout(300):
        while (frame := await raw.read_frame()) is not None and frame[0] != HEADERS:
            if frame[0] == WINDOW and frame[2] == 1:
                widened += struct.unpack(">I", frame[3])[0]
    await raw.close()
    assert frame is not None
    assert widened <= WINDOW_BYTES


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("method", [INFER, MODELS, HEALTH])
async def test_compressed_request_is_refused_and_not_inflated(
    guarded: Server, method: str, encoding: str
) -> None:
    raw = await RawConnection.open(guarded.port)
    raw.start_call(method, ("authorization", f"Bearer {USER}"), ("grpc-encoding", encoding))
    async with asyncio.timeout(300):
        payload = await raw.read_until(HEADERS)
    await raw.close()
    assert status_in(payload) == "12"
    assert b"is disabled" in payload


async def test_compression_of_a_grpc_client_is_refused(guarded: Server) -> None:
    address = f"127.0.0.1:{guarded.port}"
    async with grpc.aio.insecure_channel(address, compression=grpc.Compression.Gzip) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await health.Check(health_pb2.HealthCheckRequest())
    assert failed.value.code() == Code.UNIMPLEMENTED


@pytest.mark.parametrize("method", [MODELS, HEALTH])
async def test_unfinished_message_ends_at_its_time_limit(token_file: Path, method: str) -> None:
    async with serving(token_file=token_file, message_timeout_s=0.2) as server:
        raw = await RawConnection.open(server.port)
        raw.start_call(method, ("authorization", f"Bearer {USER}"))
        raw.send_message(b"x" * 100, declared=1000)
        async with asyncio.timeout(300):
            payload = await raw.read_until(HEADERS)
        await raw.close()
        assert status_in(payload) == "3"
        assert b"within 0.2 s" in payload
        assert await call_status(server.port, Credentials(token=USER)) == Code.OK


class _Call:
    """A call whose only message arrives when the test says so."""

    def __init__(self) -> None:
        self.message: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._was_read = False

    async def read(self) -> Any:
        if self._was_read:
            return grpc.aio.EOF
        message, self._was_read = await self.message, True
        return message


async def test_oldest_unfinished_message_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "UNFINISHED_AGE_S", 0.0)
    receiver, calls = MessageReceiver(2, 300.0), [_Call() for _ in range(3)]
    tasks = [asyncio.create_task(receiver.receive(call)) for call in calls]  # type: ignore[arg-type]
    with pytest.raises(Overloaded, match="too many unfinished messages"):
        await tasks[0]
    for call in calls[1:]:
        call.message.set_result(b"whole")
    assert await asyncio.gather(*tasks[1:]) == [b"whole", b"whole"]


async def test_burst_of_messages_that_arrive_soon_is_received() -> None:
    receiver, calls = MessageReceiver(2, 300.0), [_Call() for _ in range(50)]
    tasks = [asyncio.create_task(receiver.receive(call)) for call in calls]  # type: ignore[arg-type]
    await asyncio.sleep(0)
    for call in calls:
        call.message.set_result(b"whole")
    assert await asyncio.gather(*tasks) == [b"whole"] * 50


async def test_unfinished_messages_of_strangers_give_way_to_others() -> None:
    receiver, calls = OpenMessageReceiver(300.0), [_Call() for _ in range(9)]
    tasks = [asyncio.create_task(receiver.receive(call)) for call in calls]  # type: ignore[arg-type]
    calls[-1].message.set_result(b"whole")
    async with asyncio.timeout(300):
        assert await tasks[-1] == b"whole"
    assert all(isinstance(task.exception(), Overloaded) for task in tasks[:4])
    for task in tasks:
        task.cancel()


async def test_unread_calls_of_strangers_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "MAX_OPEN_WAITING", 1)
    monkeypatch.setattr(receiving, "OPEN_TURN_S", 300.0)
    receiver, calls = OpenMessageReceiver(300.0), [_Call() for _ in range(5)]
    tasks = [asyncio.create_task(receiver.receive(call)) for call in calls]  # type: ignore[arg-type]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="too many calls without a token"):
        await receiver.receive(_Call())  # type: ignore[arg-type]
    for task in tasks:
        task.cancel()


async def test_call_without_a_message_is_invalid() -> None:
    call = _Call()
    call.message.set_result(grpc.aio.EOF)
    with pytest.raises(InvalidArgument, match="message: expected one, got none"):
        await MessageReceiver(2, 300.0).receive(call)  # type: ignore[arg-type]


@pytest.mark.parametrize("message", [b"\xff" * 20, b"\x0a\x05ab", b"\x08" + b"\xff" * 11])
@pytest.mark.parametrize("method", [INFER, MODELS, HEALTH])
async def test_bytes_that_are_no_protobuf_are_invalid(
    guarded: Server, method: str, message: bytes
) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{guarded.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await channel.unary_unary(method)(
                message, metadata=(("authorization", f"Bearer {USER}"),)
            )
    assert failed.value.code() == Code.INVALID_ARGUMENT
    assert "message: expected" in (failed.value.details() or "")


async def test_large_metadata_is_refused(guarded: Server) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{guarded.port}") as channel:
        call = channel.unary_unary(MODELS)
        metadata = (("authorization", f"Bearer {USER}"), ("x-note", "n" * 100_000))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call(b"", metadata=metadata)
        assert failed.value.code() == Code.RESOURCE_EXHAUSTED
        await call(b"", metadata=metadata[:1])


async def test_client_that_pings_every_second_is_tolerated(guarded: Server) -> None:
    raw = await RawConnection.open(guarded.port)
    async with asyncio.timeout(300):
        for number in range(5):
            raw.send(PING, 0, 0, struct.pack(">Q", number))
            assert await raw.read_until(PING) == struct.pack(">Q", number)
            await asyncio.sleep(0.6)
    await raw.close()


async def test_client_that_floods_pings_is_disconnected() -> None:
    async with serving(min_ping_interval_s=300.0) as server:
        raw = await RawConnection.open(server.port)
        for number in range(10):
            raw.send(PING, 0, 0, struct.pack(">Q", number))
        async with asyncio.timeout(300):
            await _is_closed(raw)
        await raw.close()


async def test_half_open_connection_is_closed() -> None:
    async with serving(header_timeout_s=0.3) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        async with asyncio.timeout(300):
            while await reader.read(4096):
                pass
        writer.close()


async def test_idle_connection_is_asked_to_go() -> None:
    async with serving(idle_timeout_s=1) as server:
        raw = await RawConnection.open(server.port)
        async with asyncio.timeout(300):
            await raw.read_until(GOAWAY)
        await raw.close()


async def test_connections_above_the_maximum_are_closed() -> None:
    async with serving(max_connections=8) as server:
        raws = [await RawConnection.open(server.port) for _ in range(60)]
        async with asyncio.timeout(300):
            ends = [asyncio.create_task(_is_closed(raw)) for raw in raws]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        for raw in raws:
            await raw.close()
        async with asyncio.timeout(300):  # the places are free again
            while await call_status(server.port) != Code.OK:  # noqa: ASYNC110 # no event says so
                await asyncio.sleep(0.05)


async def _is_closed(raw: RawConnection) -> None:
    while await raw.read_frame() is not None:
        pass


async def test_requests_of_a_stream_count_one_by_one(guarded: Server) -> None:
    """The first request is answered; the others are refused, each by an answer of its own."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{guarded.port}") as channel:
        stub: Any = oip_grpc.GRPCInferenceServiceStub(channel)
        requests = (oip_pb.ModelInferRequest(model_name="m", id=str(n)) for n in range(20))
        answers = [
            answer
            async for answer in stub.ModelStreamInfer(
                requests, metadata=(("authorization", f"Bearer {LIMITED}"),)
            )
        ]
    reasons = [answer.error_message.partition(":")[0] for answer in answers]
    assert sorted(reasons) == ["MODEL_NOT_FOUND"] + ["RATE_LIMITED"] * 19
    assert {answer.infer_response.id for answer in answers} == {str(n) for n in range(20)}


async def test_second_stream_shares_the_limits_of_the_first(guarded: Server) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{guarded.port}") as channel:
        stub: Any = oip_grpc.GRPCInferenceServiceStub(channel)
        metadata = (("authorization", f"Bearer {LIMITED}"),)
        request = oip_pb.ModelInferRequest(model_name="m")
        for reason in ("MODEL_NOT_FOUND", "RATE_LIMITED"):
            (answer,) = [a async for a in stub.ModelStreamInfer(iter([request]), metadata=metadata)]
            assert answer.error_message.startswith(reason)
    address, credentials = f"127.0.0.1:{guarded.port}", Credentials(token=LIMITED)
    async with AsyncClient(address, credentials=credentials, retry_policy=None) as client:
        with pytest.raises(RequestFailed) as failed:
            await client.list_models()
    assert failed.value.reason == "RATE_LIMITED"


async def test_watchers_of_the_load_are_limited_by_token(guarded: Server) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{guarded.port}") as channel:
        stub: Any = replica_pb2_grpc.ReplicaServiceStub(channel)
        metadata = (("authorization", f"Bearer {LIMITED}"),)
        watches = [
            stub.WatchLoad(replica_pb2.WatchLoadRequest(), metadata=metadata) for _ in range(2)
        ]
        for watch in watches:
            assert (await watch.read()).serving
        third = stub.WatchLoad(replica_pb2.WatchLoadRequest(), metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError, match="watchers: expected at most 2") as failed:
            await third.read()
        assert failed.value.code() == Code.RESOURCE_EXHAUSTED
        watches[0].cancel()
        assert guarded.listener.auth is not None
        limiter = guarded.listener.auth.limiter
        async with asyncio.timeout(300):
            while limiter.watchers("limited") > 1:  # noqa: ASYNC110 # no event says so
                await asyncio.sleep(0.01)
        fourth = stub.WatchLoad(replica_pb2.WatchLoadRequest(), metadata=metadata)
        assert (await fourth.read()).serving


@pytest.mark.parametrize("leaving", [0, 2, 4])
async def test_health_watchers_all_hear_of_a_drain_though_one_left(leaving: int) -> None:
    async with (
        serving() as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(5)]
        for watch in watches:
            assert (await watch.read()).status == SERVING
        watches.pop(leaving).cancel()
        async with asyncio.timeout(300):
            while server.health.num_watchers > 4:  # noqa: ASYNC110 # no event says so
                await asyncio.sleep(0.01)
            await server.set_serving(False)
            for watch in watches:
                assert (await watch.read()).status == NOT_SERVING


async def test_health_watchers_are_limited_in_number() -> None:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(HealthService(max_watchers=1), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        first = health.Watch(health_pb2.HealthCheckRequest())
        assert (await first.read()).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError, match="at most 1 watchers"):
            await health.Watch(health_pb2.HealthCheckRequest()).read()
    await server.stop(0)
