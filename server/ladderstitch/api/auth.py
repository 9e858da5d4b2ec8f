"""Lets a call through if its bearer token may make it; sits before every handler."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc

from ladderstitch.api.status import Context, abort, behaviour_of, with_behaviour
from ladderstitch.errors import PermissionDenied, RequestError, Unauthenticated
from ladderstitch.security.tokens import Limits, Scope, Token, TokenFile

BEARER = "bearer "
ADMIN_METHODS = frozenset({"RepositoryModelLoad", "RepositoryModelUnload"})
ADMIN_SERVICES = frozenset({"ladderstitch.v1.AdminService"})
OPEN_SERVICES = frozenset({"grpc.health.v1.Health"})
"""Channels check health on their own behalf and send no token."""

OnDenied = Callable[[str], None]
"""Told the reason of every refusal."""


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc ships no types
    """Authenticates, checks the scope, and holds the token's limits for the time of the call."""

    def __init__(self, tokens: TokenFile, limits: Limits, denied: OnDenied) -> None:
        self.tokens = tokens
        self.limits = limits
        self.denied = denied

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        service, _, method = details.method.lstrip("/").partition("/")
        if handler is None or service in OPEN_SERVICES:
            return handler
        try:
            token = self.admit(details.invocation_metadata, needed_scope(service, method), method)
        except RequestError as error:
            return _refusing(handler, error)
        if token.concurrent_requests is None and token.requests_per_s is None:
            return handler
        return self._limited(handler, token)

    def admit(
        self, metadata: Iterable[tuple[str, str | bytes]], scope: Scope, what: str = "this"
    ) -> Token:
        """By gRPC metadata or HTTP headers; raises `Unauthenticated`, `PermissionDenied`."""
        try:
            token = self._authenticated(metadata)
            if scope not in token.scopes:
                raise PermissionDenied(
                    f"token {token.name!r} has the scopes {sorted(token.scopes)}; {what} needs "
                    f"{scope!r}"
                )
        except RequestError as error:
            self.denied(error.reason)
            raise
        return token

    def _authenticated(self, metadata: Iterable[tuple[str, str | bytes]]) -> Token:
        values = [value for key, value in metadata if key == "authorization"]
        if not values:
            raise Unauthenticated("expected metadata `authorization: Bearer TOKEN`, got none")
        value = values[0] if isinstance(values[0], str) else values[0].decode(errors="replace")
        if len(values) > 1 or not value.lower().startswith(BEARER):
            raise Unauthenticated("expected metadata `authorization: Bearer TOKEN`, once")
        token = self.tokens.find(value[len(BEARER) :].strip())
        if token is None:
            raise Unauthenticated("the token is unknown here; was it rotated?")
        return token

    def _limited(self, handler: grpc.RpcMethodHandler, token: Token) -> grpc.RpcMethodHandler:
        behaviour = behaviour_of(handler)

        async def call(request: Any, context: Context) -> Any:
            try:
                with self.limits.admitted(token):
                    return await behaviour(request, context)
            except RequestError as error:
                self.denied(error.reason)
                await abort(context, error)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                with self.limits.admitted(token):
                    async for reply in behaviour(request, context):
                        yield reply
            except RequestError as error:
                self.denied(error.reason)
                await abort(context, error)

        return with_behaviour(handler, stream if inspect.isasyncgenfunction(behaviour) else call)


def needed_scope(service: str, method: str) -> Scope:
    """What a caller's token has to allow."""
    administers = service in ADMIN_SERVICES or method in ADMIN_METHODS
    return "admin" if administers else "inference"


def _refusing(handler: grpc.RpcMethodHandler, error: RequestError) -> grpc.RpcMethodHandler:
    """Ends the call before its message is parsed."""

    async def refuse(_: Any, context: Context) -> None:
        await abort(context, error)

    return with_behaviour(handler, refuse, parse=False)
