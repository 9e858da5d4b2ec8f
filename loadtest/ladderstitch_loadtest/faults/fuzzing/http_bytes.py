"""HTTP requests as bytes, and mutations of their lines, lengths and chunks."""

from __future__ import annotations

import random
from collections.abc import Callable

from ladderstitch_loadtest.faults.fuzzing.headers import Headers
from ladderstitch_loadtest.faults.fuzzing.wire import ANY_BYTES, mutate

METHODS = (b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"PATCH", b"BREW", b"post")
TARGETS = (
    b"/",
    b"/v1",
    b"/v1/completions/",
    b"/v1/completions?a=b",
    b"/v1//completions",
    b"/v1/models/%00",
    b"/v1/models/%ff%fe",
    b"/v1/models/..%2f..%2fetc",
    b"/" + b"a" * 5000,
    b"*",
    b"http://127.0.0.1/v1/completions",
)
HEADER_LINES = (
    b"content-length: 0",
    b"content-length: -1",
    b"content-length: 99999999999999999999",
    b"content-length: 1, 2",
    b"transfer-encoding: chunked",
    b"transfer-encoding: gzip, chunked",
    b"expect: 100-continue",
    b"expect: 200-ok",
    b"connection: upgrade\r\nupgrade: h2c",
    b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: x",
    b"host: other",
    b"no colon",
    b": no name",
    b" folded: line",
    b"nul: a\0b",
    b"high: \xff\xfe",
    b"long: " + b"x" * 20_000,
    b"content-encoding: gzip",
)


def encode_request(path: str, body: bytes, headers: Headers = (), *, close: bool = False) -> bytes:
    """Return a POST request; `headers` replace the default ones of the same name."""
    fields = {"host": "127.0.0.1", "content-type": "application/json"}
    extra = [(key, value) for key, value in headers if key not in fields]
    fields |= {key: value for key, value in headers if key in fields}
    fields["content-length"] = str(len(body))
    if close:
        fields["connection"] = "close"
    lines = [f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in [*fields.items(), *extra])]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def mutate_request(rng: random.Random, request: bytes) -> bytes:
    """Return the bytes of a request with one part changed."""
    return rng.choice(MUTATIONS)(rng, request)


def _replace_method(rng: random.Random, request: bytes) -> bytes:
    return rng.choice(METHODS) + request[len(b"POST") :]


def _replace_target(rng: random.Random, request: bytes) -> bytes:
    method = rng.choice((b"POST", b"GET"))
    return method + b" " + rng.choice(TARGETS) + request[request.index(b" HTTP/") :]


def _replace_version(rng: random.Random, request: bytes) -> bytes:
    version = rng.choice((b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9.9", b"http/1.1", b""))
    return request.replace(b"HTTP/1.1", version, 1)


def _add_header(rng: random.Random, request: bytes) -> bytes:
    line = rng.choice(HEADER_LINES)
    return request.replace(b"\r\n", b"\r\n" + line + b"\r\n", 1)


def _send_chunks(rng: random.Random, request: bytes) -> bytes:
    """Return the request with a body in chunks whose sizes may be wrong."""
    head, _, body = request.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"content-length")]
    lines.append(b"transfer-encoding: chunked")
    size = rng.choice((b"%x" % len(body), b"0", b"-1", b"f" * 17, b"zz", b"%x;a=b" % len(body)))
    end = rng.choice((b"\r\n0\r\n\r\n", b"\r\n0\r\nx: y\r\n\r\n", b"\r\n", b""))
    return b"\r\n".join(lines) + b"\r\n\r\n" + size + b"\r\n" + body + end


def _change_line_ends(rng: random.Random, request: bytes) -> bytes:
    return request.replace(b"\r\n", rng.choice((b"\n", b"\r", b"\r\r\n")))


def _change_bytes(rng: random.Random, request: bytes) -> bytes:
    return mutate(rng, request, ANY_BYTES)


def _send_other_protocol(rng: random.Random, request: bytes) -> bytes:
    starts = (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"\0" * 300)
    return rng.choice(starts) + request[: rng.randrange(len(request))]


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _replace_method,
    _replace_target,
    _replace_version,
    _add_header,
    _add_header,
    _send_chunks,
    _change_line_ends,
    _change_bytes,
    _change_bytes,
    _send_other_protocol,
)
"""Mutations of the bytes of a request."""
