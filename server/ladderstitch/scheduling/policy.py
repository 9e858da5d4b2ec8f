"""Policies: which requests run next, together, on which stitch. Pure: no clock, no lock, no I/O."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ladderstitch.core import Request
from ladderstitch.scheduling.latency import LatencyView
from ladderstitch.scheduling.menu import Menu

SCAN_FACTOR = 4
"""A batch of n rows looks at no more than this times n requests, however long the queue is."""
NEAR = 32
"""Requests at the head of the queue among which the tightest deadline is looked for."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Run these requests (most urgent first) as one batch on one stitch."""

    requests: tuple[Request, ...]
    stitch: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Run nothing yet: ask again when a request arrives, at the latest after so long."""

    seconds: float


class Policy(Protocol):
    """`queue` is in deadline order and not empty; `now` is on the clock of the requests."""

    def __call__(
        self, queue: Sequence[Request], latency: LatencyView, now: float
    ) -> Decision | Hold: ...


def take(queue: Sequence[Request], stitch: int, rows: int, menu: Menu) -> tuple[Request, ...]:
    """The head and, in deadline order, what may share its stitch and fits into `rows`."""
    head = queue[0]
    chosen, left = [head], rows - head.rows
    for request in queue[1 : SCAN_FACTOR * rows] if left > 0 else ():
        size = request.rows
        if size <= left and menu.admits(request, stitch):
            chosen.append(request)
            left -= size
            if not left:
                break
    return tuple(chosen)


def run_late(
    queue: Sequence[Request], menu: Menu, latency: LatencyView, now: float, overhead_s: float
) -> Decision:
    """For a head that no stitch saves: the fastest it may have, shared with others as late.

    Requests that can still be on time are left out, so that a hopeless one does not drag them down.
    """
    head = queue[0]
    stitch = menu.candidates(head)[0]
    hopeless = now + overhead_s + latency.seconds(stitch, 1)
    late = [head]
    late += [r for r in queue[1 : SCAN_FACTOR * latency.max_rows] if r.budget.target < hopeless]
    return Decision(take(late, stitch, latency.max_rows, menu), stitch)


def slack(
    queue: Sequence[Request], menu: Menu, latency: LatencyView, now: float, overhead_s: float
) -> float:
    """Seconds of compute that make the earliest target around the head.

    That is the head's, unless its priority or its age put it before a tighter request: that one
    counts if it can be on time in one batch with the head.
    """
    head = queue[0]
    fastest = menu.candidates(head)[0]
    start = now + overhead_s
    possible = start + latency.seconds(fastest, head.rows)
    earliest = head.budget.target
    for request in queue[1:NEAR]:
        target = request.budget.target
        if not possible < target < earliest or not menu.admits(request, fastest):
            continue
        rows = head.rows + request.rows
        if rows <= latency.max_rows and start + latency.seconds(fastest, rows) <= target:
            earliest = target
    return earliest - start


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
