"""How many batch_size are due by when, those still to come included, and what they can earn."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ladderstitch.scheduling.requests import Request
from ladderstitch.vision.scheduler.policies.quality_hull import QualityHull

AHEAD = 2.0
"""How far ahead newcomers are expected, in typical budgets."""
GUARD = 0.25
"""Part of an impatient request's budget that is not planned with: batches are no fluid."""
IMPATIENT = 0.05
"""Share of requests whose budgets are shorter than what batches are planned around."""
LEAST_S = 1e-6
"""No budget is taken for shorter than this."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A demand bound function: by `points[k][0]` seconds from now, `points[k][1]` batch_size are due.

    Of the function only the points that can bind, its lower hull. `each_s` is the least time
    a row that those who wait have, many of them together or all.
    """

    points: tuple[tuple[float, float], ...]
    impatient_s: float
    each_s: float

    @classmethod
    def of(
        cls,
        queue: Sequence[Request],
        near: Sequence[Request],
        first: int,
        forecast: ArrivalForecast,
        start: float,
    ) -> Demand:
        """Of newcomers and the queue from index `first` on, looked at wherever it is fourfold.

        `near` is the queue's beginning, as a list: looked up ten times as fast.
        """
        waiting = len(queue) - first
        last_s = min(queue[-1].deadlines.soft - start, FAR_S)
        typical_s = forecast.typical_s or last_s
        impatient_s = max(LEAST_S, forecast.quantile_s(IMPATIENT) or typical_s)
        dues, batch_size = [], 1
        while batch_size < waiting:
            last = first + batch_size - 1
            request = near[last] if last < len(near) else queue[last]
            dues.append((min(request.deadlines.soft - start, FAR_S), batch_size))
            batch_size *= 4
        dues.append((last_s, waiting))
        guard_s = GUARD * impatient_s
        each_s = min(
            (due - guard_s) / batch_size for due, batch_size in dues[min(2, len(dues) - 1) :]
        )
        if last_s < AHEAD * typical_s:
            dues.append((AHEAD * typical_s, waiting))
        points = [(due - guard_s, batch_size + forecast.late(due, 0.0)) for due, batch_size in dues]
        return cls(_lower_hull(points), impatient_s, each_s)

    def earnings(self, hull: QualityHull, busy_s: float, done: int, scale: float) -> float:
        """Quality that all batch_size but the first `done` can have after a busy spell.

        Fluid service in order of deadlines: the greatest convex minorant of the points, each of its
        segments at the quality that its seconds a row allow. `scale` turns seconds into the hull's.
        """
        value = at_s = at_rows = 0.0
        points, count, k = self.points, len(self.points), 0
        while k < count:
            least, best = float("inf"), -1
            for i in range(k, count):
                due, batch_size = points[i]
                batch_size -= done
                if batch_size > at_rows:
                    slope = (due - busy_s - at_s) / (batch_size - at_rows)
                    if slope < least:
                        least, best = slope, i
            if best < 0:
                break
            due, batch_size = points[best]
            batch_size -= done
            if least > 0:
                value += (batch_size - at_rows) * hull.quality(least * scale)
            at_rows, at_s, k = batch_size, max(at_s, due - busy_s), best + 1
        return value


def _lower_hull(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Those of (seconds, batch_size), both rising, between which no other has less time for its batch_size."""
    hull: list[tuple[float, float]] = []
    for due, batch_size in points:
        while len(hull) > 1:
            (first_s, first), (middle_s, middle) = hull[-2:]
            if (middle_s - first_s) * (batch_size - first) < (due - first_s) * (middle - first):
                break
            hull.pop()
        hull.append((due, batch_size))
    return tuple(hull)


REMEMBERED = 256
REFRESH_EVERY = 16
"""Requests between two forecasts at most (sorting 256 budgets costs some 15 us); at first it is a
quarter of those that are known: 0.5 points of effective quality on traces of 80 requests."""

FAR_S = 60.0
"""Budgets beyond this, and none at all, are the same."""


@dataclass(frozen=True, slots=True)
class ArrivalForecast:
    """Requests per second, and recent budgets in ascending order with their running sums."""

    rate: float = 0.0
    budgets_s: tuple[float, ...] = ()
    sums_s: tuple[float, ...] = (0.0,)

    @property
    def typical_s(self) -> float:
        """The mean budget of those that have one."""
        return self.sums_s[-1] / len(self.budgets_s) if self.budgets_s else 0.0

    def quantile_s(self, share: float) -> float:
        """The budget that this share of the requests fall below; 0 if nothing is known."""
        return self.budgets_s[int(share * len(self.budgets_s))] if self.budgets_s else 0.0

    def late(self, busy_s: float, fastest_s: float) -> float:
        """Expected number of newcomers that a busy spell of the engine makes late.

        A newcomer with budget b that arrives t into the spell waits busy_s - t and then needs
        fastest_s: it is late if t < busy_s + fastest_s - b. Those with b < fastest_s are late
        whatever the engine does and do not count.
        """
        reach = busy_s + fastest_s
        if not self.budgets_s or reach <= self.budgets_s[0]:
            return 0.0
        first, last = bisect_left(self.budgets_s, fastest_s), bisect_left(self.budgets_s, reach)
        spells = (last - first) * reach - (self.sums_s[last] - self.sums_s[first])
        return self.rate * spells / len(self.budgets_s)


class Arrivals:
    """Remembers the latest requests; `forecast` is replaced, never changed."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=REMEMBERED)
        self._budgets: deque[float] = deque(maxlen=REMEMBERED)
        self._since = 0
        self.forecast = ArrivalForecast()

    def add(self, request: Request) -> bool:
        """Whether the forecast was renewed."""
        self._times.append(request.arrival)
        self._budgets.append(min(request.deadlines.soft - request.arrival, FAR_S))
        self._since += 1
        if self._since < min(REFRESH_EVERY, max(2, len(self._times) // 4)):
            return False
        self._since = 0
        span = self._times[-1] - self._times[0]
        budgets = tuple(sorted(self._budgets))
        rate = (len(self._times) - 1) / span if span > 0 else 0.0
        self.forecast = ArrivalForecast(rate, budgets, tuple(accumulate(budgets, initial=0.0)))
        return True
