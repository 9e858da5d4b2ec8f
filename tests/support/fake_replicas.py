"""Scripted replicas behind a real gateway; only their answers are fake."""

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
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
REPORT_INTERVAL_S = 0.05

Context = grpc.aio.ServicerContext
Answer = Callable[[bytes, Context], Awaitable[bytes | None]]


class FakeReplica:
    """A replica that answers with its name, or by `answers`, and reports `state` as its load.

    While `silent` is set, it reports nothing. `received` lists method, metadata and remaining
    seconds of each call.
    """

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
        self.silent = False
        self.received: list[tuple[str, dict[str, Any], float | None]] = []
        self.answers: dict[str, Answer] = {}
        self.answer_stream: Callable[[Any, Context], Awaitable[None]] | None = None
        """The handler of `STREAM`; unset: requests are sent back with the replica's name."""
        self.address = ""
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> FakeReplica:
        """Listen on the port; 0 picks a free one."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((_Handler(self),))
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        await self._server.start()
        return self

    async def stop(self) -> None:
        """Stop like a process that was killed: calls in flight break."""
        if self._server is not None:
            await self._server.stop(None)

    def fail(self, method: str, code: grpc.StatusCode, message: str = "no", **rest: Any) -> None:
        """Answer calls of the method with a status."""

        async def fail(request: bytes, context: Context) -> None:
            await context.abort(code, message, **rest)

        self.answers[method] = fail

    @property
    def count(self) -> int:
        """Number of calls received."""
        return len(self.received)


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc ships no types
    def __init__(self, replica: FakeReplica) -> None:
        self.replica = replica

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if details.method == WATCH:
            return grpc.unary_stream_rpc_method_handler(self.watch)
        if details.method in (REFLECT, STREAM):
            own = self.replica.answer_stream if details.method == STREAM else None
            return grpc.stream_stream_rpc_method_handler(own or self.echo)
        function = self.make_answer(details.method)
        if details.method == GENERATE:
            return grpc.unary_stream_rpc_method_handler(function)
        return grpc.unary_unary_rpc_method_handler(function)

    async def watch(self, request: bytes, context: Context) -> None:
        while True:
            if not self.replica.silent:
                await context.write(self.replica.state.SerializeToString())
            await asyncio.sleep(REPORT_INTERVAL_S)

    async def echo(self, requests: Any, context: Context) -> None:
        async for request in requests:
            await context.write(self.replica.name.encode() + request)

    def make_answer(self, method: str) -> Answer:
        async def answer(request: bytes, context: Context) -> bytes | None:
            metadata = dict(context.invocation_metadata())
            self.replica.received.append((method, metadata, context.time_remaining()))
            if method in self.replica.answers:
                return await self.replica.answers[method](request, context)
            return self.replica.name.encode() + request

        return answer


class RunningGateway:
    """Fake replicas, the gateway in front of them, and a channel to it."""

    def __init__(self, replicas: list[FakeReplica], gateway: Gateway, channel: Any) -> None:
        self.replicas, self.gateway, self.channel = replicas, gateway, channel

    @property
    def counts(self) -> list[int]:
        """Number of calls that each replica received."""
        return [replica.count for replica in self.replicas]

    def infer(self, request: bytes = b"", **options: Any) -> Any:
        """Start a call through the gateway."""
        return self.channel.unary_unary(INFER)(request, **({"timeout": 300.0} | options))

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a change of the replicas makes the condition true."""
        async with asyncio.timeout(300):
            while not condition():
                await self.gateway.pool.wait_for_change(0.05)

    def reported_wait_s(self, replica: FakeReplica) -> float:
        """Return the shortest wait that the gateway knows of a replica."""
        return self.gateway.pool.replicas[replica.address].load.report.waits_s[0]


StartGateway = Callable[..., Any]


@pytest.fixture
def start_gateway(monkeypatch: pytest.MonkeyPatch) -> StartGateway:
    """Return a context manager that starts fake replicas and a gateway in front of them.

    `async with start_gateway(2, retry_timeout_s=1) as running`: the number of replicas, or the
    replicas themselves, and fields of `GatewayConfig`.
    """
    monkeypatch.setattr(gateway, "DRAIN_GRACE_S", 0.0)

    @asynccontextmanager
    async def make(
        replicas: int | list[FakeReplica] = 2,
        *,
        discovery: Discovery | None = None,
        **fields: Any,
    ) -> AsyncIterator[RunningGateway]:
        if isinstance(replicas, int):
            replicas = [FakeReplica(f"r{n}") for n in range(replicas)]
        for replica in replicas:
            await replica.start()
        config = GatewayConfig.model_validate(
            {"port": 0, "metrics_port": 0, "drain_announce_s": 0.0, "drain_s": 5.0} | fields
        )
        front = Gateway(config, discovery or discover_fixed(replicas))
        await front.start()
        serving = sum(replica.state.serving for replica in replicas)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
                running = RunningGateway(replicas, front, channel)
                if discovery is None:
                    await running.wait_until(lambda: len(front.pool.serving) == serving)
                yield running
                await front.stop()
        finally:
            for replica in replicas:
                await replica.stop()

    return make


async def discover_fixed(replicas: list[FakeReplica]) -> Discovery:
    """Yield the addresses of the replicas once."""
    yield frozenset(replica.address for replica in replicas)


async def discover_from_queue(queue: asyncio.Queue[frozenset[str]]) -> Discovery:
    """Yield each set of addresses that a test puts into the queue."""
    while True:
        yield await queue.get()
