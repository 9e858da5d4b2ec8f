"""Passes calls through: bytes in, bytes out, with their metadata, deadlines and statuses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor

from ladderstitch.api.status import Context, abort
from ladderstitch.errors import Draining, Overloaded, RequestError
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.metrics import GatewayMetrics
from ladderstitch.gateway.replica_pool import ReplicaPool
from ladderstitch.gateway.upstream_call import (
    RequestAttempts,
    UpstreamFailure,
    ask,
    ask_stream,
    converse,
)

RETRY_AFTER_S = 0.5
UNAVAILABLE, NOT_FOUND = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND

Ask = Callable[..., Awaitable[bytes | None]]


class Forwarder(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc ships no types
    """Answers some methods by asking replicas."""

    def __init__(
        self,
        methods: Iterable[MethodDescriptor],
        fleet: ReplicaPool,
        metrics: GatewayMetrics,
        settings: GatewayConfig,
    ) -> None:
        self.draining = False
        self._fleet, self._metrics = fleet, metrics
        self._patience_s = settings.retry_timeout_s
        self._held_limit_bytes = settings.max_buffered_mb << 20
        self._held_bytes = 0
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._handlers = {path_of(method): self._handler(method) for method in methods}

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(details.method)

    async def idle(self, within_s: float) -> bool:
        """Wait until nothing is under way, at most so long; whether it came to that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        return self._idle.is_set()

    def _handler(self, method: MethodDescriptor) -> grpc.RpcMethodHandler:
        """Without serializers: messages stay bytes."""
        path = path_of(method)
        if method.client_streaming:

            async def pass_on(requests: Any, context: Context) -> None:
                async with self._attempts(path, context) as attempts:
                    await converse(await attempts.next(), path, requests, context, attempts)

            return grpc.stream_stream_rpc_method_handler(pass_on)
        one_reply = not method.server_streaming
        persist_with: Ask = ask if one_reply else ask_stream

        async def forward(request: bytes, context: Context) -> bytes | None:
            async with self._attempts(path, context) as attempts:
                with self._room_for(request):
                    return await _persist(attempts, persist_with, path, request, context)

        if one_reply:
            return grpc.unary_unary_rpc_method_handler(forward)
        return grpc.unary_stream_rpc_method_handler(forward)

    @asynccontextmanager
    async def _attempts(self, path: str, context: Context) -> AsyncIterator[RequestAttempts]:
        """The caller's time; what is raised within becomes the caller's status."""
        attempts = RequestAttempts(
            self._fleet, context.time_remaining(), context.invocation_metadata(), self._patience_s
        )
        code = "CANCELLED"
        self._under_way += 1
        self._idle.clear()
        try:
            if self.draining:
                raise Draining("this gateway is shutting down; try another one")
            yield attempts
            code = "OK"
        except RequestError as error:
            code = error.code
            await abort(context, error)
        except UpstreamFailure as failure:
            code = failure.code.name
            await failure.tell(context)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
            self._metrics.ended(path, code, attempts)

    @contextmanager
    def _room_for(self, request: bytes) -> Iterator[None]:
        """Raises `Overloaded` if more is held than memory is meant for."""
        self._held_bytes += len(request)
        try:
            if self._held_bytes > self._held_limit_bytes:
                limit_mb = self._held_limit_bytes >> 20
                raise Overloaded(f"the gateway holds {limit_mb} MiB of requests", RETRY_AFTER_S)
            yield
        finally:
            self._held_bytes -= len(request)


async def _persist(
    attempts: RequestAttempts, ask_one: Ask, path: str, request: bytes, context: Context
) -> bytes | None:
    """Ask one replica after another until one answers, or says what no other would say better."""
    failure: UpstreamFailure | None = None
    while True:
        try:
            link = await attempts.next()
        except RequestError:
            if failure is not None:
                raise failure from None
            raise
        try:
            reply = await ask_one(link, path, request, context, attempts)
        except UpstreamFailure as failed:
            if failed.sick:
                link.failed()
            elsewhere = failed.code == NOT_FOUND and attempts.other_models(link)
            if failed.begun or not (elsewhere or failed.code == UNAVAILABLE):
                raise
            failure = failed
        else:
            link.succeeded()
            return reply


def path_of(method: MethodDescriptor) -> str:
    """As it is on the wire."""
    return f"/{method.containing_service.full_name}/{method.name}"
