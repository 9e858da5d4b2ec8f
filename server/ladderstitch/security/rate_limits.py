"""How much one token may ask for: calls in flight, and calls a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ladderstitch.errors import RateLimited
from ladderstitch.security.tokens import Token

BUSY_RETRY_S = 0.1
"""What a caller with too many calls in flight is told to wait: about the time one takes."""


@dataclass(slots=True)
class Usage:
    """A token's calls in flight, and its bucket: one second's worth of calls at most."""

    in_flight: int = 0
    allowance: float = 0.0
    filled_at: float = 0.0


class Limits:
    """Counts by the token's name, so that a rotated token keeps its predecessor's account."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, Usage] = {}

    @contextmanager
    def admitted(self, token: Token) -> Iterator[None]:
        """Hold a place for the time of a call; raises `RateLimited` if there is none."""
        usage = self._of(token)
        most = token.concurrent_requests
        if most is not None and usage.in_flight >= most:
            raise RateLimited(
                f"token {token.name!r} has {most} requests in flight, its most", BUSY_RETRY_S
            )
        self._take(usage, token)
        usage.in_flight += 1
        try:
            yield
        finally:
            usage.in_flight -= 1

    def in_flight(self, name: str) -> int:
        return self._usage[name].in_flight if name in self._usage else 0

    def _of(self, token: Token) -> Usage:
        if token.name not in self._usage:
            full = max(1.0, token.requests_per_s or 0.0)
            self._usage[token.name] = Usage(allowance=full, filled_at=self._clock())
        return self._usage[token.name]

    def _take(self, usage: Usage, token: Token) -> None:
        rate = token.requests_per_s
        if rate is None:
            return
        now = self._clock()
        grown = usage.allowance + rate * (now - usage.filled_at)
        usage.allowance, usage.filled_at = min(max(1.0, rate), grown), now
        if usage.allowance < 1:
            raise RateLimited(
                f"token {token.name!r} may send {rate:g} requests a second",
                (1 - usage.allowance) / rate,
            )
        usage.allowance -= 1
