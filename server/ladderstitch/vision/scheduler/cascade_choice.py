"""The choice of a cascade for a batch whose variant the policy has chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.cascades import Cascade, CascadeSet, fill_share
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request
from ladderstitch.vision.scheduler.policies.base import SLACK_SCAN_LIMIT, Decision

Needs = Mapping[float, int]
"""Numbers of images by the minimum confidence of their requests."""


class CascadeChooser:
    """The rule that replaces the variant that a policy has chosen by a cascade.

    A cascade may be expected to take as long as the variant, at most. For a request that runs
    alone while none waits, the rule takes one with the best last variant, and of these the one that
    is expected to take least. Otherwise time is scarce: the rule takes the cascade of the highest
    expected quality, and only if that exceeds the variant's. The last variant is at least as good
    as the replaced one, and all requests of the batch allow both.

    The planned seconds, in which as many images go on as in 99 of 100 batches, keep the deadlines
    of the batch. They keep those of the next waiting requests, too, except for those that the
    replaced variant alone would make late.
    """

    def __init__(
        self, cascades: CascadeSet, candidates: CandidateFilter, overhead_s: float
    ) -> None:
        self.candidates, self.overhead_s = candidates, overhead_s
        quality = candidates.quality
        best_first = sorted(cascades.cascades, key=lambda c: -quality[c.last])
        self._by_quality = [
            (value, tuple(same)) for value, same in groupby(best_first, lambda c: quality[c.last])
        ]

    def choose(
        self, decision: Decision, waiting: Sequence[Request], latency: LatencyView, now: float
    ) -> Decision:
        """Return the decision with a cascade, or as it is; `waiting` is the rest of the queue."""
        candidates = self.candidates
        if decision.requests[0].min_confidence == 0 or candidates.fixed is not None:
            return decision
        requests = tuple(r for r in decision.requests if r.min_confidence > 0)
        if candidates.pinned is not None or any(r.variant is not None for r in requests):
            return decision
        needs = count_needs(requests)
        num_images = sum(needs.values())
        start = now + latency.dispatch_overhead_s
        planned_end = start + latency.seconds(decision.variant, num_images)
        latest_end = self._latest_end(requests, waiting, latency, planned_end)
        floor = max(candidates.floor, *(r.min_quality for r in requests))
        replaced = candidates.quality[decision.variant]
        scarce = bool(waiting) or len(decision.requests) > 1
        most_s, best, best_quality = latency.expected(decision.variant, num_images), None, replaced
        for last_quality, cascades in self._by_quality:
            if last_quality < max(replaced, floor) or (best is not None and not scarce):
                break
            for cascade in cascades:
                expected_s = expected_seconds(cascade, needs, latency)
                if expected_s >= most_s or candidates.quality[cascade.first] < floor:
                    continue
                quality = _expected_quality(cascade, needs) if scarce else replaced
                if scarce and quality <= best_quality:
                    continue
                if _planned_seconds(cascade, needs, latency) > latest_end - start:
                    continue
                best, best_quality = cascade, quality
                most_s = most_s if scarce else expected_s
        return decision if best is None else Decision(requests, best.last, best, latest_end)

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


def count_needs(requests: Iterable[Request]) -> Needs:
    """Return the images of a batch by their minimum confidence."""
    needs: dict[float, int] = {}
    for request in requests:
        confidence = request.min_confidence
        needs[confidence] = needs.get(confidence, 0) + request.num_images
    return needs


def _going_on(cascade: Cascade, needs: Needs) -> float:
    """Return the images of a batch that are expected to go on to the last variant."""
    return sum(cascade.going_on(confidence) * count for confidence, count in needs.items())


def _expected_quality(cascade: Cascade, needs: Needs) -> float:
    """Return the mean expected accuracy of a batch."""
    total = sum(cascade.quality(confidence) * count for confidence, count in needs.items())
    return total / sum(needs.values())


def tail_seconds(cascade: Cascade, num_images: int, whole_s: float) -> float:
    """Return the seconds that the last variant takes after the stitch; `whole_s` from the start."""
    return (1.0 - cascade.shared) * whole_s if num_images else 0.0


def expected_seconds(cascade: Cascade, needs: Needs, latency: LatencyView) -> float:
    """Return the expected seconds of compute of a batch on a cascade."""
    mean = _going_on(cascade, needs)
    count = max(1, round(mean))
    tail_s = tail_seconds(cascade, count, latency.expected(cascade.last, count))
    return latency.expected(cascade.first, sum(needs.values())) + tail_s * mean / count


def _planned_seconds(cascade: Cascade, needs: Needs, latency: LatencyView) -> float:
    """Return the seconds to plan with, if as many images go on as in 99 of 100 batches."""
    num_images, mean = sum(needs.values()), _going_on(cascade, needs)
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
