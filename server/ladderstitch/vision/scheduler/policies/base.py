"""Policies: which requests run next, together, on which stitch. Pure: no clock, no lock, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ladderstitch.scheduling.candidates import Menu
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request

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
