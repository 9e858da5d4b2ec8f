"""Connections of the HTTP server: time limits of each, and a maximum number of them."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ladderstitch.api.openai.access import OVER_LIMIT

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 64 << 10
"""Maximum size of a request's path and headers."""
BODY_GRACE_S = 2.0
"""Seconds for the response 408 after the time of a body is up."""
CLOSE_TIMEOUT_S = 2.0
"""Seconds in which a client must agree to the end of an encrypted connection."""
RESERVED = 16
"""Connections above the maximum that may ask for the health; further ones are closed."""
TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"connection: close\r\ncontent-length: 0\r\n\r\n"
)
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of the connections of a server; times in seconds.

    `header_timeout_s` is the time of a TLS handshake, and that of a request's path and headers.
    `send_timeout_s` is the time in which a client must read a part of a response.
    """

    max_connections: int = 1000
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    send_timeout_s: float = 60.0


class LimitedProtocol(HttpToolsProtocol):
    """A connection that is closed if its client is too slow.

    A connection above the maximum takes the place of the one that has been idle or incomplete for
    longest. If all are busy, it may ask for the health only. Connections count from when they are
    accepted: with `tls`, the handshake is made here.
    """

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()
    tls: ClassVar[ssl.SSLContext | None] = None
    _handshake: asyncio.Task[None] | None = None
    _is_lost = False
    _early = b""
    """Decrypted bytes that arrived before the handshake was known to have ended."""
    _timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    waiting_since = 0.0
    """Time of the loop at which the connection began to wait for its client."""

    @classmethod
    def with_limits(
        cls, limits: ConnectionLimits, tls: ssl.SSLContext | None = None
    ) -> type[LimitedProtocol]:
        """Return the protocol with these limits; with `tls`, connections are encrypted."""
        return type("LimitedProtocol", (cls,), {"limits": limits, "tls": tls})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time of the handshake or of the headers; make room for the connection."""
        super().connection_made(transport)
        if self.tls is None:
            self._start_timer(self.limits.header_timeout_s)
        else:
            transport.pause_reading()
            self.waiting_since = self.loop.time()
            self._handshake = self.loop.create_task(self._encrypt(transport, self.tls))
        self._make_room()

    def _make_room(self) -> None:
        """Close a connection if there are too many."""
        if len(self.connections) <= self.limits.max_connections or self._close_idle_connection():
            return
        if len(self.connections) > self.limits.max_connections + RESERVED:
            self.transport.abort()
            return
        self.app_state = {**self.app_state, OVER_LIMIT: True}

    async def _encrypt(self, transport: asyncio.Transport, context: ssl.SSLContext) -> None:
        """Make the handshake within the time of the headers, then wait for a request."""
        encrypted = None
        if not transport.is_closing():
            try:
                encrypted = await self.loop.start_tls(
                    transport,
                    self,
                    context,
                    server_side=True,
                    ssl_handshake_timeout=self.limits.header_timeout_s,
                    ssl_shutdown_timeout=CLOSE_TIMEOUT_S,
                )
            except OSError as error:  # the client's fault, or its time is up
                log.debug("TLS handshake of %s failed: %s", self.client, error)
        self._handshake = None
        if encrypted is None or self._is_lost:
            transport.abort()
            self.connection_lost(None)
            return
        super().connection_made(encrypted)
        self._start_timer(self.limits.header_timeout_s)
        if self._early:
            self.data_received(self._early)

    def data_received(self, data: bytes) -> None:
        """Parse data, or keep it until the end of the handshake is known."""
        if self._handshake is not None:
            self._early += data
        else:
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._is_lost = True
        self._stop_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Start the time of a further request's headers."""
        super().on_message_begin()
        self._header_bytes = 0
        self._start_timer(self.limits.header_timeout_s)

    def on_url(self, url: bytes) -> None:
        """Count the bytes of the path."""
        if self._count_header_bytes(len(url)):
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count the bytes of a header."""
        if self._count_header_bytes(len(name) + len(value)):
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the time of the body."""
        self._start_timer(self.limits.body_timeout_s + BODY_GRACE_S)
        if self._header_bytes <= MAX_HEADER_BYTES:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Stop the time of the body."""
        self._stop_timer()
        if self._header_bytes <= MAX_HEADER_BYTES:
            super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        if self._header_bytes <= MAX_HEADER_BYTES:
            super().on_body(body)

    def on_response_complete(self) -> None:
        """Note that the connection waits for its client's next request."""
        self.waiting_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Start the time in which the client must read."""
        super().pause_writing()
        self._send_timer = self.loop.call_later(self.limits.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the time in which the client must read."""
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
        super().resume_writing()

    @property
    def _waits_for_client(self) -> bool:
        """Whether no complete request of the connection is in progress."""
        return self._timer is not None or self.cycle is None or self.cycle.response_complete

    def _close_idle_connection(self) -> bool:
        """Close the connection that has waited for its client for longest; return whether any."""
        for other in _oldest_first(self.connections):
            if other is not self and other._waits_for_client:
                other.transport.abort()
                self.connections.discard(other)
                return True
        return False

    def _count_header_bytes(self, number: int) -> bool:
        """Return whether the path and the headers may still grow; else end the connection."""
        if self._header_bytes > MAX_HEADER_BYTES:
            return False
        self._header_bytes += number
        if self._header_bytes > MAX_HEADER_BYTES:
            self.transport.write(TOO_LARGE)
            self.transport.close()
            return False
        return True

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self.waiting_since = self.loop.time()
        self._timer = self.loop.call_later(seconds, self._time_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(TIMED_OUT)
        self.transport.close()


def _oldest_first(connections: Iterable[object]) -> list[LimitedProtocol]:
    """Return the connections in the order in which their current wait began."""
    limited = [found for found in connections if isinstance(found, LimitedProtocol)]
    return sorted(limited, key=lambda found: found.waiting_since)
