"""Middleware that names each HTTP request, and reports it to the request log when it has ended."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ladderstitch.api.request_log import REQUEST_ID
from ladderstitch.scheduling.requests import MAX_ID_CHARACTERS
from ladderstitch.telemetry.logs import RecordSink, RequestRecord

LOGGED_PREFIX = "/v1/"
MODEL = "ladderstitch.model"
"""Key of the connection's state: the model of a request."""
CODES = {
    200: "OK",
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    413: "INVALID_ARGUMENT",
    415: "INVALID_ARGUMENT",
    421: "PERMISSION_DENIED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""Names of gRPC's statuses by those of HTTP; others are INTERNAL."""


class RequestIdMiddleware:
    """ASGI middleware: `x-request-id` of each response is the caller's, or a new one.

    Requests of the API are reported to `sinks`.
    """

    def __init__(self, app: ASGIApp, sinks: Sequence[RecordSink] = ()) -> None:
        self._app, self._sinks = app, sinks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started_ns = Headers(scope=scope), time.time_ns()
        request_id = choose_request_id(headers.get(REQUEST_ID, ""))
        scope.setdefault("state", {})
        scope["state"] = {**scope["state"], MODEL: ""}
        code = "CANCELLED"

        async def send_named(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
                code = CODES.get(message["status"], "INTERNAL")
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        finally:
            if scope["path"].startswith(LOGGED_PREFIX):
                record = RequestRecord(
                    method=f"{scope['method']} {scope['path'][:MAX_ID_CHARACTERS]}",
                    request_id=request_id,
                    model=scope["state"][MODEL],
                    code=code,
                    started_ns=started_ns,
                    ended_ns=time.time_ns(),
                    metadata={k: v for k, v in headers.items() if k != "authorization"},
                    fields={},
                )
                for sink in self._sinks:
                    sink(record)


def choose_request_id(given: str) -> str:
    """Return the printable ASCII part of the caller's id, or a random id without one."""
    printable = "".join(c for c in given[:MAX_ID_CHARACTERS] if " " <= c <= "~").strip()
    return printable or uuid.uuid4().hex
