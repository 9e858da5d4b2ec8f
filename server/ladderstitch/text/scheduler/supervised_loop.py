"""A loop that is started again whenever it ends before it is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

FIRST_RESTART_S, LAST_RESTART_S = 0.01, 5.0
"""Delay before a loop is started again; it doubles with each end in a row."""


class SupervisedLoop:
    """A task that runs until `stop`, whatever ends it: an error, a cancellation, or a return."""

    def __init__(
        self,
        run: Callable[[], Coroutine[None, None, None]],
        on_end: Callable[[BaseException], None],
        name: str,
    ) -> None:
        """`on_end` is called with the error that ended the loop, before it is started again."""
        self._run, self._on_end, self._name = run, on_end, name
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self.ends_in_row = 0
        """Unexpected ends since the last `report_progress`."""

    @property
    def running(self) -> bool:
        """Whether the loop runs now."""
        return self._task is not None and not self._task.done()

    @property
    def failing(self) -> bool:
        """Whether the loop has ended and has made no progress since then."""
        return self.ends_in_row > 0

    def start(self) -> None:
        """Start the loop unless it has been started already; it may wait for its next start."""
        if self._task is None and not self._stopped:
            self._start()

    def report_progress(self) -> None:
        """Report that the loop works, so that its next end counts as the first one."""
        self.ends_in_row = 0

    async def stop(self) -> None:
        """Stop the loop for good, and wait until it has ended."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _start(self) -> None:
        if not self._stopped:
            self._task = asyncio.create_task(self._run(), name=self._name)
            self._task.add_done_callback(self._restart)

    def _restart(self, task: asyncio.Task[None]) -> None:
        if self._stopped:
            return
        if task.cancelled():
            error: BaseException = asyncio.CancelledError("the task was cancelled")
        else:
            error = task.exception() or RuntimeError("the loop returned")
        self.ends_in_row += 1
        delay_s = min(FIRST_RESTART_S * 2 ** min(self.ends_in_row, 16), LAST_RESTART_S)
        task.get_loop().call_later(delay_s, self._start)
        self._on_end(error)
