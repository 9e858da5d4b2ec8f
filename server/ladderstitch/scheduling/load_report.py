"""The load that a replica reports to routers: how long a new request waits, by its urgency."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

HORIZONS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3600.0)
"""Budgets for which a wait is reported, because urgent requests wait less in a deadline queue."""

PUSH_S = 0.005
"""Shortest interval between two reports of a replica: about the interval between two batches."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The seconds that a new request would wait at one replica, for each horizon."""

    waits_s: tuple[float, ...] = (0.0,)
    """Seconds of work before a new request's own, one for each of `horizons_s`."""
    request_s: float = 0.0
    """Seconds that one more request adds."""
    batch_s: float = 0.0
    """Seconds that a batch took recently, whatever its variant and size."""
    horizons_s: tuple[float, ...] = HORIZONS_S

    def wait_s(self, budget_s: float) -> float:
        """Return the wait of a request with this budget, at the next larger horizon."""
        place = bisect_left(self.horizons_s, budget_s)
        return self.waits_s[min(place, len(self.waits_s) - 1)]

    def __add__(self, other: LoadReport) -> LoadReport:
        """Return the report of a replica with both models: requests wait for the work of both."""
        pairs = zip(self.waits_s, other.waits_s, strict=True)
        return LoadReport(
            tuple(a + b for a, b in pairs),
            max(self.request_s, other.request_s),
            max(self.batch_s, other.batch_s),
            self.horizons_s,
        )


IDLE = LoadReport((0.0,) * len(HORIZONS_S))
"""The report of a replica without any work."""
