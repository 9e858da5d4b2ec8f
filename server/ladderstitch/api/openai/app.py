"""The HTTP routes: completions and chats, whole or streamed; models; health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ladderstitch.api.auth import AuthInterceptor
from ladderstitch.api.openai.requests import ChatRequest, CompletionRequest, accept
from ladderstitch.api.openai.responses import (
    DONE,
    KINDS,
    Body,
    ResponseBuilder,
    body_of,
    event,
    response_to,
)
from ladderstitch.errors import InternalError, InvalidArgument, RequestError
from ladderstitch.hosting.registry import ModelRegistry, TextModel
from ladderstitch.hosting.streaming import GenerationUsage, answer
from ladderstitch.scheduling.requests import GenerationRequest, TokenChunk
from ladderstitch.security.tokens import tenant_of

Told = tuple[TokenChunk, GenerationUsage | None]
T = TypeVar("T")

CLIENT_CLOSED_REQUEST = Response(status_code=499)
"""To a caller who hung up: nobody reads it."""


def build(registry: ModelRegistry, guard: AuthInterceptor | None, max_body_bytes: int) -> FastAPI:
    """The application; `guard` asks for tokens, None lets everyone in."""
    app = FastAPI(title="ladderstitch", openapi_url=None)

    app.add_middleware(MaxBodySizeMiddleware, most_bytes=max_body_bytes)

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> JSONResponse:
        return response_to(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return response_to(InvalidArgument(where, first["msg"]))

    @app.exception_handler(HTTPException)
    async def unroutable(_: Request, error: HTTPException) -> JSONResponse:
        told = {"message": str(error.detail), "type": KINDS.get(error.status_code, "server_error")}
        return JSONResponse({"error": told}, error.status_code)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return response_to(InternalError.logged("over HTTP", error))

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"serving": registry.serving}, 200 if registry.serving else 503)

    @app.get("/v1/models")
    async def models(request: Request) -> Body:
        async with _enter(guard, request):
            return {
                "object": "list",
                "data": [_described(m) for m in registry.text_models.values()],
            }

    @app.get("/v1/models/{name}")
    async def model(name: str, request: Request) -> Body:
        async with _enter(guard, request):
            return _described(registry.text_model(name))

    @app.post("/v1/completions")
    async def completions(wishes: CompletionRequest, request: Request) -> Response:
        return await _respond(registry, guard, wishes, request)

    @app.post("/v1/chat/completions")
    async def chats(wishes: ChatRequest, request: Request) -> Response:
        return await _respond(registry, guard, wishes, request)

    return app


class MaxBodySizeMiddleware:
    """ASGI middleware: a body that grows too large ends its request, whatever its headers say."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most_bytes:
                raise HTTPException(413, f"body: expected at most {self.most_bytes} bytes")
            return message

        await self.app(scope, bounded, send)


def _enter(guard: AuthInterceptor | None, request: Request) -> AsyncExitStack:
    """Raises `Unauthenticated`, `PermissionDenied`, `RateLimited`; the stack holds the caller's place."""
    held = AsyncExitStack()
    if guard is not None:
        token = guard.admit(request.headers.items(), "inference")
        held.enter_context(guard.limits.admitted(token))
    return held


async def _respond(
    registry: ModelRegistry,
    guard: AuthInterceptor | None,
    wishes: CompletionRequest | ChatRequest,
    request: Request,
) -> Response:
    arrival = time.monotonic()
    held = _enter(guard, request)
    try:
        model = registry.text_model(wishes.model)
        tenant = tenant_of(request.headers.items())
        try:
            accepted = accept(wishes, model, request.headers, arrival, tenant)
        except RequestError as error:
            model.metrics.refused(error.code, had_budget=False)
            raise
        form = ResponseBuilder(
            model, isinstance(wishes, ChatRequest), accepted.logprobs is not None
        )
        if not wishes.stream:
            async with held:
                body = await _unless_gone(_collect(model, accepted, form), request)
                return CLIENT_CLOSED_REQUEST if body is None else JSONResponse(body)
        # What ends an answer before its first token is still a status of its own.
        pieces = answer(model, accepted)
        first = await _unless_gone(_first(pieces), request)
    except BaseException:
        await held.aclose()
        raise
    if first is None:
        await held.aclose()
        return CLIENT_CLOSED_REQUEST
    usage = wishes.stream_options is not None and wishes.stream_options.include_usage
    events = _events(first, pieces, form, held, usage=usage)
    return StreamingResponse(events, media_type="text/event-stream")


async def _first(pieces: AsyncGenerator[Told]) -> Told:
    try:
        return await anext(pieces)
    except BaseException:
        await pieces.aclose()
        raise


async def _events(
    first: Told,
    pieces: AsyncGenerator[Told],
    form: ResponseBuilder,
    held: AsyncExitStack,
    *,
    usage: bool,
) -> AsyncIterator[str]:
    """A stream's events; it ends with [DONE], or with the error that ended it."""
    async with held, aclosing(pieces):
        try:
            told = first
            while True:
                piece, account = told
                yield event(form.chunk(piece))
                if account is not None:
                    if usage:
                        yield event(form.last(account, piece))
                    yield DONE
                    return
                told = await anext(pieces)
        except RequestError as error:
            yield event(body_of(error))
        except Exception as error:
            yield event(body_of(InternalError.logged("over HTTP", error)))


async def _unless_gone(work: Coroutine[Any, Any, T], request: Request) -> T | None:
    """What the work brings; None if the caller hangs up before, which ends the work."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _collect(model: TextModel, accepted: GenerationRequest, form: ResponseBuilder) -> Body:
    pieces: list[TokenChunk] = []
    async with aclosing(answer(model, accepted)) as coming:
        async for piece, account in coming:
            pieces.append(piece)
            if account is not None:
                return form.whole(pieces, account)
    raise AssertionError("an answer ends with an account")


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _described(model: TextModel) -> Body:
    created = int((model.bundle.path / "model.yaml").stat().st_mtime)
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "ladderstitch",
        "max_model_len": model.scheduler.max_tokens,
        "paths": {str(n): way.name for n, way in enumerate(model.bundle.manifest.ways)},
    }
