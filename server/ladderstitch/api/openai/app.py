"""The HTTP routes of OpenAI's API: completions and chats, whole or streamed, models and health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from ladderstitch.api.auth import AuthInterceptor
from ladderstitch.api.native.generation import tenant_of
from ladderstitch.api.openai.access import IN_FLIGHT, AccessMiddleware, rejection_response
from ladderstitch.api.openai.body import BodyRejected, max_body_bytes, parse_body
from ladderstitch.api.openai.models import NamedModel, find_model, named_models
from ladderstitch.api.openai.requests import (
    ChatRequest,
    CompletionRequest,
    StreamOptions,
    build_generation_request,
)
from ladderstitch.api.openai.responses import (
    DONE,
    ERROR_TYPES,
    Body,
    ResponseBuilder,
    error_body,
    error_response,
    malformed_body,
    server_sent_event,
)
from ladderstitch.errors import InternalError, RequestError
from ladderstitch.hosting.registry import ModelRegistry, TextModel
from ladderstitch.scheduling.requests import GenerationRequest, TokenChunk
from ladderstitch.text.scheduler.sequence import TokenStream

T = TypeVar("T")

CLIENT_CLOSED_REQUEST = Response(status_code=499)
"""499: client closed the connection."""


CORS_MAX_AGE_S = 600
"""Seconds for which browsers remember which requests are allowed."""

STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Headers of streams: caches and nginx pass every event on at once."""


