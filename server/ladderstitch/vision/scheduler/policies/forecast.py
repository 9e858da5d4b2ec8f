"""The forecast of arrivals: their rate, their budgets, and whether this traffic has stopped."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import inf

from ladderstitch.scheduling.requests import Request

BUDGET_CAP_S = 60.0
"""Seconds above which all budgets are equal; a request without a budget has this one, too."""
ARRIVAL_WINDOW = 256
"""Recent requests that the forecast is based on."""
REFRESH_INTERVAL = 16
"""Most requests between two forecasts, because sorting 256 budgets costs some 15 us.

At first the interval is a quarter of the requests that are known, which is worth 0.5 points of
effective quality on traces of 80 requests.
"""
AGE_AT_START = 0.1
"""For how long traffic counts as known at its first request, in mean budgets."""
STOP_ODDS = 5.0
"""Odds that traffic stops within a silence as long as it is known; they fall with the square."""


@dataclass(slots=True)
class ArrivalForecast:
    """The rate of recent images in 1/s, and the budgets of their requests; nothing changes them.

    It is not frozen, because creating a frozen one takes three times as long.
    """

    rate: float = 0.0
    budgets_s: tuple[float, ...] = ()
    """Budgets of recent requests in ascending order."""
    sums_s: tuple[float, ...] = (0.0,)
    """Running sums of the budgets, starting with 0."""
    images_per_request: float = 1.0
    gaps_s: tuple[float, ...] = ()
    """Seconds between recent arrivals in ascending order."""
    first: float = -inf
    """Instant of the first of the recent arrivals."""
    last: float = inf
    """Instant of the last arrival."""

    def at(self, now: float) -> ArrivalForecast:
        """Return the forecast at `now`, when the traffic may have stopped.

        The probability that it has not follows from the silence since the last arrival: from the
        share of recent gaps that were longer, and from the odds that traffic that is known for so
        long stops within the silence.
        """
        if not self.gaps_s:
            return self
        silence_s = now - self.last
        if silence_s <= self.gaps_s[0]:
            return self
        known_s = now - self.first + AGE_AT_START * self.mean_budget_s
        longer = len(self.gaps_s) - bisect_right(self.gaps_s, silence_s)
        share = (1 + longer) / (1 + len(self.gaps_s))
        stopped = STOP_ODDS * (silence_s / known_s) ** 2
        rate = self.rate * share / (share + stopped)
        return ArrivalForecast(rate, self.budgets_s, self.sums_s, self.images_per_request)

    @property
    def mean_budget_s(self) -> float:
        """The mean of the recent budgets; 0 if there are none."""
        return self.sums_s[-1] / len(self.budgets_s) if self.budgets_s else 0.0

    def budget_quantile_s(self, share: float) -> float:
        """Return the budget below which this share of the requests is; 0 if there are none."""
        return self.budgets_s[int(share * len(self.budgets_s))] if self.budgets_s else 0.0

    def expected_late(self, busy_s: float, fastest_s: float) -> float:
        """Return the expected number of new images that a busy period of the engine makes late.

        A new request with budget b that arrives t seconds into the period waits `busy_s - t` and
        then needs `fastest_s`: it is late if t < busy_s + fastest_s - b. Requests with b <
        fastest_s are late whatever the engine does, and do not count.
        """
        reach, budgets_s, sums_s = busy_s + fastest_s, self.budgets_s, self.sums_s
        if not budgets_s or reach <= budgets_s[0]:
            return 0.0
        last = bisect_left(budgets_s, reach)
        if fastest_s <= budgets_s[0]:
            periods = last * reach - sums_s[last]
        else:
            first = bisect_left(budgets_s, fastest_s)
            periods = (last - first) * reach - (sums_s[last] - sums_s[first])
        return self.rate * periods / len(budgets_s)

    def add_arrivals(self, due: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """Return pairs of seconds from now and images due by then, with the new images added."""
        budgets_s, sums_s, rate = self.budgets_s, self.sums_s, self.rate
        if not budgets_s:
            return list(due)
        shortest_s, number = budgets_s[0], len(budgets_s)
        first = 0 if shortest_s >= 0 else bisect_left(budgets_s, 0.0)
        total = []
        for due_s, images in due:
            if due_s > shortest_s:
                last = bisect_left(budgets_s, due_s)
                periods = (last - first) * due_s - (sums_s[last] - sums_s[first])
                images += rate * periods / number
            total.append((due_s, images))
        return total


class Arrivals:
    """The most recent requests and the forecast from them; each request replaces `forecast`."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=ARRIVAL_WINDOW)
        self._budgets: deque[float] = deque(maxlen=ARRIVAL_WINDOW)
        self._images: deque[int] = deque(maxlen=ARRIVAL_WINDOW)
        self._since_refresh = 0
        self.forecast = ArrivalForecast()

    def add(self, request: Request) -> None:
        """Add a request."""
        self._times.append(request.arrival)
        self._budgets.append(min(request.deadlines.soft - request.arrival, BUDGET_CAP_S))
        self._images.append(request.num_images)
        self._since_refresh += 1
        if self._since_refresh < min(REFRESH_INTERVAL, max(2, len(self._times) // 4)):
            self.forecast = replace(self.forecast, last=request.arrival)
            return
        self._since_refresh = 0
        span = self._times[-1] - self._times[0]
        budgets = tuple(sorted(self._budgets))
        images = sum(self._images) / len(self._images)
        rate = images * (len(self._times) - 1) / span if span > 0 else 0.0
        sums = tuple(accumulate(budgets, initial=0.0))
        gaps = tuple(sorted([max(0.0, b - a) for a, b in pairwise(self._times)]))
        self.forecast = ArrivalForecast(
            rate, budgets, sums, images, gaps, self._times[0], request.arrival
        )
