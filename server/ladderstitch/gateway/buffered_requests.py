"""The requests that a gateway holds, over gRPC and HTTP together: their bytes, and the limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ladderstitch.errors import Overloaded

RETRY_AFTER_S = 0.5


class BufferedRequests:
    """A count of the bytes that a gateway holds until the calls that they belong to have ended."""

    def __init__(self, max_mb: int) -> None:
        """Permit at most `max_mb` MiB."""
        self._max_mb = max_mb
        self.num_bytes = 0
        """The bytes held now."""

    @contextmanager
    def one(self) -> Iterator[Callable[[int], None]]:
        """Count a request while the block runs; yields a function that adds bytes to it.

        The function raises `Overloaded` if all requests together exceed the limit.
        """
        held = 0

        def add(num_bytes: int) -> None:
            nonlocal held
            held += num_bytes
            self.num_bytes += num_bytes
            if self.num_bytes > self._max_mb << 20:
                raise Overloaded(
                    f"the gateway buffers at most {self._max_mb} MiB of requests", RETRY_AFTER_S
                )

        try:
            yield add
        finally:
            self.num_bytes -= held
