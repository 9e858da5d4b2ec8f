"""The adaptive policy, which maximises the expected quality of all requests.

The value of a batch is its quality, times the probability that it is on time, plus the fluid-limit
quality of all remaining requests.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request
from ladderstitch.vision.scheduler.policies.base import Decision, fill_batch, late_batch, slack
from ladderstitch.vision.scheduler.policies.decision_context import DecisionContext
from ladderstitch.vision.scheduler.policies.demand import (
    Capacity,
    Demand,
    QualityHulls,
    RemainingQuality,
)
from ladderstitch.vision.scheduler.policies.forecast import BUDGET_CAP_S, ArrivalForecast

MAX_BATCH_SHARE_OF_BUDGET = 0.5
"""Longest batch the capacity model assumes, as a fraction of the tight-budget quantile.

A request that just missed a batch waits for one and needs one.
"""
LATE_VALUE_HORIZON_S = 1.0
"""Lateness at which a request is worth as much as one on time; it is worth more from then on."""
MAX_CONSECUTIVE_DECLINES = 2
"""Number of slower variants without a better value after which the search stops."""
ARRIVALS_SHARING_A_BATCH = 0.5
"""Share of the arrivals during a batch that a tight one among them has to run with."""
MAX_RISK_LOOKUPS = 4
"""Requests of a batch whose on-time probability is looked up; the others have later deadlines."""
EXACT_CHECK_LIMIT = 16
"""Largest number of requests that are checked one by one."""
TIE_EPSILON = 1e-6
"""Quality added for each image, so that the larger of two equal batches is chosen."""

BatchChoice = tuple[float, int, int, int]
"""Value, queue index of the first request, variant and batch size of a batch."""


@dataclass(frozen=True, slots=True)
class Adaptive:
    """The policy that weighs the quality of a batch against the time that it takes from the others.

    The value of running some requests on a variant is their quality, plus the quality that all
    other requests can earn in the remaining time, minus that of the requests that the batch itself
    makes late, because the engine is not preemptive. The other requests are those of the queue and
    of the arrival forecast (`Demand`), a fluid on the best mix of variants. The policy sacrifices a
    request only if the queue as a whole cannot meet its deadlines.
    """

    candidates: CandidateFilter
    overhead_s: float
    forecast: ArrivalForecast
    hulls: QualityHulls

    def __call__(self, queue: Sequence[Request], latency: LatencyView, now: float) -> Decision:
        """Return the next batch."""
        if len(queue) == 1 and len(only := self.candidates.for_request(queue[0])) == 1:
            return Decision((queue[0],), only[0])  # nothing to choose
        start = now + self.overhead_s
        num_late = self._count_late(queue, latency, start)
        if num_late == len(queue):
            return late_batch(queue, self.candidates, latency, now, self.overhead_s)
        context = self.make_context(queue, num_late, latency, start)
        best = self._find_best(queue, num_late, latency, context)
        if context.overloaded and not self._fits_one_by_one(queue, num_late, latency, start):
            # Sacrificing a few urgent requests may save a larger number of the others.
            full_s = latency.seconds(self.candidates.frontier[0], latency.max_batch_size)
            skip = _first_due_from(start + full_s, queue, num_late, latency)
            if num_late < skip < len(queue):
                best = max(best, self._find_best(queue, skip, latency, context))
        value, first, variant, batch_size = best
        if num_late and self._late_value(queue, latency, context) > value:
            return late_batch(queue, self.candidates, latency, now, self.overhead_s)
        if first == 0:
            return Decision(fill_batch(queue, variant, batch_size, self.candidates), variant)
        rest = queue[first : first + 4 * batch_size]
        return Decision(fill_batch(rest, variant, batch_size, self.candidates), variant)

    def _fits_one_by_one(
        self, queue: Sequence[Request], num_late: int, latency: LatencyView, start: float
    ) -> bool:
        """Return whether all requests of a short queue are on time when served one by one.

        The fluid limit is not accurate for a queue of at most `EXACT_CHECK_LIMIT` requests.
        """
        if len(queue) - num_late > EXACT_CHECK_LIMIT:
            return False
        for request in queue[num_late:]:
            start += latency.seconds(self.candidates.for_request(request)[0], request.num_images)
            if start > request.deadlines.soft:
                return False
        return True

    def make_context(
        self, queue: Sequence[Request], num_late: int, latency: LatencyView, start: float
    ) -> DecisionContext:
        """Return what all choices of a decision share."""
        forecast = self.forecast.at(start)
        demand = Demand.from_queue(queue, num_late, forecast, start)
        longest_s = MAX_BATCH_SHARE_OF_BUDGET * demand.tight_budget_s
        hull = self.hulls.for_longest(latency.to_profile_seconds(longest_s))
        most, overhead_s = latency.max_batch_size, latency.dispatch_overhead_s
        capacity = Capacity(
            latency.to_profile_seconds(1.0), longest_s / (longest_s + overhead_s), overhead_s / most
        )
        fastest, images = self.candidates.frontier[0], self.forecast.images_per_request
        one_s = latency.seconds(fastest, min(most, round(images)))
        two = round(2 * images)
        two_s = latency.seconds(fastest, two) if two <= most else 2 * one_s
        return DecisionContext(
            start=start,
            num_late=num_late,
            forecast=forecast,
            shortest_s=forecast.budgets_s[0] if forecast.budgets_s else inf,
            remaining=RemainingQuality(demand, hull, capacity),
            images=images,
            planned_scale=latency.slowdown * latency.tail,
            certain_scale=latency.residuals[-1] * latency.slowdown,
            sharing_rate=ARRIVALS_SHARING_A_BATCH * forecast.rate,
            fastest_s=latency.profiled[fastest],
            one_s=one_s,
            two_s=two_s,
            overloaded=demand.min_s_per_image < capacity.engine_s(hull.costs_s[0]),
        )

    def _count_late(self, queue: Sequence[Request], latency: LatencyView, start: float) -> int:
        """Return how many requests at the head of the queue are late on every variant."""
        possible = start + latency.seconds(self.candidates.frontier[0], 1)
        if queue[0].deadlines.soft >= possible:
            return 0
        return _first_due_from(possible, queue, 0, latency)

    def _find_best(
        self,
        queue: Sequence[Request],
        first: int,
        latency: LatencyView,
        context: DecisionContext,
    ) -> BatchChoice:
        """Return the batch of highest value that begins with the request at index `first`."""
        near = queue[first : first + latency.max_batch_size + 2]
        head = near[0]
        least, candidates = head.num_images, self.candidates.for_request(head)
        start = context.start
        left_s = [request.deadlines.soft - start for request in near]
        slack_s = left_s[0]
        if min(left_s) < slack_s:  # priorities have put requests with earlier deadlines behind
            slack_s = slack(near, self.candidates, latency, start, 0.0)
        left_s.append(BUDGET_CAP_S)
        best = (float("-inf"), first, candidates[0], least)
        declines = between = 0
        near_images = round(len(near) * context.images)
        profile_slack_s = latency.to_profile_seconds(slack_s)
        whole = True  # a slower variant is not better with a larger part of what fits
        for variant in candidates:
            if variant not in self.hulls.efficient and variant != candidates[0]:
                continue
            # What fits, as `largest_fit` says; the next lines run for each variant.
            fits = bisect_right(latency.profiled[variant], profile_slack_s, lo=1) - 1
            if fits < least:
                break  # the latency of candidates rises
            most = fits if fits < near_images else near_images
            if most < least:
                most = least
            half = (most + 1) // 2
            if half < least:
                half = least
            declines += 1
            for batch_size in (half, most) if whole and half < most else (half,):
                value = self._value(left_s, first, variant, batch_size, latency, context)
                if value >= best[0]:
                    best = (value, first, variant, batch_size)
                    between, declines = (half + most + 1) // 2, 0
            whole = whole and best[3] == most
            if declines == (1 if context.overloaded else MAX_CONSECUTIVE_DECLINES):
                break
        if between > least:
            value = self._value(left_s, first, best[2], between, latency, context)
            if value > best[0]:
                best = (value, first, best[2], between)
        return best

    def _value(
        self,
        left_s: Sequence[float],
        first: int,
        variant: int,
        batch_size: int,
        latency: LatencyView,
        context: DecisionContext,
    ) -> float:
        """Return the expected quality of a batch and of all other requests after it.

        `left_s` holds the seconds left to the requests from index `first` of the queue on, and one
        more value for the end of the queue.
        """
        quality, images = self.candidates.quality, context.images
        requests = round(batch_size / images) or 1
        profiled_s = latency.profiled[variant][batch_size]
        busy_s = profiled_s * context.planned_scale + latency.dispatch_overhead_s
        arrived = 1 + int(context.sharing_rate * busy_s)
        if arrived > latency.max_batch_size:
            arrived = latency.max_batch_size
        next_s = context.fastest_s[arrived] * context.planned_scale + self.overhead_s
        is_short = busy_s + next_s <= context.shortest_s
        late = 0.0 if is_short else context.forecast.expected_late(busy_s, next_s)
        if first == context.num_late and requests + 1 < len(left_s):
            # The next two requests in the queue may become late, too: each alone, or together.
            after_s, then_s = left_s[requests] - busy_s, left_s[requests + 1] - busy_s
            one_s, two_s = context.one_s, context.two_s
            late += images * (
                after_s < one_s or then_s < two_s or (after_s < two_s and then_s < 2 * one_s)
            )
        on_time: float = batch_size
        if context.certain_scale * profiled_s > left_s[0]:
            slacks_s = left_s[: requests if requests < MAX_RISK_LOOKUPS else MAX_RISK_LOOKUPS]
            on_time -= images * latency.expected_misses(variant, batch_size, slacks_s)
        done = batch_size + images * (first - context.num_late)
        others = context.remaining.after(busy_s, done)
        earned = (quality[variant] + TIE_EPSILON) * on_time
        return earned - quality[self.candidates.frontier[0]] * late + others

    def _late_value(
        self, queue: Sequence[Request], latency: LatencyView, context: DecisionContext
    ) -> float:
        """Return the value of a batch of the requests that are late on every variant."""
        fastest = self.candidates.frontier[0]
        batch_size = min(round(context.images * context.num_late), latency.max_batch_size)
        busy_s = latency.seconds(fastest, batch_size) + latency.dispatch_overhead_s
        quality = self.candidates.quality[fastest]
        lateness = max(0.0, context.start - queue[0].deadlines.soft) / LATE_VALUE_HORIZON_S
        late = context.forecast.expected_late(busy_s, context.one_s + self.overhead_s)
        next_soft = queue[context.num_late].deadlines.soft
        if next_soft - context.start - busy_s < latency.seconds(fastest, 1):
            late += context.images
        others = context.remaining.after(busy_s, 0.0)
        return quality * (batch_size * lateness - late) + others


def _first_due_from(time: float, queue: Sequence[Request], first: int, latency: LatencyView) -> int:
    """Return the index, from `first` on, of the first request due at `time` or later.

    It is looked for among the requests of the next two batches first, where it mostly is.
    """
    near = min(len(queue), 2 * latency.max_batch_size + 2)
    if first < near:
        index = bisect_left(queue, time, first, near, key=_soft_deadline)
        if index < near:
            return index
    return bisect_left(queue, time, max(first, near), key=_soft_deadline)


def _soft_deadline(request: Request) -> float:
    return request.deadlines.soft
