"""A repair that runs in the background and is tried again, however often it fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 15.0
"""Seconds between two attempts to recover; they double after each one."""


class Recovery:
    """The task that makes attempts until nothing is left to repair."""

    def __init__(self, attempt: Callable[[], Awaitable[None]], is_needed: Callable[[], bool]):
        """`attempt` may raise anything; `is_needed` says whether there is something to repair."""
        self._attempt, self._is_needed = attempt, is_needed
        self._stopped = False
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the task unless it is running or has been stopped for good."""
        if self._stopped or (self.task is not None and not self.task.done()):
            return
        self.task = asyncio.create_task(self._repair(), name="recover-ranks")
        self.task.add_done_callback(self._on_end)

    async def stop(self) -> None:
        """Stop for good."""
        self._stopped = True
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if self._stopped or not self._is_needed():
            return
        error = None if task.cancelled() else task.exception()
        log.error("the recovery of the ranks ended early; it starts again", exc_info=error)
        task.get_loop().call_later(FIRST_RETRY_S, self.start)

    async def _repair(self) -> None:
        num_failed = 0
        while self._is_needed():
            try:
                await self._attempt()
            except Exception as error:  # no memory, no descriptor, no room, a rank that cannot load
                num_failed += 1
                delay_s = min(FIRST_RETRY_S * 2 ** min(num_failed, 16), LAST_RETRY_S)
                log.error(
                    "recovery attempt=%d failed, next_in_s=%.1f: %s: %s",
                    num_failed,
                    delay_s,
                    type(error).__name__,
                    error,
                )
                await asyncio.sleep(delay_s)