def create_app(
    registry: ModelRegistry,
    auth: AuthInterceptor | None,
    max_message_bytes: int,
    *,
    body_timeout_s: float = 30.0,
    max_unfinished: int = 128,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """Return the application; without `auth`, callers need no token.

    Bodies have at most `max_message_bytes`, and less if no model can take as many. They must
    arrive within `body_timeout_s` seconds, at most `max_unfinished` at once. Browsers may call it
    from the pages of `cors_origins`, or of all origins for `*`.
    """
    app = FastAPI(title="ladderstitch", openapi_url=None, redirect_slashes=False)
    app.add_middleware(
        AccessMiddleware,
        auth=auth,
        max_body_bytes=lambda: max_body_bytes(registry, max_message_bytes),
        body_timeout_s=body_timeout_s,
        max_unfinished=max_unfinished,
    )
    if cors_origins:  # added last, it comes first: browsers ask without a token
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["retry-after", "retry-after-ms"],
            max_age=CORS_MAX_AGE_S,
        )
    _add_error_handlers(app)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        return JSONResponse({"serving": registry.serving}, 200 if registry.serving else 503)

    @app.get("/v1/models")
    async def list_models(request: Request) -> Body:
        async with _in_flight(request):
            models = [named.describe() for named in named_models(registry)]
            return {"object": "list", "data": models}

    @app.get("/v1/models/{name}")
    async def get_model(name: str, request: Request) -> Body:
        async with _in_flight(request):
            return find_model(registry, name).describe()

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await _respond(registry, CompletionRequest, request)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _respond(registry, ChatRequest, request)

    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def handle_request_error(_: Request, error: RequestError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(BodyRejected)
    async def handle_rejected_body(_: Request, error: BodyRejected) -> JSONResponse:
        return rejection_response(error)

    @app.exception_handler(RequestValidationError)
    async def handle_malformed_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(malformed_body(error))

    @app.exception_handler(HTTPException)
    async def handle_http_error(_: Request, error: HTTPException) -> JSONResponse:
        kind = ERROR_TYPES.get(error.status_code, "server_error")
        body = {"error": {"message": str(error.detail), "type": kind}}
        return JSONResponse(body, error.status_code)

    @app.exception_handler(Exception)
    async def handle_internal_error(_: Request, error: Exception) -> JSONResponse:
        return error_response(InternalError.logged("HTTP request", error))


class EventStreamResponse(StreamingResponse):
    """A stream of server-sent events that owns resources and closes them however it ends.

    The generator of the events alone cannot close them: if the client disconnects before the head
    of the response is sent, the generator is never started.
    """

    def __init__(self, events: AsyncGenerator[str], resources: AsyncExitStack) -> None:
        super().__init__(events, headers=STREAM_HEADERS, media_type="text/event-stream")
        self._events, self._resources = events, resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head and the events."""
        async with self._resources, aclosing(self._events):
            await super().__call__(scope, receive, send)


def _in_flight(request: Request) -> AsyncExitStack:
    """Return the stack that counts the request as in flight until it is closed."""
    in_flight: AsyncExitStack = request.scope[IN_FLIGHT]
    return in_flight.pop_all()


async def _respond(
    registry: ModelRegistry, fields: type[CompletionRequest | ChatRequest], request: Request
) -> Response:
    arrival = time.monotonic()
    async with _in_flight(request) as resources:
        body = await parse_body(request, fields)
        named = find_model(registry, body.model)
        model, accepted = named.model, await _accept(named, body, request, arrival)
        builder = ResponseBuilder(
            model, isinstance(body, ChatRequest), accepted.logprobs is not None, named.id
        )
        if not body.stream:
            whole = await _run_until_disconnect(_collect(model, accepted, builder), request)
            return CLIENT_CLOSED_REQUEST if whole is None else JSONResponse(whole)
        stream = await resources.enter_async_context(aclosing(model.scheduler.generate(accepted)))
        # An error before the first token still gets its own HTTP status.
        first = await _run_until_disconnect(stream.__anext__(), request)
        if first is None:
            return CLIENT_CLOSED_REQUEST
        options, owned = body.stream_options or StreamOptions(), resources.pop_all()
        include_usage = bool(options.include_usage)
        events = _events(first, stream, builder, owned, include_usage=include_usage)
        return EventStreamResponse(events, owned)


async def _accept(
    named: NamedModel,
    body: CompletionRequest | ChatRequest,
    request: Request,
    arrival: float,
) -> GenerationRequest:
    tenant = tenant_of(request.headers.items())
    try:
        return await build_generation_request(body, named, request.headers, arrival, tenant)
    except RequestError as error:
        named.model.metrics.observe_rejection(error.code, had_budget=False)
        raise


async def _events(
    first: TokenChunk,
    stream: TokenStream,
    builder: ResponseBuilder,
    resources: AsyncExitStack,
    *,
    include_usage: bool,
) -> AsyncGenerator[str]:
    """Yield the events of a stream; the last one is [DONE] or the error that ended it.

    The resources are closed before the last event: the client may send its next request then.
    """
    try:
        async with resources:
            chunk = first
            while chunk.usage is None:
                yield server_sent_event(builder.chunk(chunk))
                chunk = await anext(stream)
            yield server_sent_event(builder.chunk(chunk))
            if include_usage:
                yield server_sent_event(builder.usage_chunk(chunk.usage, chunk))
        last_event = DONE
    except RequestError as error:
        last_event = server_sent_event(error_body(error))
    except Exception as error:
        last_event = server_sent_event(error_body(InternalError.logged("HTTP stream", error)))
    yield last_event


async def _run_until_disconnect(work: Coroutine[Any, Any, T], request: Request) -> T | None:
    """Return the result of `work`, or cancel it and return None if the client disconnects."""
    working = asyncio.create_task(work)
    disconnecting = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({working, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, disconnecting):
            task.cancel()
        await asyncio.gather(working, disconnecting, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect(model: TextModel, accepted: GenerationRequest, builder: ResponseBuilder) -> Body:
    chunks: list[TokenChunk] = []
    async with aclosing(model.scheduler.generate(accepted)) as stream:
        async for chunk in stream:
            chunks.append(chunk)
            if chunk.usage is not None:
                return builder.full_response(chunks, chunk.usage)
    raise AssertionError("the last chunk of an answer has its usage")
