"""The adaptive policy: the variant and batch of highest expected effective quality."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request
from ladderstitch.vision.scheduler.policies.base import Decision, fill_batch, late_batch, slack
from ladderstitch.vision.scheduler.policies.demand import FAR_S, ArrivalForecast, Demand
from ladderstitch.vision.scheduler.policies.quality_hull import QualityHull, QualityHulls

SPELL = 0.5
"""Longest batch that capacity is reckoned with, in budgets of an impatient request: who just missed
one batch waits for it and then needs one more."""
PATIENCE_S = 1.0
"""A request this late is worth as much as one that is in time, and more from then on."""
DECLINES = 2
"""Slower variants in a row that were no better, after which none is tried."""
TOGETHER = 0.5
"""Share of those arriving during a batch that an impatient one among them has to run with."""
RISKED = 4
"""Requests of a batch whose chance to be in time is looked up; later ones have later deadlines."""
FEW = 16
"""Requests that are few enough to be looked at one by one."""
TIE = 1e-6
"""Of equals the larger batch is taken."""


@dataclass(frozen=True, slots=True)
class DecisionContext:
    """What all choices of one decision share.

    The first `head` requests of the queue are past saving. `pace` turns the profile's seconds into
    the present's; `scale` turns seconds into the profile's and leaves out what is not compute;
    `fastest_s` are the fastest variant's seconds in the profile, by batch_size, `one_s` and `two_s` its
    present ones for one row and for two. `strained` says that not all who wait can be in time.
    """

    start: float
    head: int
    demand: Demand
    hull: QualityHull
    scale: float
    pace: float
    fastest_s: Sequence[float]
    one_s: float
    two_s: float
    strained: bool


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Weighs what a batch earns against what its time takes from everybody else.

    The value of running some requests on a variant is their quality plus what all others can earn in
    the time that is left (`Demand`: the queue and the newcomers that the forecast expects, as a
    fluid on the best mix of variants), less those whom the batch itself makes late: the engine is
    not preemptive.
    """

    candidates: CandidateFilter
    overhead_s: float
    forecast: ArrivalForecast
    hulls: QualityHulls

    def __call__(self, queue: Sequence[Request], latency: LatencyView, now: float) -> Decision:
        if len(queue) == 1 and len(only := self.candidates.for_request(queue[0])) == 1:
            return Decision((queue[0],), only[0])  # nothing to choose
        start = now + self.overhead_s
        near = list(queue[: 2 * latency.max_batch_size + 2])
        hopeless = self._hopeless(queue, near, latency, start)
        if hopeless == len(queue):
            return late_batch(queue, self.candidates, latency, now, self.overhead_s)
        moment = self._moment(queue, near, hopeless, latency, start)
        value, at, variant, batch_size = self._best(queue, near, hopeless, latency, moment)
        if moment.strained and not self._all_in_time(queue, hopeless, latency, start):
            # Giving up a few urgent ones may save more of the others.
            full_s = latency.seconds(self.candidates.frontier[0], latency.max_batch_size)
            skip = _due_from(start + full_s, queue, near, hopeless)
            if hopeless < skip < len(queue):
                value, at, variant, batch_size = max(
                    (value, at, variant, batch_size), self._best(queue, near, skip, latency, moment)
                )
        if hopeless and self._late_value(queue, latency, moment) > value:
            return late_batch(queue, self.candidates, latency, now, self.overhead_s)
        if at == 0:
            return Decision(fill_batch(queue, variant, batch_size, self.candidates), variant)
        rest = queue[at : at + 4 * batch_size]
        return Decision(fill_batch(rest, variant, batch_size, self.candidates), variant)

    def _all_in_time(
        self, queue: Sequence[Request], hopeless: int, latency: LatencyView, start: float
    ) -> bool:
        """Whether a short queue can be served one by one; the fluid is no judge of so few."""
        if len(queue) - hopeless > FEW:
            return False
        for request in queue[hopeless:]:
            start += latency.seconds(self.candidates.for_request(request)[0], request.num_images)
            if start > request.deadlines.soft:
                return False
        return True

    def _moment(
        self,
        queue: Sequence[Request],
        near: Sequence[Request],
        hopeless: int,
        latency: LatencyView,
        start: float,
    ) -> DecisionContext:
        demand = Demand.of(queue, near, hopeless, self.forecast, start)
        spell_s = SPELL * demand.impatient_s
        hull = self.hulls.hull(latency.to_profile_seconds(spell_s))
        # The part of its time that the engine computes, if batches are as long as that.
        scale = latency.to_profile_seconds(spell_s / (spell_s + latency.dispatch_overhead_s))
        fastest = self.candidates.frontier[0]
        one_s = latency.seconds(fastest, 1)
        two_s = latency.seconds(fastest, 2) if latency.max_batch_size > 1 else 2 * one_s
        return DecisionContext(
            start=start,
            head=hopeless,
            demand=demand,
            hull=hull,
            scale=scale,
            pace=latency.slowdown * latency.tail,
            fastest_s=latency.profiled[fastest],
            one_s=one_s,
            two_s=two_s,
            strained=demand.each_s < hull.costs_s[0] / scale,
        )

    def _hopeless(
        self, queue: Sequence[Request], near: Sequence[Request], latency: LatencyView, start: float
    ) -> int:
        """How many at the head of the queue no variant saves."""
        possible = start + latency.seconds(self.candidates.frontier[0], 1)
        if near[0].deadlines.soft >= possible:
            return 0
        return _due_from(possible, queue, near, 0)

    def _best(
        self,
        queue: Sequence[Request],
        near: Sequence[Request],
        at: int,
        latency: LatencyView,
        moment: DecisionContext,
    ) -> tuple[float, int, int, int]:
        """Value, index of the head, variant and batch_size of the best batch that begins there."""
        end = at + latency.max_batch_size + 2
        near = near[at:end] if end <= len(near) else list(queue[at:end])
        head = near[0]
        candidates = self.candidates.for_request(head)
        slack_s = slack(near, self.candidates, latency, moment.start, 0.0)
        left_s = [request.deadlines.soft - moment.start for request in near] + [FAR_S]
        best = (float("-inf"), at, candidates[0], head.num_images)
        declines = between = 0
        whole = True  # slower variants want no larger parts of what fits
        for variant in candidates:
            if variant not in self.hulls.efficient and variant != candidates[0]:
                continue
            fits = latency.largest_fit(variant, slack_s)
            if fits < head.num_images:
                break  # candidates rise in latency
            most = max(head.num_images, min(fits, len(near)))
            half = max(head.num_images, (most + 1) // 2)
            declines += 1
            for batch_size in (half, most) if whole and half < most else (half,):
                value = self._value(left_s, at, variant, batch_size, latency, moment)
                if value >= best[0]:
                    best = (value, at, variant, batch_size)
                    between, declines = (half + most + 1) // 2, 0
            whole = whole and best[3] == most
            if declines == (1 if moment.strained else DECLINES):
                break
        if between > head.num_images:
            value = self._value(left_s, at, best[2], between, latency, moment)
            if value > best[0]:
                best = (value, at, best[2], between)
        return best

    def _value(
        self,
        left_s: Sequence[float],
        at: int,
        variant: int,
        batch_size: int,
        latency: LatencyView,
        moment: DecisionContext,
    ) -> float:
        """Expected quality of the batch and of all others after it.

        `left_s` is the time left to those from index `at` of the queue on, and to one more.
        """
        candidates, forecast = self.candidates, self.forecast
        profiled_s = latency.profiled[variant][batch_size]
        busy_s = profiled_s * moment.pace + latency.dispatch_overhead_s
        arrived = min(latency.max_batch_size, 1 + int(TOGETHER * forecast.rate * busy_s))
        late = forecast.late(busy_s, moment.fastest_s[arrived] * moment.pace + self.overhead_s)
        if at == moment.head and batch_size + 1 < len(left_s):  # those behind it: the next two
            after_s, then_s = left_s[batch_size] - busy_s, left_s[batch_size + 1] - busy_s
            late += after_s < moment.one_s or then_s < moment.two_s
        in_time: float = batch_size
        if latency.residuals[-1] * latency.slowdown * profiled_s > left_s[0]:
            in_time -= sum(
                1.0 - latency.chance(variant, batch_size, s) for s in left_s[:batch_size][:RISKED]
            )
        done = batch_size + at - moment.head
        others = moment.demand.earnings(moment.hull, busy_s, done, moment.scale)
        earned = (candidates.quality[variant] + TIE) * in_time
        return earned - candidates.quality[candidates.frontier[0]] * late + others

    def _late_value(
        self, queue: Sequence[Request], latency: LatencyView, moment: DecisionContext
    ) -> float:
        """As `_value`, of a batch of those that are late anyway."""
        fastest = self.candidates.frontier[0]
        batch_size = min(moment.head, latency.max_batch_size)
        busy_s = latency.seconds(fastest, batch_size) + latency.dispatch_overhead_s
        worth = self.candidates.quality[fastest]
        waited = max(0.0, moment.start - queue[0].deadlines.soft) / PATIENCE_S
        late = self.forecast.late(busy_s, moment.one_s + self.overhead_s)
        if queue[moment.head].deadlines.soft - moment.start - busy_s < latency.seconds(fastest, 1):
            late += 1
        others = moment.demand.earnings(moment.hull, busy_s, 0, moment.scale)
        return worth * (batch_size * waited - late) + others


def _due_from(time: float, queue: Sequence[Request], near: Sequence[Request], first: int) -> int:
    """Index, from `first` on, of the first request due by `time` or later; `near` is the queue's
    beginning."""
    if first < len(near):
        index = bisect_left(near, time, lo=first, key=_target)
        if index < len(near):
            return index
    return bisect_left(queue, time, lo=max(first, len(near)), key=_target)


def _target(request: Request) -> float:
    return request.deadlines.soft
