"""Middleware that admits requests by their headers, and reads admitted bodies within limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ladderstitch.api.auth import AuthInterceptor
from ladderstitch.api.openai.errors import ERROR_TYPES, BodyRejected, error_response
from ladderstitch.errors import Overloaded, RequestError

HEALTH_PATH = "/health"
"""The path that needs no token."""
IN_FLIGHT = "ladderstitch.in_flight"
"""Key of the ASGI scope: the stack that counts a request as in flight until it is closed."""
OVER_LIMIT = "ladderstitch.over_limit"
"""Key of the connection's state: it exceeds the limit, and may ask for the health only."""
RETRY_AFTER_S = 1.0


CountBody = Callable[[], AbstractContextManager[Callable[[int], None]]]
"""Begins to count a body; the context, which ends with the request, is a function of bytes."""


@contextmanager
def _count_nothing() -> Iterator[Callable[[int], None]]:
    yield lambda num_bytes: None


class AccessMiddleware:
    """ASGI middleware: the token and its limits come first, then the size, then the body.

    Nothing of a body is read before its request is admitted, and nothing is parsed here.
    """

    def __init__(
        self,
        app: ASGIApp,
        auth: AuthInterceptor | None,
        max_body_bytes: Callable[[], int],
        body_timeout_s: float,
        max_unfinished: int,
        open_paths: Collection[str] = (),
        count_body: CountBody = _count_nothing,
    ) -> None:
        """Admit requests by `auth`, and at most `max_unfinished` bodies that are arriving.

        `open_paths` are those of files without any data, which need no token. `count_body` counts
        the bytes of a body until its request has ended, and may refuse more by a `RequestError`.
        """
        self._open_paths, self._count_body = open_paths, count_body
        self._app, self._auth = app, auth
        self._max_body_bytes, self._body_timeout_s = max_body_bytes, body_timeout_s
        self._max_unfinished, self._unfinished = max_unfinished, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application on one request."""
        if scope["type"] != "http" or scope["path"] == HEALTH_PATH:
            await self._app(scope, receive, send)
            return
        async with AsyncExitStack() as in_flight:
            headers = Headers(scope=scope)
            try:
                self._admit(scope, headers, in_flight)
                is_post = scope["method"] == "POST"
                body = None
                if is_post:
                    add_bytes = in_flight.enter_context(self._count_body())
                    body = await self._read_body(headers, receive, add_bytes)
            except RequestError as error:
                await error_response(error)(scope, receive, send)
                return
            except BodyRejected as error:
                await rejection_response(error)(scope, receive, send)
                return
            scope[IN_FLIGHT] = in_flight
            if not is_post:
                await self._app(scope, receive, send)
            elif body is not None:
                await self._app(scope, _replay(body, receive), send)

    def _admit(self, scope: Scope, headers: Headers, in_flight: AsyncExitStack) -> None:
        """Check the token, and count the request as in flight."""
        if scope.get("state", {}).get(OVER_LIMIT):
            raise Overloaded("expected fewer open connections, got one too many", RETRY_AFTER_S)
        is_open = scope["path"] in self._open_paths and scope["method"] in ("GET", "HEAD")
        if self._auth is not None and not is_open:
            token = self._auth.authorize(headers.items(), "inference")
            in_flight.enter_context(self._auth.limiter.acquire(token))

    async def _read_body(
        self, headers: Headers, receive: Receive, add_bytes: Callable[[int], None]
    ) -> bytes | None:
        """Return the body, or None if the client has disconnected."""
        length = headers.get("content-length", "")
        if headers.get("content-encoding", "identity") != "identity":
            raise BodyRejected(415, "content-encoding: expected identity, got another one")
        limit = self._max_body_bytes()
        if length.isdigit() and int(length[:20]) > limit:
            raise BodyRejected(413, f"body: expected at most {limit} bytes, got {length[:20]}")
        if self._unfinished >= self._max_unfinished:
            raise Overloaded("too many unfinished bodies", RETRY_AFTER_S)
        self._unfinished += 1
        try:
            async with asyncio.timeout(self._body_timeout_s):
                return await _read_bounded(receive, limit, add_bytes)
        except TimeoutError:
            raise BodyRejected(
                408, f"body: expected all of it within {self._body_timeout_s:g} s, got a part"
            ) from None
        finally:
            self._unfinished -= 1


def rejection_response(error: BodyRejected) -> JSONResponse:
    """Return the HTTP response to a rejected body; the connection is closed after it."""
    kind = ERROR_TYPES.get(error.status, "invalid_request_error")
    body = {"message": str(error), "type": kind, "param": None, "code": "INVALID_ARGUMENT"}
    return JSONResponse({"error": body}, error.status, {"connection": "close"})


async def _read_bounded(
    receive: Receive, limit: int, add_bytes: Callable[[int], None]
) -> bytes | None:
    body = bytearray()
    while True:
        message = await receive()
        part = _body_of(message)
        if part is None:
            return None
        add_bytes(len(part))
        body += part
        if len(body) > limit:
            raise BodyRejected(413, f"body: expected at most {limit} bytes, got more")
        if not message.get("more_body", False):
            return bytes(body)


def _body_of(message: Message) -> bytes | None:
    """Return the bytes of a message, or None if it says that the client has disconnected."""
    return None if message["type"] == "http.disconnect" else message.get("body", b"")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a function that returns the body first, and then what `receive` returns."""
    waiting: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again
