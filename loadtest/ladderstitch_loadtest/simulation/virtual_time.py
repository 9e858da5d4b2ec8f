"""Simulated time for asyncio programs: the clock jumps to what is due, and nothing waits."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")


class _JumpingSelector(selectors.SelectSelector):
    """A selector that moves a clock forward instead of waiting."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return the events that are there, and add the timeout to the clock.

        Raises `RuntimeError` if nothing is due ever: the program waits for itself.
        """
        if timeout is None:
            raise RuntimeError("the simulated program waits for an event that never comes")
        self.now_s += max(0.0, timeout)
        return super().select(0)


def run_simulated(program: Coroutine[Any, Any, T]) -> T:
    """Return the result of a program whose `time.monotonic` and `asyncio.sleep` are simulated.

    The program must wait for nothing but itself: no sockets, threads or processes.
    """
    selector = _JumpingSelector()
    loop = asyncio.SelectorEventLoop(selector)

    def now_s() -> float:
        return selector.now_s

    with mock.patch.object(loop, "time", now_s), mock.patch.object(time, "monotonic", now_s):
        try:
            return loop.run_until_complete(program)
        finally:
            loop.close()
