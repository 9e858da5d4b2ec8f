"""Middleware that checks under which name the HTTP port is called, against DNS rebinding.

A web page can let its own name stand for 127.0.0.1. A browser then takes a server of this machine
for the page's own, so that the rules for other origins (CORS) do not apply; only the header `host`
shows the name.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ladderstitch.addresses import is_loopback, strip_brackets
from ladderstitch.security.listen_config import ListenConfig

MISDIRECTED_REQUEST = 421
"""421: the request was directed at a server that does not answer for this host; RFC 9110."""
ALL = "*"
MAX_SHOWN_CHARACTERS = 80


class HostMiddleware:
    """ASGI middleware: requests under other names than the allowed ones are refused.

    Loopback addresses and `localhost` are always allowed, with any port. Requests without the
    header, which no browser sends, are, too.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = frozenset(strip_brackets(name).lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application on one request."""
        given = Headers(scope=scope).getlist("host") if scope["type"] == "http" else []
        wrong = [host for host in given if not self._allows(host)]
        if wrong:
            await _refusal(wrong[0])(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _allows(self, host: str) -> bool:
        name = host.strip().lower()
        is_bracketed = name.startswith("[")
        name = name[1:].partition("]")[0] if is_bracketed else name.partition(":")[0]
        return ALL in self._allowed or is_loopback(name) or name in self._allowed


def checked_hosts(config: ListenConfig, *, has_tokens: bool) -> tuple[str, ...] | None:
    """Return the names that a server answers to; None if it answers to all.

    With tokens, a page of another origin has none to send. Servers on other addresses than loopback
    are called under names that they do not know, of services and load balancers.
    """
    if has_tokens or not is_loopback(config.host):
        return None
    return config.host, *config.allowed_hosts


def _refusal(host: str) -> JSONResponse:
    message = (
        "host: expected localhost, a loopback address or a name of allowed_hosts "
        f"(--allowed-host), got {host[:MAX_SHOWN_CHARACTERS]!r}"
    )
    body = {
        "message": message,
        "type": "invalid_request_error",
        "param": "host",
        "code": "HOST_NOT_ALLOWED",
    }
    return JSONResponse({"error": body}, MISDIRECTED_REQUEST)
