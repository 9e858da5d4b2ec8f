"""Forwards HTTP requests to replicas: OpenAI's API and the page behind a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from prometheus_client.exposition import choose_encoder
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ladderstitch.addresses import is_loopback
from ladderstitch.api.auth import AuthInterceptor
from ladderstitch.api.openai.access import HEALTH_PATH, AccessMiddleware
from ladderstitch.api.openai.cors import cors_options
from ladderstitch.api.openai.errors import error_response
from ladderstitch.api.openai.event_marks import ANSWER_HEADER
from ladderstitch.api.openai.hosts import HostMiddleware, checked_hosts
from ladderstitch.api.openai.request_ids import CODES, RequestIdMiddleware
from ladderstitch.api.page.assets import page_assets
from ladderstitch.errors import Draining, NotReady, RequestError
from ladderstitch.gateway.buffered_requests import BufferedRequests
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.continued_events import CONTINUED_PATHS, ContinuedEvents
from ladderstitch.gateway.http_exchange import (
    LOST,
    NOT_FOUND,
    RETRIED,
    HttpExchange,
    HttpRefusal,
    ReplicaLost,
)
from ladderstitch.gateway.http_request import HttpRequest, forwarded_request_headers
from ladderstitch.gateway.in_flight import InFlightCalls
from ladderstitch.gateway.metrics import GatewayMetrics
from ladderstitch.gateway.replica_client import ReplicaClient
from ladderstitch.gateway.replica_connection import ReplicaConnection
from ladderstitch.gateway.replica_pool import ReplicaPool
from ladderstitch.gateway.upstream_call import RequestAttempts

PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/responses",
    }
)
"""Paths that are counted by their names; all others are counted together."""
OTHER_PATHS = "other"


class _Outcome:
    """How a request ended, as the caller sees it."""

    def __init__(self, send: Send) -> None:
        self._send, self._status, self._complete = send, 0, False
        self.lost = False
        """Whether the replica was lost in the middle of the response."""

    async def send(self, message: Message) -> None:
        """Send a message to the caller."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
        await self._send(message)
        self._complete = message["type"] == "http.response.body" and not message.get("more_body")

    @property
    def code(self) -> str:
        """Name of the gRPC status that the end corresponds to."""
        if self.lost:
            return "UNAVAILABLE"
        return CODES.get(self._status, "INTERNAL") if self._complete else "CANCELLED"


def gateway_app(
    config: GatewayConfig,
    forwarder: HttpForwarder,
    auth: AuthInterceptor | None,
    metrics: GatewayMetrics,
    buffered: BufferedRequests,
) -> ASGIApp:
    """Return the application of a gateway's HTTP port, which admits requests as a replica does.

    `/metrics` is the gateway's own; all other paths but `/health` are forwarded.
    """

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/metrics":
            encode, kind = choose_encoder(Headers(scope=scope).get("accept", ""))
            page = await asyncio.to_thread(encode, metrics.registry)
            await Response(page, media_type=kind)(scope, receive, send)
        else:
            await forwarder(scope, receive, send)

    application: ASGIApp = AccessMiddleware(
        dispatch,
        auth=auth,
        max_body_bytes=lambda: config.max_message_mb << 20,
        body_timeout_s=config.message_timeout_s,
        max_unfinished=config.max_unfinished_messages,
        open_paths=page_assets().keys(),
        count_body=buffered.one,
    )
    hosts = checked_hosts(config, has_tokens=auth is not None)
    if hosts is not None:
        application = HostMiddleware(application, hosts)
    application = RequestIdMiddleware(application)
    cors = cors_options(config.cors_origins, trusts_loopback=is_loopback(config.host))
    return CORSMiddleware(application, **cors) if cors else application


