"""Authentication: each call needs a bearer token whose scope and limits allow it."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import grpc

from ladderstitch.api.status import Context, abort, handler_function, replace_handler_function
from ladderstitch.errors import PermissionDenied, RequestError, Unauthenticated
from ladderstitch.security.tokens import RateLimiter, Scope, Token, TokenFile

BEARER = "bearer "
ADMIN_METHODS = frozenset({"RepositoryModelLoad", "RepositoryModelUnload"})
ADMIN_SERVICES = frozenset({"ladderstitch.v1.AdminService"})
OPEN_SERVICES = frozenset({"grpc.health.v1.Health"})
"""Services that need no token: gRPC channels check health themselves and send none."""

WATCH_METHODS = frozenset({"WatchLoad"})
"""Streams that last and cost time for as long as they are open; each token has a limit of them."""
PER_REQUEST_METHODS = frozenset({"ModelStreamInfer"})
"""Streams whose handlers call `admit_request` for each request, and refuse one without the rest."""

OnDenied = Callable[[str], None]
"""A function that is called with the reason of every rejected call."""
AdmitRequest = Callable[[], AbstractContextManager[None]]
_admit: ContextVar[AdmitRequest] = ContextVar("admit", default=nullcontext)


def admit_request() -> AbstractContextManager[None]:
    """Count a request of the current stream as in flight, by the limits of the caller's token.

    Entering the context raises `RateLimited` above the limits. Streams of requests without a token
    have no limits.
    """
    return _admit.get()()


def is_limited() -> bool:
    """Return whether `admit_request` has limits in the current stream."""
    return _admit.get() is not nullcontext


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc ships no types
    """An interceptor that checks the token of each call, and enforces its limits during it."""

    def __init__(self, tokens: TokenFile, limiter: RateLimiter, on_denied: OnDenied) -> None:
        self.tokens = tokens
        self.limiter = limiter
        self.on_denied = on_denied

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Return the handler of a call, or one that rejects the call."""
        handler = await continuation(details)
        service, _, method = details.method.lstrip("/").partition("/")
        if handler is None or service in OPEN_SERVICES:
            return handler
        scope = required_scope(service, method)
        try:
            token = self.authorize(details.invocation_metadata, scope, method)
        except RequestError as error:
            return _rejecting_handler(handler, error)
        if method in WATCH_METHODS:
            return self._limited_handler(handler, lambda: self.limiter.open_watch(token))
        if token.concurrent_requests is None and token.requests_per_s is None:
            return handler
        if handler.request_streaming:
            return self._limited_stream_handler(handler, token, method)
        return self._limited_handler(handler, lambda: self.limiter.acquire(token))

    def authorize(
        self, metadata: Iterable[tuple[str, str | bytes]], scope: Scope, method: str = "this call"
    ) -> Token:
        """Return the token in gRPC metadata or HTTP headers if it has `scope`.

        Raises `Unauthenticated` without a known token, and `PermissionDenied` without the scope.
        """
        try:
            token = self._find_token(metadata)
            if scope not in token.scopes:
                raise PermissionDenied(
                    f"authorization: expected a token with the scope {scope!r} for {method}, got "
                    f"{token.name!r} with {sorted(token.scopes)}"
                )
        except RequestError as error:
            self.on_denied(error.reason)
            raise
        return token

    def _find_token(self, metadata: Iterable[tuple[str, str | bytes]]) -> Token:
        values = [value for key, value in metadata if key == "authorization"]
        if not values:
            raise Unauthenticated("authorization: expected `Bearer TOKEN`, got none")
        value = values[0] if isinstance(values[0], str) else values[0].decode(errors="replace")
        if len(values) > 1 or not value.lower().startswith(BEARER):
            raise Unauthenticated("authorization: expected `Bearer TOKEN` once, got another value")
        token = self.tokens.find(value[len(BEARER) :].strip())
        if token is None:
            raise Unauthenticated("authorization: expected a known token, got an unknown one")
        return token

    def _limited_handler(
        self, handler: grpc.RpcMethodHandler, admit: AdmitRequest
    ) -> grpc.RpcMethodHandler:
        """Return a handler that runs inside `admit()`."""
        function = handler_function(handler)

        async def call(request: Any, context: Context) -> Any:
            try:
                with admit():
                    return await function(request, context)
            except RequestError as error:
                self.on_denied(error.reason)
                await abort(context, error)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                with admit():
                    async for reply in function(request, context):
                        yield reply
            except RequestError as error:
                self.on_denied(error.reason)
                await abort(context, error)

        limited = stream if inspect.isasyncgenfunction(function) else call
        return replace_handler_function(handler, limited)

    def _limited_stream_handler(
        self, handler: grpc.RpcMethodHandler, token: Token, method: str
    ) -> grpc.RpcMethodHandler:
        """Return a handler of a stream of requests, each of which counts as a call.

        Other methods than `PER_REQUEST_METHODS` end with RESOURCE_EXHAUSTED at the first request
        above the limits.
        """
        function = handler_function(handler)

        def admit() -> AbstractContextManager[None]:
            return self.limiter.acquire(token)

        async def limit_each(requests: Any) -> AsyncIterator[Any]:
            async for request in requests:
                with admit():
                    yield request

        def start(requests: Any, context: Context) -> Any:
            _admit.set(admit)
            each = requests if method in PER_REQUEST_METHODS else limit_each(requests)
            return function(each, context)

        async def call(requests: Any, context: Context) -> Any:
            return await start(requests, context)

        async def stream(requests: Any, context: Context) -> AsyncIterator[Any]:
            async for reply in start(requests, context):
                yield reply

        limited = stream if inspect.isasyncgenfunction(function) else call
        inner = replace_handler_function(handler, limited)
        return self._limited_handler(inner, lambda: self.limiter.open_stream(token))


def required_scope(service: str, method: str) -> Scope:
    """Return the scope that a token needs to call a method."""
    is_admin = service in ADMIN_SERVICES or method in ADMIN_METHODS
    return "admin" if is_admin else "inference"


def _rejecting_handler(
    handler: grpc.RpcMethodHandler, error: RequestError
) -> grpc.RpcMethodHandler:
    """Return a handler that ends the call with `error`; no message of it is read."""

    async def reject(_: Any, context: Context) -> None:
        await abort(context, error)

    return replace_handler_function(handler, reject, parse=False, stream=True)
