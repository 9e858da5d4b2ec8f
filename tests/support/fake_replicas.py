"""Replicas that do as they are told, behind a real gateway; only what they compute is made up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from ladderstitch.gateway import gateway
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.gateway import Gateway
from ladderstitch.gateway.replica_connection import WATCH
from ladderstitch.gateway.replica_pool import Discovery
from ladderstitch.v1 import replica_pb2

INFER = "/ladderstitch.v1.InferenceService/Infer"
GENERATE = "/ladderstitch.v1.GenerationService/Generate"
UPDATE = "/ladderstitch.v1.AdminService/UpdateScheduling"
LOAD = "/inference.GRPCInferenceService/RepositoryModelLoad"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
HEARTBEAT_S = 0.2

Context = grpc.aio.ServicerContext
Answer = Callable[[bytes, Context], Awaitable[bytes | None]]


class FakeReplica:
    """Answers with its name unless told otherwise, and tells the load that it is given."""

    def __init__(self, name: str, models: tuple[str, ...] = ("tiny",)) -> None:
        self.name = name
        self.state = replica_pb2.WatchLoadResponse(
            replica=name,
            version="0",
            serving=True,
            models=models,
            metrics_port=1,
            waits=[replica_pb2.Wait(due_us=3_600_000_000)],
            request_us=1000,
        )
        self.mute = False
        self.asked: list[tuple[str, dict[str, Any], float | None]] = []
        self.answers: dict[str, Answer] = {}
        self.address = ""
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> FakeReplica:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((_Handler(self),))
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        await self._server.start()
        return self

    async def stop(self) -> None:
        """As `kill -9` looks from outside: what is under way breaks."""
        if self._server is not None:
            await self._server.stop(None)

    def refuse(self, method: str, code: grpc.StatusCode, message: str = "no", **rest: Any) -> None:
        async def refuse(request: bytes, context: Context) -> None:
            await context.abort(code, message, **rest)

        self.answers[method] = refuse

    @property
    def count(self) -> int:
        return len(self.asked)


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc ships no types
    def __init__(self, replica: FakeReplica) -> None:
        self.replica = replica

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if details.method == WATCH:
            return grpc.unary_stream_rpc_method_handler(self.watch)
        if details.method == REFLECT:
            return grpc.stream_stream_rpc_method_handler(self.echo)
        behaviour = self.answer(details.method)
        if details.method == GENERATE:
            return grpc.unary_stream_rpc_method_handler(behaviour)
        return grpc.unary_unary_rpc_method_handler(behaviour)

    async def watch(self, request: bytes, context: Context) -> None:
        while True:
            if not self.replica.mute:
                await context.write(self.replica.state.SerializeToString())
            await asyncio.sleep(HEARTBEAT_S / 4)

    async def echo(self, requests: Any, context: Context) -> None:
        async for request in requests:
            await context.write(self.replica.name.encode() + request)

    def answer(self, method: str) -> Answer:
        async def answer(request: bytes, context: Context) -> bytes | None:
            metadata = dict(context.invocation_metadata())
            self.replica.asked.append((method, metadata, context.time_remaining()))
            if method in self.replica.answers:
                return await self.replica.answers[method](request, context)
            return self.replica.name.encode() + request

        return answer


class ReplicaPool:
    """Fake replicas, the gateway before them, and a channel to it."""

    def __init__(self, replicas: list[FakeReplica], gateway: Gateway, channel: Any) -> None:
        self.replicas, self.gateway, self.channel = replicas, gateway, channel

    @property
    def counts(self) -> list[int]:
        return [replica.count for replica in self.replicas]

    def infer(self, request: bytes = b"", **options: Any) -> Any:
        return self.channel.unary_unary(INFER)(request, **({"timeout": 10.0} | options))

    async def until(self, check: Callable[[], bool]) -> None:
        """Wait for a change in the fleet that makes it so."""
        async with asyncio.timeout(10):
            while not check():
                await self.gateway.fleet.change(0.05)


MakeFleet = Callable[..., Any]


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> MakeFleet:
    """`async with fleet(2, retry_timeout_s=1) as running`: so many replicas, the gateway's settings."""

    monkeypatch.setattr(gateway, "LAME_DUCK_S", 0.0)

    @asynccontextmanager
    async def make(
        replicas: int | list[FakeReplica] = 2,
        *,
        discovery: Discovery | None = None,
        **fields: Any,
    ) -> AsyncIterator[ReplicaPool]:
        if isinstance(replicas, int):
            replicas = [FakeReplica(f"r{n}") for n in range(replicas)]
        for replica in replicas:
            await replica.start()
        settings = GatewayConfig.model_validate(
            {"port": 0, "metrics_port": 0, "drain_announce_s": 0.0, "drain_s": 5.0} | fields
        )
        front = Gateway(settings, discovery or fixed(replicas))
        await front.start()
        serving = sum(replica.state.serving for replica in replicas)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
                running = ReplicaPool(replicas, front, channel)
                if discovery is None:
                    await running.until(lambda: len(front.fleet.serving) == serving)
                yield running
                await front.stop()
        finally:
            for replica in replicas:
                await replica.stop()

    return make


async def fixed(replicas: list[FakeReplica]) -> Discovery:
    yield frozenset(replica.address for replica in replicas)


async def of_queue(queue: asyncio.Queue[frozenset[str]]) -> Discovery:
    """Addresses as a test puts them there."""
    while True:
        yield await queue.get()
