"""The watchdog of a replica: the delay of its event loop, and the health of its models."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from prometheus_client import Histogram

log = logging.getLogger(__name__)

INTERVAL_S = 0.1


class Watchdog:
    """A task that wakes up ten times a second: it records how late, and checks the models.

    What the event loop is held by delays the watchdog as long as it delays every request.
    """

    def __init__(self, lag: Histogram, check: Callable[[], Awaitable[None]]) -> None:
        """`lag` gets the delay of each wake-up in seconds; then `check` is called."""
        self._lag, self._check = lag, check
        self._task: asyncio.Task[None] | None = None
        self._woken_at = time.monotonic()

    def start(self) -> None:
        """Start the task in the running event loop; the second call has no effect."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="watchdog")

    def seconds_behind(self) -> float:
        """Return the seconds since the last wake-up; any thread may ask."""
        return time.monotonic() - self._woken_at

    async def stop(self) -> None:
        """Stop the task."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            self._lag.observe(max(0.0, loop.time() - due))
            self._woken_at = time.monotonic()
            try:
                await self._check()
            except Exception:  # the next check comes soon
                log.exception("a check of the models failed")
