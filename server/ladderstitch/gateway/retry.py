"""One request's way through the replicas: which is next, how much time is left, when to give up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from random import Random

from ladderstitch.api.deadlines import HELD_KEY, METADATA_KEY
from ladderstitch.errors import NotReady
from ladderstitch.gateway.replica_connection import Link
from ladderstitch.gateway.replica_pool import Fleet

Metadata = tuple[tuple[str, str | bytes], ...]

BACK_OFF_S, MAX_BACK_OFF_S = 0.02, 0.5
"""Before all replicas are tried anew; doubled each time, and spread by half to either side."""
NOTED_S = 0.001
"""What a call waits here beyond this, the replica is told."""
OURS = frozenset({"user-agent", HELD_KEY})
"""Metadata of one hop, which is not the next one's."""
_random = Random()


class Attempts:
    """From the arrival of a request until it is answered, or nobody is left to ask in time."""

    def __init__(
        self,
        fleet: Fleet,
        remaining_s: float | None,
        metadata: Iterable[tuple[str, str | bytes]],
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`remaining_s` is what the caller's deadline leaves, None without one."""
        self._fleet, self._clock = fleet, clock
        self.arrival = clock()
        self.deadline = math.inf if remaining_s is None else self.arrival + remaining_s
        self._give_up = min(self.deadline, self.arrival + patience_s)
        self._metadata: Metadata = tuple((k, v) for k, v in metadata if k not in OURS)
        self.due = min(self.arrival + _budget_s(self._metadata), self.deadline)
        self._tried: list[Link] = []
        self._pause_s = BACK_OFF_S
        self.count = 0

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self.arrival

    @property
    def timeout_s(self) -> float | None:
        """What is left for the next attempt."""
        return None if self.deadline == math.inf else max(self.deadline - self._clock(), 0.0)

    @property
    def metadata(self) -> Metadata:
        """The caller's; and how long the call has been here, which its budgets are less by."""
        held_s = self.elapsed_s
        if held_s < NOTED_S:
            return self._metadata
        return (*self._metadata, (HELD_KEY, str(round(1e6 * held_s))))

    async def next(self) -> Link:
        """The replica to ask now; waits for one to come. Raises `NotReady` when time is up."""
        while True:
            link = self._fleet.choose(self.due - self._clock(), self._tried)
            if link is not None:
                self._tried.append(link)
                self.count += 1
                return link
            left_s = self._give_up - self._clock()
            if left_s <= 0:
                raise NotReady("no replica answers; try again later")
            if not self._tried:
                await self._fleet.change(left_s)
                continue
            self._tried.clear()
            await self._fleet.change(min(left_s, self._pause_s * _random.uniform(0.5, 1.5)))
            self._pause_s = min(2 * self._pause_s, MAX_BACK_OFF_S)

    def other_models(self, than: Link) -> bool:
        """From now on only replicas with other models than this one's; whether there are any."""
        alike = [link for link in self._fleet.serving if link.models == than.models]
        self._tried += [link for link in alike if link not in self._tried]
        return any(link not in self._tried for link in self._fleet.serving)


def _budget_s(metadata: Metadata) -> float:
    """As metadata names it; a malformed one is for the replica to refuse."""
    values = [value for key, value in metadata if key == METADATA_KEY]
    try:
        return float(values[0]) / 1e3 if values else math.inf
    except ValueError:
        return math.inf
