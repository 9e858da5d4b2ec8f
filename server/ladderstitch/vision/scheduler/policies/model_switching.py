"""Model switching: the load picks the stitch, the slack only the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ladderstitch.scheduling.candidates import Menu
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request
from ladderstitch.vision.scheduler.arrivals import Forecast
from ladderstitch.vision.scheduler.policies.base import Decision, run_late, slack, take

UTILISATION = 0.8
"""Share of a stitch's capacity that it is trusted with."""


@dataclass(frozen=True, slots=True)
class ModelSwitching:
    """The most accurate stitch whose full batches sustain the recent rate of requests."""

    menu: Menu
    overhead_s: float
    forecast: Forecast

    def __call__(self, queue: Sequence[Request], latency: LatencyView, now: float) -> Decision:
        head = queue[0]
        candidates = self.menu.candidates(head)
        left_s = slack(queue, self.menu, latency, now, self.overhead_s)
        full, stitch = latency.max_rows, candidates[0]
        for slower in candidates:
            if self.forecast.rate * latency.seconds(slower, full) <= UTILISATION * full:
                stitch = slower
        rows = latency.largest_fit(stitch, left_s)
        if rows < head.rows:
            stitch, rows = candidates[0], latency.largest_fit(candidates[0], left_s)
        if rows < head.rows:
            return run_late(queue, self.menu, latency, now, self.overhead_s)
        return Decision(take(queue, stitch, rows, self.menu), stitch)
