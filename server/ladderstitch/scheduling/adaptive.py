"""The adaptive policy: the stitch and batch of highest expected effective quality."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from ladderstitch.core import Request
from ladderstitch.scheduling.arrivals import Forecast
from ladderstitch.scheduling.latency import LatencyView
from ladderstitch.scheduling.menu import Menu
from ladderstitch.scheduling.policy import Decision, run_late, take
from ladderstitch.scheduling.prices import Prices

LOOK = 4
AHEAD = (1.0, 1.5, 2.0, 3.0, 6.0)
SKIP = 1.0
GUARD = 0.25
MARGIN = 1.0
LOST = 1.0
SPELL = 0.85
DOWN = 0.0
ROWS = lambda fits, head: sorted({fits, (fits + 1) // 2, head})


@dataclass(frozen=True, slots=True)
class Adaptive:
    menu: Menu
    overhead_s: float
    forecast: Forecast
    prices: Prices

    def __call__(self, queue: Sequence[Request], latency: LatencyView, now: float) -> Decision:
        start = now + self.overhead_s
        first = self._first_hopeful(queue, latency, start)
        if first == len(queue):
            return run_late(queue, self.menu, latency, now, self.overhead_s)
        state = self._state(queue, first, latency, start)
        best = self._best(queue, first, latency, start, state, 0)
        if state[3]:
            fastest = self.menu.frontier[0]
            full = start + latency.seconds(fastest, latency.max_rows)
            skip = bisect_left(queue, full, lo=first, key=_target)
            if first < skip < len(queue):
                other = self._best(queue, skip, latency, start, state, skip - first)
                best = max(best, other)
        _, at, stitch, rows = best
        return Decision(take(queue[at : at + 4 * rows], stitch, rows, self.menu), stitch)

    def _first_hopeful(self, queue: Sequence[Request], latency: LatencyView, start: float) -> int:
        possible = start + latency.seconds(self.menu.frontier[0], 1)
        if queue[0].budget.target >= possible:
            return 0
        return bisect_left(queue, possible, key=_target)

    def _state(self, queue, first, latency, start):
        forecast = self.forecast
        waiting = len(queue) - first
        typical = forecast.typical_s or queue[-1].budget.target - start
        rows = 1
        points = []
        while rows < waiting:
            h = queue[first + rows - 1].budget.target - start
            points.append((h, rows + forecast.late(h, 0.0)))
            rows *= 2
        last = queue[-1].budget.target - start
        points.append((last, waiting + forecast.late(last, 0.0)))
        for x in AHEAD:
            h = x * typical
            if h > last:
                points.append((h, waiting + forecast.late(h, 0.0)))
        scale = 1 / (latency.slowdown * latency.tail)
        points = [((h - GUARD * (forecast.quantile_s(.05) or typical)) * scale, d) for h, d in points]
        hull = self.prices.hull(latency.profiled_slack(SPELL * (forecast.quantile_s(.05) or typical)))
        tight = min(h / d for h, d in points) < hull.costs_s[0] * SKIP
        return points, hull, typical, tight

    def _best(self, queue, first, latency, start, state, skipped):
        head = queue[first]
        near = queue[first : first + latency.max_rows + LOOK]
        left = head.budget.target - start
        candidates = self.menu.candidates(head)
        best = (-1e9, first, candidates[0], head.rows)
        for stitch in candidates:
            fits = min(latency.largest_fit(stitch, left), len(near))
            if fits < head.rows:
                break
            for rows in ROWS(fits, head.rows):
                value = self._value(near, stitch, rows, latency, start, state, skipped)
                if value >= best[0]:
                    best = (value, first, stitch, rows)
        return best

    def _value(self, near, stitch, rows, latency, start, state, skipped):
        points, hull, _, _ = state
        quality, fastest = self.menu.quality, self.menu.frontier[0]
        batch = min(rows, len(near))
        busy_s, alone_s = latency.seconds(stitch, rows), latency.seconds(fastest, 1)
        value = quality[stitch] * batch + 1e-6 * batch
        lost = self.forecast.late(busy_s, alone_s + self.overhead_s)
        if not skipped:
            for j, r in enumerate(near[batch:batch+LOOK], start=1):
                w = r.budget.target - start - busy_s
                if w < latency.seconds(fastest, j):
                    lost += 1
                    break
        value += self._rest(points, hull, latency.profiled[stitch][rows], batch + skipped)
        return value - quality[fastest] * LOST * lost

    def _rest(self, points, hull, took, done):
        value = 0.0
        x = y = 0.0
        left = [(h - took, d - done) for h, d in points if d > done]
        while left:
            u, k = min(((h - y) / (d - x + 1e-9), i) for i, (h, d) in enumerate(left))
            h, d = left[k]
            value += (d - x) * (hull.quality(u * MARGIN) if u > 0 else 0.0)
            x, y = d, max(y, h)
            left = [p for p in left[k+1:] if p[1] > x]
        return value


def _target(request: Request) -> float:
    return request.budget.target
