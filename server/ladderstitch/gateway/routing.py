"""Which replica a request goes to: the one that leaves it the most slack. Pure, no clock, no I/O.

The gateway and the load test's simulator use the same rule on the same knowledge: what a replica
said last, how long ago, and what was sent there since.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from ladderstitch.scheduling.load_report import IDLE, LoadReport

GRAIN_S = 2e-4
"""Delays that differ by less are equal: no estimate is better than that."""


RequestTicket = tuple[int, float]
"""How often the replica had spoken when a request went there, and when the request is due."""


@dataclass(slots=True)
class ReplicaLoad:
    """What is known of one replica; all times are seconds on the router's own clock."""

    report: LoadReport = IDLE
    reported_at: float = 0.0
    reports: int = 0
    outstanding: int = 0  # sent there and not answered
    unreported: list[float] = field(default_factory=list)
    """When those of them are due that the backlog cannot contain yet, in order."""

    def on_report(self, report: LoadReport, now: float) -> None:
        """The replica speaks: it knows of all that was sent before."""
        self.report, self.reported_at = report, now
        self.reports += 1
        self.unreported.clear()

    def on_sent(self, due: float) -> RequestTicket:
        """A request goes there; the mark to give to `ended`."""
        self.outstanding += 1
        insort(self.unreported, due)
        return self.reports, due

    def on_ended(self, mark: RequestTicket) -> None:
        """A request has come back, one way or another."""
        reports, due = mark
        self.outstanding -= 1
        if reports == self.reports:
            del self.unreported[bisect_left(self.unreported, due)]

    def delay_s(self, budget_s: float, now: float) -> float:
        """Seconds until an answer: what waits there, what was sent since, and its own work.

        What is due earlier goes first; whatever was sent since may be running already.
        """
        waited_s = max(0.0, self.report.wait_s(budget_s) - (now - self.reported_at))
        ahead = bisect_right(self.unreported, now + budget_s)
        started_s = self.report.batch_s if self.unreported else 0.0
        return waited_s + started_s + (1 + ahead) * self.report.request_s


def choose(views: Sequence[ReplicaLoad], budget_s: float, now: float, turn: int) -> int:
    """Place of the replica whose slack, `budget_s` less its delay, is the largest.

    Among equals the one with the fewest requests under way, then each in its turn. Raises
    `IndexError` if there is none.
    """
    if not views:
        raise IndexError("no replica to choose")
    count = len(views)
    order = ((turn + step) % count for step in range(count))
    return min(order, key=lambda place: _cost(views[place], budget_s, now))


def _cost(view: ReplicaLoad, budget_s: float, now: float) -> tuple[int, int]:
    return round(view.delay_s(budget_s, now) / GRAIN_S), view.outstanding
