"""Pick the replica that leaves a request the most slack: pure functions without clock or I/O.

The gateway and the load test's simulator use the same rule on the same knowledge: the last load
report of each replica, its age, and the requests sent there since.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from ladderstitch.scheduling.load_report import IDLE, LoadReport

DELAY_RESOLUTION_S = 2e-4
"""Delays that differ by less than this count as equal: estimates are no more precise."""

RequestTicket = tuple[int, float]
"""Number of reports received when a request was sent, and the request's deadline."""


@dataclass(slots=True)
class ReplicaLoad:
    """Estimated load of one replica. All times are seconds on the router's own clock."""

    report: LoadReport = IDLE
    """The replica's last report."""
    reported_at: float = 0.0
    """When the last report arrived."""
    num_reports: int = 0
    """Number of reports received."""
    outstanding: int = 0
    """Number of requests sent to the replica and not answered."""
    unreported: list[float] = field(default_factory=list)
    """Sorted deadlines of the outstanding requests that the last report cannot contain."""

    def on_report(self, report: LoadReport, now: float) -> None:
        """Take over a report, which includes every request sent before it."""
        self.report, self.reported_at = report, now
        self.num_reports += 1
        self.unreported.clear()

    def on_sent(self, deadline: float) -> RequestTicket:
        """Count a request that is sent to the replica; return the ticket for `on_ended`."""
        self.outstanding += 1
        insort(self.unreported, deadline)
        return self.num_reports, deadline

    def on_ended(self, ticket: RequestTicket) -> None:
        """Stop counting a request, whether it succeeded or failed."""
        num_reports, deadline = ticket
        self.outstanding -= 1
        if num_reports == self.num_reports:
            del self.unreported[bisect_left(self.unreported, deadline)]

    def delay_s(self, budget_s: float, now: float) -> float:
        """Return the estimated seconds until a request with this budget is answered.

        The estimate is the reported queue, plus the requests sent since, plus the request's own
        work. Requests with an earlier deadline run first, and one batch may already be running if
        any request was sent since the report.
        """
        waited_s = max(0.0, self.report.wait_s(budget_s) - (now - self.reported_at))
        ahead = bisect_right(self.unreported, now + budget_s)
        started_s = self.report.batch_s if self.unreported else 0.0
        return waited_s + started_s + (1 + ahead) * self.report.request_s


def pick_replica(loads: Sequence[ReplicaLoad], budget_s: float, now: float, turn: int) -> int:
    """Return the index of the replica with the largest slack: `budget_s` minus its delay.

    Replicas with equal delay are ordered by outstanding requests, then round-robin from index
    `turn`. Raises `IndexError` if `loads` is empty.
    """
    if not loads:
        raise IndexError("no replica to choose")
    count = len(loads)
    order = ((turn + step) % count for step in range(count))
    return min(order, key=lambda index: _cost(loads[index], budget_s, now))


def _cost(load: ReplicaLoad, budget_s: float, now: float) -> tuple[int, int]:
    return round(load.delay_s(budget_s, now) / DELAY_RESOLUTION_S), load.outstanding
