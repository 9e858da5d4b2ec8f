"""The choice of a cascade for a batch whose variant the policy has chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.cascades import Cascade, CascadeSet, fill_share
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request
from ladderstitch.vision.scheduler.policies.base import SLACK_SCAN_LIMIT, Decision


@dataclass(frozen=True, slots=True)
class CascadeChooser:
    """The rule that replaces a variant by a cascade if that is expected to take less time.

    The last variant of the cascade is at least as good as the replaced one, and all requests of the
    batch allow both of its variants. Its planned seconds, in which as many images go on as in 99
    of 100 batches, keep the deadlines of the batch. They keep those of the next waiting requests,
    too, except for those that the replaced variant alone would make late.
    """

    cascades: CascadeSet
    candidates: CandidateFilter
    overhead_s: float

    def choose(
        self, decision: Decision, waiting: Sequence[Request], latency: LatencyView, now: float
    ) -> Decision:
        """Return the decision with a cascade, or as it is; `waiting` is the rest of the queue."""
        requests = decision.requests
        if requests[0].min_confidence == 0 or self.candidates.fixed is not None:
            return decision
        requests = tuple(r for r in requests if r.min_confidence > 0)
        num_images = sum(request.num_images for request in requests)
        start = now + latency.dispatch_overhead_s
        planned_end = start + latency.seconds(decision.variant, num_images)
        latest_end = self._latest_end(requests, waiting, latency, planned_end)
        best: Cascade | None = None
        least_s = latency.expected(decision.variant, num_images)
        for cascade in self.cascades.cascades:
            if not self._is_allowed(cascade, decision.variant, requests):
                continue
            expected_s = expected_seconds(cascade, requests, latency)
            if expected_s >= least_s:
                continue
            if start + _planned_seconds(cascade, requests, latency) <= latest_end:
                best, least_s = cascade, expected_s
        return decision if best is None else Decision(requests, best.last, best, latest_end)

    def _is_allowed(self, cascade: Cascade, variant: int, requests: Sequence[Request]) -> bool:
        quality, allows = self.candidates.quality, self.candidates.allows
        return quality[cascade.last] >= quality[variant] and all(
            allows(request, cascade.first) and allows(request, cascade.last) for request in requests
        )

    def _latest_end(
        self,
        requests: Sequence[Request],
        waiting: Sequence[Request],
        latency: LatencyView,
        planned_end: float,
    ) -> float:
        """Return the instant by which a batch has to end; `planned_end` is without a cascade."""
        fastest_s = latency.seconds(self.candidates.frontier[0], 1)
        ends = [request.deadlines.soft - self.overhead_s for request in requests]
        for request in waiting[:SLACK_SCAN_LIMIT]:
            end = request.deadlines.soft - self.overhead_s - fastest_s
            if end >= planned_end:
                ends.append(end)
        return min(ends)


def going_on(cascade: Cascade, requests: Sequence[Request]) -> float:
    """Return the images of a batch that are expected to go on to the last variant."""
    return sum(cascade.going_on(r.min_confidence) * r.num_images for r in requests)


def tail_seconds(cascade: Cascade, num_images: int, whole_s: float) -> float:
    """Return the seconds that the last variant takes after the stitch; `whole_s` from the start."""
    return (1.0 - cascade.shared) * whole_s if num_images else 0.0


def expected_seconds(cascade: Cascade, requests: Sequence[Request], latency: LatencyView) -> float:
    """Return the expected seconds of compute of a batch on a cascade."""
    num_images = sum(request.num_images for request in requests)
    mean = going_on(cascade, requests)
    count = max(1, round(mean))
    tail_s = tail_seconds(cascade, count, latency.expected(cascade.last, count))
    return latency.expected(cascade.first, num_images) + tail_s * mean / count


def _planned_seconds(cascade: Cascade, requests: Sequence[Request], latency: LatencyView) -> float:
    """Return the seconds to plan with, if as many images go on as in 99 of 100 batches."""
    num_images = sum(request.num_images for request in requests)
    mean = going_on(cascade, requests)
    count = min(num_images, math.ceil(fill_share(mean, mean / num_images)))
    tail_s = tail_seconds(cascade, count, latency.seconds(cascade.last, max(1, count)))
    return latency.seconds(cascade.first, num_images) + tail_s


def select_in_time(
    cascade: Cascade,
    unsure: Sequence[tuple[Request, int]],
    latency: LatencyView,
    now: float,
    latest_end: float,
) -> list[Request]:
    """Return the requests whose unsure images can go on and end by their deadlines.

    `unsure` has each request with the number of its images that are not sure. `latest_end` is the
    instant by which the whole batch has to end. If the time does not suffice for all, the most
    urgent ones stop first.
    """
    left = sorted(unsure, key=lambda pair: pair[0].deadlines.soft)
    while left:
        count = sum(images for _, images in left)
        end = now + tail_seconds(cascade, count, latency.seconds(cascade.last, count))
        if end <= min(latest_end, left[0][0].deadlines.soft):
            break
        left = left[1:]
    return [request for request, _ in left]
