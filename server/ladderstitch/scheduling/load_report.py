"""How long newcomers wait at a replica, by how urgent they are: what it tells those who route."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

HORIZONS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3600.0)
"""Budgets that a backlog is told for: queues are in deadline order, so the urgent wait less."""

PUSH_S = 0.005
"""How often a replica tells it at most: about as often as it starts a batch."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Seconds of work before a newcomer's own, for each horizon.

    And seconds that one request adds to it, and that a batch takes of late, whatever is in it.
    """

    waits_s: tuple[float, ...] = (0.0,)
    request_s: float = 0.0
    batch_s: float = 0.0
    horizons_s: tuple[float, ...] = HORIZONS_S

    def wait_s(self, budget_s: float) -> float:
        """Of a request that is wanted within so many seconds; the next horizon counts."""
        place = bisect_left(self.horizons_s, budget_s)
        return self.waits_s[min(place, len(self.waits_s) - 1)]

    def __add__(self, other: LoadReport) -> LoadReport:
        """Of a replica with both models: either's work is in the way of a request."""
        pairs = zip(self.waits_s, other.waits_s, strict=True)
        return LoadReport(
            tuple(a + b for a, b in pairs),
            max(self.request_s, other.request_s),
            max(self.batch_s, other.batch_s),
            self.horizons_s,
        )


IDLE = LoadReport((0.0,) * len(HORIZONS_S))
