"""The interface of policies and the batch rules that they share, without a clock, locks or I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.cascades import Cascade
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request

SCAN_FACTOR = 4
"""Requests that a batch looks at, in batch sizes, however long the queue is."""
SLACK_SCAN_LIMIT = 32
"""Requests at the head of the queue among which the earliest deadline is looked for."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A batch to run on one variant; `requests` are ordered by urgency, most urgent first.

    With a `cascade`, `variant` is its last one, and the batch has to end by `latest_end`.
    """

    requests: tuple[Request, ...]
    variant: int
    cascade: Cascade | None = None
    latest_end: float = float("inf")

    @property
    def num_images(self) -> int:
        """The number of images of the batch."""
        return sum(request.num_images for request in self.requests)

    @property
    def first(self) -> int:
        """The variant that runs first, on all images."""
        return self.variant if self.cascade is None else self.cascade.first


@dataclass(frozen=True, slots=True)
class Defer:
    """A decision to run nothing yet, and to decide again after `seconds` or at the next arrival."""

    seconds: float


class Policy(Protocol):
    """A function that decides what runs next."""

    def __call__(
        self, queue: Sequence[Request], latency: LatencyView, now: float
    ) -> Decision | Defer:
        """Return the next batch, or the seconds to defer.

        `queue` is in deadline order and not empty. `now` is on the clock of the requests.
        """
        ...


def fill_batch(
    queue: Sequence[Request], variant: int, batch_size: int, candidates: CandidateFilter
) -> tuple[Request, ...]:
    """Return the first request and, in deadline order, the others that fit into its batch.

    A request fits if `variant` may answer it and the batch has at most `batch_size` images with it.
    """
    head = queue[0]
    chosen, left = [head], batch_size - head.num_images
    reached = candidates.free_quality(variant)
    for request in queue[1 : SCAN_FACTOR * batch_size] if left > 0 else ():
        size = request.num_images
        if size <= left and (
            (request.variant is None and request.min_quality <= reached)
            or candidates.allows(request, variant)
        ):
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
    """Return a batch for a first request that misses its soft deadline on every variant.

    It runs on the fastest variant that the request allows, together with other late requests.
    Requests that can still be on time are left out, so that the late one does not delay them.
    """
    head = queue[0]
    variant = candidates.for_request(head)[0]
    earliest_end = now + overhead_s + latency.seconds(variant, 1)
    late = [head]
    late += [
        request
        for request in queue[1 : SCAN_FACTOR * latency.max_batch_size]
        if request.deadlines.soft < earliest_end
    ]
    return Decision(fill_batch(late, variant, latency.max_batch_size, candidates), variant)


def slack(
    queue: Sequence[Request],
    candidates: CandidateFilter,
    latency: LatencyView,
    now: float,
    overhead_s: float,
) -> float:
    """Return the seconds of compute until the earliest soft deadline near the head of the queue.

    That is the deadline of the first request, unless priority or age put this request ahead of one
    with an earlier deadline. The earlier deadline counts if a batch of the two can meet it.
    """
    head = queue[0]
    fastest = candidates.for_request(head)[0]
    start = now + overhead_s
    possible = start + latency.seconds(fastest, head.num_images)
    earliest = head.deadlines.soft
    for request in queue[1:SLACK_SCAN_LIMIT]:
        deadline = request.deadlines.soft
        if not possible < deadline < earliest or not candidates.allows(request, fastest):
            continue
        batch_size = head.num_images + request.num_images
        if (
            batch_size <= latency.max_batch_size
            and start + latency.seconds(fastest, batch_size) <= deadline
        ):
            earliest = deadline
    return earliest - start
