"""The adaptive policy: the stitch and batch of highest expected effective quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ladderstitch.core import Request
from ladderstitch.scheduling.arrivals import Forecast
from ladderstitch.scheduling.latency import LatencyView
from ladderstitch.scheduling.menu import Menu
from ladderstitch.scheduling.policy import Decision, run_late, slack, take

LOOK = 4
"""Requests beyond the batch whose fate is weighed."""


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Weighs what a batch earns against what its time costs others.

    The value of running n rows on a stitch is their quality, plus the quality that those left
    waiting can still have after it, less the newcomers whom the forecast expects to be late for it:
    the engine is not preemptive, so a tight request that arrives behind a slow batch is lost.
    """

    menu: Menu
    overhead_s: float
    forecast: Forecast

    def __call__(self, queue: Sequence[Request], latency: LatencyView, now: float) -> Decision:
        head = queue[0]
        candidates = self.menu.candidates(head)
        left = slack(queue, self.menu, latency, now, self.overhead_s)
        if latency.largest_fit(candidates[0], left) < head.rows:
            return run_late(queue, self.menu, latency, now, self.overhead_s)
        near = queue[: latency.max_rows + LOOK]
        best: tuple[float, int, int] | None = None
        for stitch in candidates:
            fits = latency.largest_fit(stitch, left)
            if fits < head.rows:
                break  # candidates rise in latency
            for rows in {head.rows, min(fits, max(head.rows, len(near)))}:
                value = self._value(near, stitch, rows, latency, now)
                if best is None or value >= best[0]:
                    best = (value, stitch, rows)
        assert best is not None, "the fastest candidate fits"
        return Decision(take(queue, best[1], best[2], self.menu), best[1])

    def _value(
        self, near: Sequence[Request], stitch: int, rows: int, latency: LatencyView, now: float
    ) -> float:
        """Expected sum of quality over the batch and those whom it concerns."""
        quality, fastest = self.menu.quality, self.menu.frontier[0]
        batch = min(rows, len(near))
        busy_s, alone_s = latency.seconds(stitch, rows), latency.seconds(fastest, 1)
        start = now + self.overhead_s
        # Those behind the first few have later targets and are as good as on time.
        chances = [
            latency.chance(stitch, rows, r.budget.target - start) for r in near[:LOOK][:batch]
        ]
        value = quality[stitch] * (sum(chances) + batch - len(chances))
        for request in near[batch : batch + LOOK]:
            wait = request.budget.target - start - busy_s
            if wait >= latency.seconds(stitch, 1):
                value += quality[stitch]
            elif wait >= alone_s:
                value += quality[fastest]
        late = self.forecast.late(busy_s, alone_s + self.overhead_s)
        return value - quality[fastest] * late
