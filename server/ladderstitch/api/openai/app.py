"""The HTTP routes of OpenAI's API: completions and chats, whole or streamed, models and health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ladderstitch.api.auth import AuthInterceptor
from ladderstitch.api.native.generation import tenant_of
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
    server_sent_event,
)
from ladderstitch.errors import InternalError, InvalidArgument, RequestError
from ladderstitch.hosting.registry import ModelRegistry, TextModel
from ladderstitch.scheduling.requests import GenerationRequest, TokenChunk
from ladderstitch.text.scheduler.sequence import TokenStream

T = TypeVar("T")

CLIENT_CLOSED_REQUEST = Response(status_code=499)
"""499: client closed the connection."""


def create_app(
    registry: ModelRegistry, auth: AuthInterceptor | None, max_body_bytes: int
) -> FastAPI:
    """Return the application; without `auth`, callers need no token."""
    app = FastAPI(title="ladderstitch", openapi_url=None)
    app.add_middleware(MaxBodySizeMiddleware, max_bytes=max_body_bytes)
    _add_error_handlers(app)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"serving": registry.serving}, 200 if registry.serving else 503)

    @app.get("/v1/models")
    async def list_models(request: Request) -> Body:
        async with _authorize(auth, request):
            models = [_describe_model(model) for model in registry.text_models.values()]
            return {"object": "list", "data": models}

    @app.get("/v1/models/{name}")
    async def get_model(name: str, request: Request) -> Body:
        async with _authorize(auth, request):
            return _describe_model(registry.text_model(name))

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await _respond(registry, auth, body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _respond(registry, auth, body, request)

    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def handle_request_error(_: Request, error: RequestError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def handle_malformed_body(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return error_response(InvalidArgument(field, first["msg"]))

    @app.exception_handler(HTTPException)
    async def handle_http_error(_: Request, error: HTTPException) -> JSONResponse:
        kind = ERROR_TYPES.get(error.status_code, "server_error")
        body = {"error": {"message": str(error.detail), "type": kind}}
        return JSONResponse(body, error.status_code)

    @app.exception_handler(Exception)
    async def handle_internal_error(_: Request, error: Exception) -> JSONResponse:
        return error_response(InternalError.logged("HTTP request", error))


class MaxBodySizeMiddleware:
    """ASGI middleware that ends a request with 413 once its body exceeds `max_bytes`.

    It counts the bytes that arrive, so that a wrong Content-Length changes nothing.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application on one request."""
        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, f"body: expected at most {self.max_bytes} bytes, got more")
            return message

        await self.app(scope, receive_bounded, send)


class EventStreamResponse(StreamingResponse):
    """A stream of server-sent events that owns resources and closes them however it ends.

    The generator of the events alone cannot close them: if the client disconnects before the head
    of the response is sent, the generator is never started.
    """

    def __init__(self, events: AsyncGenerator[str], resources: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events, self._resources = events, resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head and the events."""
        async with self._resources, aclosing(self._events):
            await super().__call__(scope, receive, send)


def _authorize(auth: AuthInterceptor | None, request: Request) -> AsyncExitStack:
    """Check the caller's token, and count the request as in flight until the stack is closed.

    Raises `Unauthenticated`, `PermissionDenied` or `RateLimited`.
    """
    in_flight = AsyncExitStack()
    if auth is not None:
        token = auth.authorize(request.headers.items(), "inference")
        in_flight.enter_context(auth.limiter.acquire(token))
    return in_flight


async def _respond(
    registry: ModelRegistry,
    auth: AuthInterceptor | None,
    body: CompletionRequest | ChatRequest,
    request: Request,
) -> Response:
    arrival = time.monotonic()
    async with _authorize(auth, request) as resources:
        model, accepted = _accept(registry, body, request, arrival)
        builder = ResponseBuilder(
            model, isinstance(body, ChatRequest), accepted.logprobs is not None
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


def _accept(
    registry: ModelRegistry,
    body: CompletionRequest | ChatRequest,
    request: Request,
    arrival: float,
) -> tuple[TextModel, GenerationRequest]:
    model = registry.text_model(body.model)
    tenant = tenant_of(request.headers.items())
    try:
        return model, build_generation_request(body, model, request.headers, arrival, tenant)
    except RequestError as error:
        model.metrics.observe_rejection(error.code, had_budget=False)
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


def _describe_model(model: TextModel) -> Body:
    created = int((model.bundle.path / "model.yaml").stat().st_mtime)
    variants = model.bundle.manifest.variants
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "ladderstitch",
        "max_model_len": model.scheduler.max_tokens,
        "variants": {str(number): variant.name for number, variant in enumerate(variants)},
    }
