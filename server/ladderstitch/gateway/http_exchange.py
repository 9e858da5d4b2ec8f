"""One HTTP request at one replica: what is sent, what comes back, and how it can fail."""

from __future__ import annotations

import io
import json
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field

import aiohttp
from starlette.types import Send
from yarl import URL

from ladderstitch.addresses import join_address, split_address
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.replica_connection import ReplicaConnection

RawHeaders = tuple[tuple[bytes, bytes], ...]
"""Names in lower case, and values."""

HOP_HEADERS = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Headers of one connection, which are not forwarded; RFC 9110, section 7.6.1."""
OWN_REQUEST_HEADERS = frozenset({b"content-length", b"host", b"origin"})
"""Headers that a gateway writes itself, or that concern it alone: pages call it, not replicas."""
OWN_RESPONSE_HEADERS = frozenset({b"date", b"server", b"vary"})
"""Headers that a gateway's own server writes."""
ADDED_HEADERS = ("accept", "accept-encoding", "content-type", "user-agent")
"""Headers that the client of replicas would add by itself."""
RETRIED = frozenset({503})
"""Statuses of a replica that does not answer for now."""
NOT_FOUND = 404
LOST = "the replica that computed this answer has been lost"


class ReplicaLost(Exception):
    """The connection to a replica failed; `started` if the caller has a part of the response."""

    def __init__(self, reason: str, *, started: bool) -> None:
        super().__init__(reason)
        self.started = started


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A caller's request; `target` is its encoded path and query."""

    method: str
    target: str
    headers: RawHeaders
    body: bytes

    @property
    def model(self) -> str:
        """The model that a JSON body names; empty if it names none."""
        try:
            fields = json.loads(self.body)
        except ValueError:  # the replica says what is wrong
            return ""
        model = fields.get("model", "") if isinstance(fields, dict) else ""
        return model if isinstance(model, str) else ""


@dataclass(frozen=True, slots=True)
class HttpRefusal:
    """A replica's response that another replica may improve on."""

    status: int
    headers: RawHeaders
    body: bytes

    async def send(self, send: Send) -> None:
        """Send the response to the caller."""
        await send(_start(self.status, self.headers))
        await send({"type": "http.response.body", "body": self.body})


@dataclass(slots=True)
class HttpExchange:
    """A request that is sent to a replica, and its response, which is passed on as it arrives."""

    request: HttpRequest
    send: Send
    started: bool = field(default=False, init=False)
    """Whether the caller has a part of the response."""
    _is_events: bool = field(default=False, init=False)

    async def run(self, client: ReplicaClient, replica: ReplicaConnection) -> HttpRefusal | None:
        """Pass the response on; return it instead if another replica may have a better one.

        Raises `ReplicaLost` if the connection fails.
        """
        try:
            async with client.open(replica, self.request) as response:
                headers = _forwarded(response.raw_headers, OWN_RESPONSE_HEADERS)
                if response.status in RETRIED | {NOT_FOUND}:
                    body = await response.read()
                    return HttpRefusal(response.status, headers, body)
                self._is_events = response.content_type == "text/event-stream"
                self.started = True
                await self.send(_start(response.status, headers))
                async for part in response.content.iter_any():
                    message = {"type": "http.response.body", "body": part, "more_body": True}
                    await self.send(message)
        except (aiohttp.ClientError, OSError) as error:
            raise ReplicaLost(str(error), started=self.started) from error
        await self.send({"type": "http.response.body", "body": b""})
        return None

    async def end_events(self) -> bool:
        """End a stream of events with an error; return False if the response is no such stream."""
        if not self._is_events:
            return False
        error = {"message": LOST, "type": "server_error", "param": None, "code": "UNAVAILABLE"}
        event = b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
        await self.send({"type": "http.response.body", "body": event})
        return True


class ReplicaClient:
    """The HTTP connections to all replicas; create it inside a running event loop."""

    def __init__(self, config: GatewayConfig) -> None:
        """Open no connection yet. Raises `OSError` and `ValueError` for unfit certificates."""
        self._tls = _tls_context(config)
        self._server_name = config.replica_server_name
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
            auto_decompress=False,
            skip_auto_headers=ADDED_HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    def open(
        self, replica: ReplicaConnection, request: HttpRequest
    ) -> aiohttp.client._RequestContextManager:
        """Send a request to a replica; the result is a context manager of the response."""
        state = replica.state
        assert state is not None, "a replica that serves has reported its state"
        host, _ = split_address(replica.address)
        scheme = "http" if self._tls is None else "https"
        address = join_address(host, state.http_port)
        headers = [(name.decode("latin-1"), v.decode("latin-1")) for name, v in request.headers]
        return self._session.request(
            request.method,
            URL(f"{scheme}://{address}{request.target}", encoded=True),
            headers=headers,
            data=io.BytesIO(request.body) if request.body else None,
            allow_redirects=False,
            ssl=self._tls if self._tls is not None else True,
            server_hostname=self._server_name,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()


def forwarded_request_headers(headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """Return a caller's headers without those of its connection."""
    return _forwarded(headers, OWN_REQUEST_HEADERS)


def _forwarded(headers: Iterable[tuple[bytes, bytes]], own: frozenset[bytes]) -> RawHeaders:
    lowered = tuple((name.lower(), value) for name, value in headers)
    named = {
        part.strip().lower()
        for name, value in lowered
        if name == b"connection"
        for part in value.split(b",")
    }
    dropped = HOP_HEADERS | own | named
    return tuple((name, value) for name, value in lowered if name not in dropped)


def _start(status: int, headers: RawHeaders) -> dict[str, object]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def _tls_context(config: GatewayConfig) -> ssl.SSLContext | None:
    """Return the TLS context of connections to replicas; None for plain connections."""
    if not (config.replica_tls or config.replica_ca or config.replica_certificate):
        return None
    context = ssl.create_default_context(cafile=config.replica_ca)
    if config.replica_certificate is not None and config.replica_key is not None:
        context.load_cert_chain(config.replica_certificate, config.replica_key)
    return context
