"""What recent requests say of those to come: how many a second, and how patient they are."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from itertools import accumulate

from ladderstitch.scheduling.requests import Request

REMEMBERED = 256
REFRESH_EVERY = 16
"""Requests between two forecasts at most (sorting 256 budgets costs some 15 us); at first it is a
quarter of those that are known: 0.5 points of effective quality on traces of 80 requests."""

FAR_S = 60.0
"""Budgets beyond this, and none at all, are the same."""


@dataclass(frozen=True, slots=True)
class Forecast:
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
        self.forecast = Forecast()

    def add(self, request: Request) -> bool:
        """Whether the forecast was renewed."""
        self._times.append(request.arrival)
        self._budgets.append(min(request.budget.target - request.arrival, FAR_S))
        self._since += 1
        if self._since < min(REFRESH_EVERY, max(2, len(self._times) // 4)):
            return False
        self._since = 0
        span = self._times[-1] - self._times[0]
        budgets = tuple(sorted(self._budgets))
        rate = (len(self._times) - 1) / span if span > 0 else 0.0
        self.forecast = Forecast(rate, budgets, tuple(accumulate(budgets, initial=0.0)))
        return True
