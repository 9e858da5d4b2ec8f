"""Baseline policies: one fixed stitch, the best stitch first, the largest batch first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ladderstitch.scheduling.candidates import Menu
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request
from ladderstitch.vision.scheduler.policies.base import Decision, run_late, slack, take


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the stitch that the menu fixes, with the largest batch that makes the targets."""

    menu: Menu
    overhead_s: float

    def __call__(self, queue: Sequence[Request], latency: LatencyView, now: float) -> Decision:
        head = queue[0]
        stitch = self.menu.candidates(head)[0]
        left = slack(queue, self.menu, latency, now, self.overhead_s)
        rows = latency.largest_fit(stitch, left)
        # A late head gains nothing from a small batch, and those behind it wait the less.
        rows = rows if rows >= head.rows else latency.max_rows
        return Decision(take(queue, stitch, rows, self.menu), stitch)


@dataclass(frozen=True, slots=True)
class MaxQuality:
    """The most accurate stitch that fits for the head alone, then the largest batch on it."""

    menu: Menu
    overhead_s: float

    def __call__(self, queue: Sequence[Request], latency: LatencyView, now: float) -> Decision:
        head = queue[0]
        left = slack(queue, self.menu, latency, now, self.overhead_s)
        for stitch in reversed(self.menu.candidates(head)):
            rows = latency.largest_fit(stitch, left)
            if rows >= head.rows:
                return Decision(take(queue, stitch, rows, self.menu), stitch)
        return run_late(queue, self.menu, latency, now, self.overhead_s)


@dataclass(frozen=True, slots=True)
class MaxBatch:
    """The largest batch that fits on the fastest stitch, then the most accurate stitch for it."""

    menu: Menu
    overhead_s: float

    def __call__(self, queue: Sequence[Request], latency: LatencyView, now: float) -> Decision:
        head = queue[0]
        left = slack(queue, self.menu, latency, now, self.overhead_s)
        candidates = self.menu.candidates(head)
        rows = latency.largest_fit(candidates[0], left)
        if rows < head.rows:
            return run_late(queue, self.menu, latency, now, self.overhead_s)
        batch = take(queue, candidates[0], rows, self.menu)
        size = sum(request.rows for request in batch)
        for stitch in reversed(candidates):
            fits = latency.seconds(stitch, size) <= left
            if fits and all(self.menu.admits(request, stitch) for request in batch):
                return Decision(batch, stitch)
        return Decision(batch, candidates[0])
