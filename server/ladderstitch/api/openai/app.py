"""The HTTP routes of OpenAI's API: completions and chats, whole or streamed, models and health."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ladderstitch.addresses import is_loopback
from ladderstitch.api.auth import AuthInterceptor
from ladderstitch.api.openai.access import AccessMiddleware, rejection_response
from ladderstitch.api.openai.answers import answer_request, answer_response_request, in_flight
from ladderstitch.api.openai.bodies import ChatRequest, CompletionRequest
from ladderstitch.api.openai.body import max_body_bytes, parse_body
from ladderstitch.api.openai.cors import cors_options
from ladderstitch.api.openai.errors import ERROR_TYPES, Body, BodyRejected, error_response
from ladderstitch.api.openai.fields import EmbeddingRequest
from ladderstitch.api.openai.hosts import HostMiddleware, checked_hosts
from ladderstitch.api.openai.models import find_model, named_models
from ladderstitch.api.openai.request_ids import RequestIdMiddleware
from ladderstitch.api.openai.responses import malformed_body
from ladderstitch.api.page.assets import page_assets
from ladderstitch.api.page.routes import add_page, max_page_body_bytes
from ladderstitch.config import ServerConfig
from ladderstitch.errors import InternalError, InvalidArgument, RequestError
from ladderstitch.hosting.registry import ModelRegistry
from ladderstitch.telemetry.logs import RecordSink


def replica_app(
    config: ServerConfig,
    registry: ModelRegistry,
    auth: AuthInterceptor | None,
    sinks: Sequence[RecordSink] = (),
    metrics: CollectorRegistry | None = None,
) -> FastAPI:
    """Return the application of a replica with this configuration, as `create_app` does."""
    return create_app(
        registry,
        auth,
        config.max_message_mb << 20,
        body_timeout_s=config.message_timeout_s,
        max_unfinished=config.max_unfinished_messages,
        cors_origins=config.cors_origins,
        trusts_loopback=is_loopback(config.host),
        sinks=sinks,
        metrics=metrics,
        page=config.serves_page,
        hosts=checked_hosts(config, has_tokens=auth is not None),
    )


def create_app(
    registry: ModelRegistry,
    auth: AuthInterceptor | None,
    max_message_bytes: int,
    *,
    body_timeout_s: float = 30.0,
    max_unfinished: int = 128,
    cors_origins: Sequence[str] = (),
    trusts_loopback: bool = False,
    page: bool = False,
    hosts: Sequence[str] | None = None,
    sinks: Sequence[RecordSink] = (),
    metrics: CollectorRegistry | None = None,
) -> FastAPI:
    """Return the application; without `auth`, callers need no token.

    Bodies have at most `max_message_bytes`, and less if no model can take as many. They must
    arrive within `body_timeout_s` seconds, at most `max_unfinished` at once. Browsers may call it
    from the pages of `cors_origins`, or of all origins for `*`, and from pages of this machine if
    `trusts_loopback`. With `hosts`, requests under other names are refused (`HostMiddleware`). Each
    request is reported to `sinks`. `/metrics` has those of `metrics`. With
    `page`, `/` shows the models and their answers.
    """
    app = FastAPI(title="ladderstitch", openapi_url=None, redirect_slashes=False)
    app.add_middleware(
        AccessMiddleware,
        auth=auth,
        max_body_bytes=lambda: max(
            max_body_bytes(registry, max_message_bytes),
            max_page_body_bytes(registry) if page else 0,
        ),
        body_timeout_s=body_timeout_s,
        max_unfinished=max_unfinished,
        open_paths=page_assets().keys() if page else (),
    )
    if hosts is not None:
        app.add_middleware(HostMiddleware, allowed=hosts)
    app.add_middleware(RequestIdMiddleware, sinks=sinks)
    if cors := cors_options(cors_origins, trusts_loopback=trusts_loopback):
        app.add_middleware(CORSMiddleware, **cors)  # added last, it comes first
    _add_error_handlers(app)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        return JSONResponse({"serving": registry.serving}, 200 if registry.serving else 503)

    @app.get("/v1/models")
    async def list_models(request: Request) -> Body:
        async with in_flight(request):
            models = [named.describe() for named in named_models(registry)]
            return {"object": "list", "data": models}

    @app.get("/v1/models/{name}")
    async def get_model(name: str, request: Request) -> Body:
        async with in_flight(request):
            return find_model(registry, name).describe()

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await answer_request(registry, CompletionRequest, request)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer_request(registry, ChatRequest, request)

    @app.post("/v1/responses")
    async def respond(request: Request) -> Response:
        return await answer_response_request(registry, request)

    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Response:
        async with in_flight(request):
            named = find_model(registry, (await parse_body(request, EmbeddingRequest)).model)
            raise InvalidArgument("model", f"expected one with embeddings, got {named.id}")

    if metrics is not None:
        _add_metrics(app, metrics)
    if page:
        add_page(app, registry)
    return app


def _add_metrics(app: FastAPI, metrics: CollectorRegistry) -> None:
    @app.get("/metrics")
    async def get_metrics(request: Request) -> Response:
        """Return the page of the metrics port, for tools that ask here."""
        async with in_flight(request):
            encode, kind = choose_encoder(request.headers.get("accept", ""))
            page = await asyncio.to_thread(encode, metrics)
            return Response(page, media_type=kind)


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
