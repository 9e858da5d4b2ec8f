"""The choice of a cascade for a batch whose variant the policy has chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.cascades import Cascade, CascadeSet, fill_share
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request
from ladderstitch.vision.scheduler.cascade_table import CascadeTable, Needs
from ladderstitch.vision.scheduler.policies.base import SLACK_SCAN_LIMIT, Decision


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
        self._table = CascadeTable(cascades.cascades, candidates.quality)

    def prepare(self, request: Request) -> None:
        """Compute what decisions need to know about the confidence of a new request."""
        if request.min_confidence > 0:
            self._table.prepare(request.min_confidence)

    def choose(
        self, decision: Decision, waiting: Sequence[Request], latency: LatencyView, now: float
    ) -> Decision:
        """Return the decision with a cascade, or as it is; `waiting` is the rest of the queue."""
        candidates = self.candidates
        if decision.requests[0].min_confidence == 0 or candidates.fixed is not None:
            return decision
        requests = tuple([r for r in decision.requests if r.min_confidence > 0])
        if candidates.pinned is not None or [r for r in requests if r.variant is not None]:
            return decision
        needs, quality = count_needs(requests), candidates.quality
        floor = max(candidates.floor, *[r.min_quality for r in requests])
        costs = _BatchCosts(self._table, needs, latency, decision.variant)
        is_open = [
            seconds < costs.most_s and quality[first] >= floor
            for seconds, first in zip(costs.firsts_s, self._table.firsts, strict=True)
        ]
        replaced = quality[decision.variant]
        count = self._table.count_from(max(replaced, floor))
        if not count or True not in is_open:
            return decision
        start = now + latency.dispatch_overhead_s
        planned_end = start + latency.seconds(decision.variant, costs.num_images)
        latest_end = self._latest_end(requests, waiting, latency, planned_end)
        if waiting or len(decision.requests) > 1:
            best = self._find_best(costs, is_open, count, replaced, latest_end - start)
        else:
            best = self._find_cheapest(costs, is_open, count, latest_end - start)
        return decision if best is None else Decision(requests, best.last, best, latest_end)

    def _find_best(
        self,
        costs: _BatchCosts,
        is_open: Sequence[bool],
        count: int,
        replaced: float,
        left_s: float,
    ) -> Cascade | None:
        """Return the cascade of highest expected quality, if it exceeds the replaced variant's."""
        best, best_quality, cascades = None, replaced, self._table.cascades
        totals, num_images = costs.totals, costs.num_images
        for index, number in enumerate(self._table.start_of[:count]):
            if not is_open[number]:
                continue
            quality, cascade = totals[index] / num_images, cascades[index]
            if (
                quality > best_quality
                and costs.expected_s(cascade, number) < costs.most_s
                and costs.planned_s(cascade, number) <= left_s
            ):
                best, best_quality = cascade, quality
        return best

    def _find_cheapest(
        self, costs: _BatchCosts, is_open: Sequence[bool], count: int, left_s: float
    ) -> Cascade | None:
        """Return the cascade of least expected seconds among those with the best last variant."""
        best, best_s, table = None, costs.most_s, self._table
        quality = self.candidates.quality
        for cascade, number in zip(table.cascades[:count], table.start_of, strict=False):
            if best is not None and quality[cascade.last] < quality[best.last]:
                break
            if not is_open[number]:
                continue
            expected_s = costs.expected_s(cascade, number)
            if expected_s < best_s and costs.planned_s(cascade, number) <= left_s:
                best, best_s = cascade, expected_s
        return best

    def _latest_end(
        self,
        requests: Sequence[Request],
        waiting: Sequence[Request],
        latency: LatencyView,
        planned_end: float,
    ) -> float:
        """Return the instant by which a batch has to end; `planned_end` is without a cascade."""
        fastest_s, overhead_s = latency.seconds(self.candidates.frontier[0], 1), self.overhead_s
        latest = min([request.deadlines.soft for request in requests]) - overhead_s
        earliest = latest + overhead_s + fastest_s + 1e-9  # later ones do not matter; not exact
        for soft in [request.deadlines.soft for request in waiting[:SLACK_SCAN_LIMIT]]:
            if soft < earliest and planned_end <= (end := soft - overhead_s - fastest_s):
                earliest, latest = soft, min(latest, end)
        return latest


class _BatchCosts:
    """The seconds that a batch takes on cascades; a cascade is given with its start's number."""

    def __init__(
        self, table: CascadeTable, needs: Needs, latency: LatencyView, variant: int
    ) -> None:
        self._latency = latency
        self._counts: dict[int, int] = {}
        self._going_on, self.totals = table.expect(needs)
        self.num_images = sum(needs.values())
        self.most_s = latency.expected(variant, self.num_images)
        """Expected seconds of the variant that a cascade would replace."""
        self.firsts_s = [
            latency.profiled[first][self.num_images] * latency.slowdown for first in table.firsts
        ]
        """Expected seconds of the first variant of each start."""

    def expected_s(self, cascade: Cascade, number: int) -> float:
        """Return the expected seconds of compute."""
        return self.firsts_s[number] + _expected_tail_s(
            cascade, self._going_on[number], self._latency
        )

    def planned_s(self, cascade: Cascade, number: int) -> float:
        """Return the seconds to plan with, if as many images go on as in 99 of 100 batches."""
        latency, count = self._latency, self._counts.get(number)
        if count is None:
            mean, most = self._going_on[number], self.num_images
            count = self._counts[number] = min(most, math.ceil(fill_share(mean, mean / most)))
        tail_s = tail_seconds(cascade, count, latency.seconds(cascade.last, count or 1))
        return self.firsts_s[number] * latency.tail + tail_s


def count_needs(requests: Iterable[Request]) -> Needs:
    """Return the images of a batch by their minimum confidence."""
    needs: dict[float, int] = {}
    for request in requests:
        confidence = request.min_confidence
        needs[confidence] = needs.get(confidence, 0) + request.num_images
    return needs


def tail_seconds(cascade: Cascade, num_images: int, whole_s: float) -> float:
    """Return the seconds that the last variant takes after the stitch; `whole_s` from the start."""
    return (1.0 - cascade.shared) * whole_s if num_images else 0.0


def expected_seconds(cascade: Cascade, needs: Needs, latency: LatencyView) -> float:
    """Return the expected seconds of compute of a batch on a cascade."""
    mean = sum(cascade.going_on(confidence) * count for confidence, count in needs.items())
    first_s = latency.expected(cascade.first, sum(needs.values()))
    return first_s + _expected_tail_s(cascade, mean, latency)


def _expected_tail_s(cascade: Cascade, mean: float, latency: LatencyView) -> float:
    """Return the expected seconds after the first variant, if `mean` images go on on average."""
    count = round(mean) or 1
    return tail_seconds(cascade, count, latency.expected(cascade.last, count)) * mean / count


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
