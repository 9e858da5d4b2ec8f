"""A timer that runs only while there is something to watch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Sweeper:
    """Calls `sweep` every `interval_s` from `start` on, until it returns that nothing is left."""

    def __init__(self, sweep: Callable[[], bool], interval_s: float) -> None:
        self._sweep = sweep
        self._interval_s = interval_s
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """May be called again while it runs."""
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._interval_s, self._turn)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _turn(self) -> None:
        self._timer = None
        if self._sweep():
            self.start()
