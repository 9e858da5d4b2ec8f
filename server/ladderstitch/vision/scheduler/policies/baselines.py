"""Baseline policies: one fixed stitch, the best stitch first, the largest batch first."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from ladderstitch.scheduling.candidates import Menu
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request
from ladderstitch.vision.scheduler.policies.base import Decision, run_late, slack, take
from ladderstitch.vision.scheduler.policies.demand import Forecast


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


@dataclass(frozen=True, slots=True)
class Bucket:
    """One of SlackFit's control choices, at its bucket's upper edge in profiled seconds."""

    upper_s: float
    rows: int
    stitch: int


def slackfit_buckets(candidates: Sequence[int], latency: LatencyView, count: int) -> list[Bucket]:
    """SuperServe's table (NSDI'25): ascending buckets, empty ones left out.

    [l(fastest, 1), l(slowest, max_rows)] is cut into `count` equal parts; every (stitch, rows)
    belongs to the part that holds its profiled latency; each part keeps its largest batch, of equal
    batches the one of the highest quality (`candidates` are in order of quality).
    """
    low = latency.profiled[candidates[0]][1]
    high = max(latency.profiled[stitch][latency.max_rows] for stitch in candidates)
    width = (high - low) / count
    kept: dict[int, Bucket] = {}
    for stitch in candidates:
        for rows in range(1, latency.max_rows + 1):
            seconds = latency.profiled[stitch][rows]
            index = min(count - 1, int((seconds - low) / width)) if width > 0 else 0
            if index not in kept or rows >= kept[index].rows:
                kept[index] = Bucket(low + (index + 1) * width, rows, stitch)
    return [kept[index] for index in sorted(kept)]


@dataclass(frozen=True, slots=True)
class SlackFit:
    """SuperServe's policy: the head's slack picks a latency bucket, the bucket a batch and stitch.

    The table is built once for each set of candidates; the online slow-down scales all latencies
    alike, so the slack is divided by it instead.
    """

    menu: Menu
    buckets: int
    overhead_s: float
    _tables: dict[tuple[int, ...], tuple[list[float], list[Bucket]]] = field(default_factory=dict)

    def __call__(self, queue: Sequence[Request], latency: LatencyView, now: float) -> Decision:
        head = queue[0]
        candidates = self.menu.candidates(head)
        left = slack(queue, self.menu, latency, now, self.overhead_s)
        edges, table = self._table(candidates, latency)
        for index in reversed(range(bisect_right(edges, latency.profiled_slack(left)))):
            choice = table[index]
            if choice.rows >= head.rows:
                return Decision(take(queue, choice.stitch, choice.rows, self.menu), choice.stitch)
        rows = latency.largest_fit(candidates[0], left)
        if rows >= head.rows:  # between the fastest stitch and the first bucket's edge
            return Decision(take(queue, candidates[0], rows, self.menu), candidates[0])
        return run_late(queue, self.menu, latency, now, self.overhead_s)

    def _table(
        self, candidates: tuple[int, ...], latency: LatencyView
    ) -> tuple[list[float], list[Bucket]]:
        if candidates not in self._tables:
            buckets = slackfit_buckets(candidates, latency, self.buckets)
            self._tables[candidates] = ([bucket.upper_s for bucket in buckets], buckets)
        return self._tables[candidates]
