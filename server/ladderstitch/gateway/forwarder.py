"""Forwards calls to replicas as bytes, with their metadata, deadlines and statuses."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError

from ladderstitch.api.status import Context, abort
from ladderstitch.errors import Draining, RequestError
from ladderstitch.gateway.buffered_requests import BufferedRequests
from ladderstitch.gateway.continued_answer import GENERATE, ContinuedAnswer
from ladderstitch.gateway.in_flight import InFlightCalls
from ladderstitch.gateway.metrics import GatewayMetrics
from ladderstitch.gateway.replica_pool import ReplicaPool
from ladderstitch.gateway.stream_limits import LimitedStream
from ladderstitch.gateway.upstream_call import (
    RequestAttempts,
    UpstreamFailure,
    forward_bidi,
    forward_stream,
    forward_unary,
)
from ladderstitch.oip.grpc_service_pb2 import ModelInferRequest, ModelReadyRequest

MODEL_READY = "/inference.GRPCInferenceService/ModelReady"
MODEL_STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
UNAVAILABLE, NOT_FOUND = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND

ForwardCall = Callable[..., Awaitable[bytes | None]]
"""`forward_unary` or `forward_stream`."""


class Forwarder(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc ships no types
    """The handler of all methods that replicas answer.

    While `draining` is set, new calls are rejected with DRAINING.
    """

    def __init__(
        self,
        methods: Iterable[MethodDescriptor],
        pool: ReplicaPool,
        metrics: GatewayMetrics,
        buffered: BufferedRequests,
        retry_timeout_s: float,
    ) -> None:
        self.draining = False
        self._pool, self._metrics = pool, metrics
        self._buffered, self._retry_timeout_s = buffered, retry_timeout_s
        self.in_flight = InFlightCalls()
        self._handlers = {method_path(method): self._make_handler(method) for method in methods}

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return the handler of a method; None if it is not forwarded."""
        return self._handlers.get(details.method)

    def _make_handler(self, method: MethodDescriptor) -> grpc.RpcMethodHandler:
        """Return a handler without serializers, so that messages stay bytes."""
        path = method_path(method)
        if method.client_streaming:

            async def forward_both_ways(requests: Any, context: Context) -> None:
                stream = LimitedStream(path, context)
                async with self._attempts(path, context) as attempts:
                    with contextlib.closing(stream):
                        admitted = stream.admitted(requests)
                        if path == MODEL_STREAM_INFER:
                            admitted = await _prefer_owners_of_first(attempts, admitted)
                        replica = await attempts.next_replica()
                        await forward_bidi(replica, path, admitted, stream, attempts)

            return grpc.stream_stream_rpc_method_handler(forward_both_ways)
        forward_call: ForwardCall = forward_stream if method.server_streaming else forward_unary

        async def forward(request: bytes, context: Context) -> bytes | None:
            async with self._attempts(path, context) as attempts:
                if path == MODEL_READY:
                    _prefer_owners(attempts, request)
                with self._buffered.one() as add_bytes:
                    add_bytes(len(request))
                    return await _forward_with_retries(
                        forward_call, attempts, path, request, context
                    )

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(forward)
        return grpc.unary_unary_rpc_method_handler(forward)

    @asynccontextmanager
    async def _attempts(self, path: str, context: Context) -> AsyncIterator[RequestAttempts]:
        """Yield the attempts of a call, and end the call with the status of what is raised."""
        attempts = RequestAttempts(
            self._pool,
            context.time_remaining(),
            context.invocation_metadata(),
            self._retry_timeout_s,
        )
        code = "CANCELLED"
        with self.in_flight.one():
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
                await failure.abort_caller(context)
            finally:
                self._metrics.observe_call(path, code, attempts)


def _prefer_owners(attempts: RequestAttempts, request: bytes) -> None:
    """Let a replica that has the model say whether it is ready, if there is one.

    The others may know the model, too, and say that it is not ready. A malformed request is left
    to the replica, which rejects it.
    """
    with contextlib.suppress(DecodeError):
        attempts.prefer_model(ModelReadyRequest.FromString(request).name)


async def _prefer_owners_of_first(
    attempts: RequestAttempts, requests: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    """Wait for the first request of a stream, and prefer replicas with its model.

    Returns all requests of the stream.
    """
    first = await anext(requests, None)
    if first is not None:
        with contextlib.suppress(DecodeError):
            attempts.prefer_model(ModelInferRequest.FromString(first).model_name)

    async def all_requests() -> AsyncIterator[bytes]:
        if first is not None:
            yield first
        async for request in requests:
            yield request

    return all_requests()


async def _forward_with_retries(
    forward_call: ForwardCall,
    attempts: RequestAttempts,
    path: str,
    request: bytes,
    context: Context,
) -> bytes | None:
    """Try one replica after another until one answers, or fails with a status that is final.

    UNAVAILABLE is retried, and NOT_FOUND at replicas with other models, as long as the caller has
    received nothing. An answer of `GENERATE` that has begun goes on at another replica. Raises the
    last `UpstreamFailure` when the time is up.
    """
    failure: UpstreamFailure | None = None
    answer, more = None, dict[str, ContinuedAnswer]()
    if path == GENERATE:
        answer = ContinuedAnswer(request, attempts.arrival)
        more = {"answer": answer}
    while True:
        try:
            replica = await attempts.next_replica()
        except RequestError:
            if failure is not None:
                raise failure from None
            raise
        if answer is not None:
            answer.begin()
        try:
            reply = await forward_call(replica, path, request, context, attempts, **more)
        except UpstreamFailure as failed:
            if failed.counts_against_replica:
                replica.record_failure()
            if answer is not None and answer.finished:
                return None  # only the status was lost
            if answer is not None and answer.can_continue and failed.code == UNAVAILABLE:
                if answer.has_grown:
                    attempts.begin_again(replica)
                failure = failed
                continue
            retry_elsewhere = failed.code == NOT_FOUND and attempts.exclude_same_models(replica)
            if failed.response_started or not (retry_elsewhere or failed.code == UNAVAILABLE):
                raise
            failure = failed
        else:
            replica.record_success()
            return reply


def method_path(method: MethodDescriptor) -> str:
    """Return the method's path on the wire: `/package.Service/Method`."""
    return f"/{method.containing_service.full_name}/{method.name}"
