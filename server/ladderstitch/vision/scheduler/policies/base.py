"""Policies: which requests run next, together, on which variant. Pure: no clock, no lock, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request

SCAN_FACTOR = 4
"""A batch of n batch_size looks at no more than this times n requests, however long the queue is."""
NEAR = 32
"""Requests at the head of the queue among which the tightest deadline is looked for."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Run these requests (most urgent first) as one batch on one variant."""

    requests: tuple[Request, ...]
    variant: int


@dataclass(frozen=True, slots=True)
class Defer:
    """Run nothing yet: ask again when a request arrives, at the latest after so long."""

    seconds: float


class Policy(Protocol):
    """`queue` is in deadline order and not empty; `now` is on the clock of the requests."""

    def __call__(
        self, queue: Sequence[Request], latency: LatencyView, now: float
    ) -> Decision | Defer: ...


def fill_batch(
    queue: Sequence[Request], variant: int, batch_size: int, candidates: CandidateFilter
) -> tuple[Request, ...]:
    """The head and, in deadline order, what may share its variant and fits into `batch_size`."""
    head = queue[0]
    chosen, left = [head], batch_size - head.num_images
    for request in queue[1 : SCAN_FACTOR * batch_size] if left > 0 else ():
        size = request.num_images
        if size <= left and candidates.admits(request, variant):
            chosen.append(request)
            left -= size
            if not left:
                break
    return tuple(chosen)


def late_batch(
    queue: Sequence[Request],
    candidates: CandidateFilter,
    latency: LatencyView,
    now: float,
    overhead_s: float,
) -> Decision:
    """For a head that no variant saves: the fastest it may have, shared with others as late.

    Requests that can still be on time are left out, so that a hopeless one does not drag them down.
    """
    head = queue[0]
    variant = candidates.for_request(head)[0]
    hopeless = now + overhead_s + latency.seconds(variant, 1)
    late = [head]
    late += [
        r for r in queue[1 : SCAN_FACTOR * latency.max_batch_size] if r.deadlines.soft < hopeless
    ]
    return Decision(fill_batch(late, variant, latency.max_batch_size, candidates), variant)


def slack(
    queue: Sequence[Request],
    candidates: CandidateFilter,
    latency: LatencyView,
    now: float,
    overhead_s: float,
) -> float:
    """Seconds of compute that make the earliest target around the head.

    That is the head's, unless its priority or its age put it before a tighter request: that one
    counts if it can be on time in one batch with the head.
    """
    head = queue[0]
    fastest = candidates.for_request(head)[0]
    start = now + overhead_s
    possible = start + latency.seconds(fastest, head.num_images)
    earliest = head.deadlines.soft
    for request in queue[1:NEAR]:
        target = request.deadlines.soft
        if not possible < target < earliest or not candidates.admits(request, fastest):
            continue
        batch_size = head.num_images + request.num_images
        if (
            batch_size <= latency.max_batch_size
            and start + latency.seconds(fastest, batch_size) <= target
        ):
            earliest = target
    return earliest - start
