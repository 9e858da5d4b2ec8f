"""A caller's HTTP request as a gateway sends it on, and the headers that stay behind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ladderstitch.api.deadlines import HELD_KEY
from ladderstitch.api.openai.event_marks import ANSWER_HEADER

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
OWN_REQUEST_HEADERS = frozenset(
    {b"content-length", b"host", b"origin", HELD_KEY.encode(), ANSWER_HEADER.encode()}
)
"""Headers that a gateway writes itself, or that concern it alone: pages call it, not replicas."""


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
        except (ValueError, RecursionError):  # the replica says what is wrong
            return ""
        model = fields.get("model", "") if isinstance(fields, dict) else ""
        return model if isinstance(model, str) else ""

    def with_headers(self, added: Mapping[str, str | None], body: bytes) -> HttpRequest:
        """Return the request with another body, and with those of the headers that are set."""
        more = [(k.encode(), v.encode("latin-1")) for k, v in added.items() if v is not None]
        return replace(self, headers=(*self.headers, *more), body=body)


def forwarded_request_headers(headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """Return a caller's headers without those of its connection."""
    return forward_headers(headers, OWN_REQUEST_HEADERS)


def forward_headers(headers: Iterable[tuple[bytes, bytes]], own: frozenset[bytes]) -> RawHeaders:
    """Return headers without those of one connection and without `own`, names in lower case."""
    lowered = tuple((name.lower(), value) for name, value in headers)
    named = {
        part.strip().lower()
        for name, value in lowered
        if name == b"connection"
        for part in value.split(b",")
    }
    dropped = HOP_HEADERS | own | named
    return tuple((name, value) for name, value in lowered if name not in dropped)
