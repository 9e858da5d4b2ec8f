"""Metadata of gRPC calls and headers of HTTP requests with odd values."""

from __future__ import annotations

import random

Headers = tuple[tuple[str, str], ...]

BUDGET_KEYS = (
    "x-latency-budget-ms",
    "x-llm-d-slo-ttft-ms",
    "x-llm-d-slo-tpot-ms",
    "x-deadline-ms",
)
OTHER_KEYS = (
    "authorization",
    "traceparent",
    "tracestate",
    "x-request-id",
    "accept-encoding",
    "grpc-previous-rpc-attempts",
    "cookie",
)
VALUES = (
    "",
    " ",
    "0",
    "-5",
    "nan",
    "inf",
    "-inf",
    "1e300",
    "1e-300",
    "5e-324",
    "soon",
    "1_000",
    "0x10",
    "5",
    "50",
    "30000",
    "99999999999999999999",
    "Bearer ",
    "Bearer x",
    "Basic Og==",
    "00-" + "0" * 32 + "-" + "0" * 16 + "-00",
    "zstd, gzip;q=2",
    "9" * 2000,
    "~" * 300,
)
"""Values of printable ASCII characters, which both protocols can send."""
CONTENT_TYPES = (
    "",
    "text/plain",
    "application/JSON",
    "application/json; charset=utf-16",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "multipart/form-data; boundary=x",
    "application/grpc",
    "application/json" + ";a=b" * 50,
)
MAX_MANY = 30


def mutate_headers(rng: random.Random) -> Headers:
    """Return one or several odd headers, sometimes the same one twice."""
    count = rng.choice((1, 1, 1, 2, MAX_MANY))
    keys = BUDGET_KEYS if rng.random() < 0.7 else OTHER_KEYS
    values = VALUES if count < MAX_MANY else VALUES[:20]
    return tuple((rng.choice(keys), rng.choice(values)) for _ in range(count))


def mutate_http_headers(rng: random.Random) -> Headers:
    """Return odd headers, sometimes an odd content type."""
    if rng.random() < 0.3:
        return (("content-type", rng.choice(CONTENT_TYPES)),)
    return mutate_headers(rng)