class HttpForwarder:
    """The ASGI application of a gateway's HTTP port.

    A request that a replica cannot answer for now is sent to another one, as long as the caller has
    received nothing. While `draining` is set, new requests are rejected.
    """

    def __init__(
        self,
        client: ReplicaClient,
        pool: ReplicaPool,
        metrics: GatewayMetrics,
        retry_timeout_s: float,
        is_serving: Callable[[], bool],
    ) -> None:
        self.draining = False
        self._client, self._pool, self._metrics = client, pool, metrics
        self._retry_timeout_s, self._is_serving = retry_timeout_s, is_serving
        self.in_flight = InFlightCalls()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whose body arrives in one piece."""
        if scope["type"] != "http":
            return
        if scope["path"] == HEALTH_PATH:
            serving = self._is_serving()
            await JSONResponse({"serving": serving}, 200 if serving else 503)(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else OTHER_PATHS
        outcome = _Outcome(send)
        async with self._counted(path, scope, outcome) as attempts:
            body = (await receive()).get("body", b"") if scope["method"] == "POST" else b""
            exchange = _make_exchange(scope, body, outcome.send, attempts.arrival)
            answering = asyncio.create_task(self._answer(exchange, attempts, outcome))
            leaving = asyncio.create_task(_wait_for_disconnect(receive))
            try:
                await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not answering.done():
                    return  # the caller has left
                response = answering.result()
            finally:
                for task in (answering, leaving):
                    task.cancel()
                await asyncio.gather(answering, leaving, return_exceptions=True)
            if response is not None:
                await response(scope, receive, outcome.send)

    @asynccontextmanager
    async def _counted(
        self, path: str, scope: Scope, outcome: _Outcome
    ) -> AsyncIterator[RequestAttempts]:
        """Count a request as in flight, and by its path and outcome."""
        metadata = tuple(Headers(scope=scope).items())
        attempts = RequestAttempts(self._pool, None, metadata, self._retry_timeout_s)
        try:
            with self.in_flight.one():
                yield attempts
        finally:
            self._metrics.observe_call(f"HTTP {path}", outcome.code, attempts)

    async def _answer(
        self, exchange: HttpExchange, attempts: RequestAttempts, outcome: _Outcome
    ) -> Response | None:
        """Pass a replica's response on; return the response if it is the gateway's own."""
        if self.draining:
            return error_response(Draining("this gateway is shutting down; try another one"))
        if len({replica.models for replica in self._pool.serving}) > 1 and exchange.request.body:
            attempts.prefer_model(exchange.request.model)
        refusal: HttpRefusal | None = None
        while True:
            try:
                replica = await attempts.next_replica()
            except RequestError as error:
                if refusal is not None:
                    await _refuse(exchange, refusal, outcome)
                    return None
                return await _end(exchange, error, outcome)
            if replica.state is None or not replica.state.http_port:
                lacking = NotReady(f"replica {replica.address} has no HTTP port")
                return await _end(exchange, lacking, outcome)
            try:
                refusal = await self._try(replica, exchange, attempts)
            except ReplicaLost as error:
                replica.record_failure()
                if error.started and not exchange.can_continue:
                    return await _end(exchange, NotReady(LOST), outcome)
                if exchange.has_grown:
                    attempts.begin_again(replica)
                continue
            replica.record_success()
            if refusal is None:
                return None
            retried = refusal.status in RETRIED or (
                refusal.status == NOT_FOUND and attempts.exclude_same_models(replica)
            )
            if not retried:
                await _refuse(exchange, refusal, outcome)
                return None

    async def _try(
        self, replica: ReplicaConnection, exchange: HttpExchange, attempts: RequestAttempts
    ) -> HttpRefusal | None:
        """Run an exchange with a replica, which ends if the replica stops reporting."""
        call = exchange.start(self._client, replica, attempts.held_us)
        ticket = replica.add_call(exchange, attempts.soft_deadline)
        try:
            await asyncio.wait({call})
            if call.cancelled():
                raise ReplicaLost("no load report", started=exchange.started)
            return call.result()
        finally:
            replica.remove_call(exchange, ticket)
            if not call.done():
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)


async def _end(exchange: HttpExchange, error: RequestError, outcome: _Outcome) -> Response | None:
    """Return the response of an error, or end the one that the caller has a part of."""
    if not exchange.started:
        return error_response(error)
    outcome.lost = True
    if not await exchange.end_events():
        raise ConnectionAbortedError(LOST) from error
    return None


async def _refuse(exchange: HttpExchange, refusal: HttpRefusal, outcome: _Outcome) -> None:
    outcome.lost = exchange.started
    await exchange.refuse(refusal)


def _make_exchange(scope: Scope, body: bytes, send: Send, arrival: float) -> HttpExchange:
    """Return the exchange of a request that arrived at `arrival` (`time.monotonic`)."""
    request = _read_request(scope, body)
    if scope["method"] != "POST" or scope["path"] not in CONTINUED_PATHS:
        return HttpExchange(request, send)
    given_name = Headers(scope=scope).get(ANSWER_HEADER)
    return HttpExchange(request, send, ContinuedEvents(body, given_name, arrival))


def _read_request(scope: Scope, body: bytes) -> HttpRequest:
    query = scope["query_string"].decode("latin-1")
    target = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
    return HttpRequest(
        scope["method"],
        f"{target}?{query}" if query else target,
        forwarded_request_headers(scope["headers"]),
        body,
    )


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
