"""Which web pages may call the HTTP port from a browser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ladderstitch.api.request_log import REQUEST_ID

LOOPBACK_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?"
"""Origins of pages that this machine serves."""
MAX_AGE_S = 600
"""Seconds for which browsers remember which requests are allowed."""


def cors_options(origins: Sequence[str], *, trusts_loopback: bool) -> dict[str, Any] | None:
    """Return the options of `CORSMiddleware` for pages of these origins; `*` stands for all.

    With `trusts_loopback`, pages of this machine may call, too. The result is None if no page may.
    The middleware must be the outermost one, because browsers ask for permission without a token.
    """
    if not origins and not trusts_loopback:
        return None
    return {
        "allow_origins": origins,
        "allow_origin_regex": LOOPBACK_ORIGIN if trusts_loopback else None,
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["*"],
        "expose_headers": ["retry-after", "retry-after-ms", REQUEST_ID],
        "max_age": MAX_AGE_S,
    }
