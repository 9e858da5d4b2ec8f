"""The adaptive policy: the stitch and batch of highest expected effective quality."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from ladderstitch.scheduling.candidates import Menu
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request
from ladderstitch.vision.scheduler.policies.base import Decision, run_late, slack, take
from ladderstitch.vision.scheduler.policies.demand import FAR_S, Demand, Forecast
from ladderstitch.vision.scheduler.policies.quality_hull import Hull, Prices

SPELL = 0.5
"""Longest batch that capacity is reckoned with, in budgets of an impatient request: who just missed
one batch waits for it and then needs one more."""
PATIENCE_S = 1.0
"""A request this late is worth as much as one that is in time, and more from then on."""
DECLINES = 2
"""Slower stitches in a row that were no better, after which none is tried."""
TOGETHER = 0.5
"""Share of those arriving during a batch that an impatient one among them has to run with."""
RISKED = 4
"""Requests of a batch whose chance to be in time is looked up; later ones have later deadlines."""
FEW = 16
"""Requests that are few enough to be looked at one by one."""
TIE = 1e-6
"""Of equals the larger batch is taken."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What all choices of one decision share.

    The first `head` requests of the queue are past saving. `pace` turns the profile's seconds into
    the present's; `scale` turns seconds into the profile's and leaves out what is not compute;
    `fastest_s` are the fastest stitch's seconds in the profile, by rows, `one_s` and `two_s` its
    present ones for one row and for two. `strained` says that not all who wait can be in time.
    """

    start: float
    head: int
    demand: Demand
    hull: Hull
    scale: float
    pace: float
    fastest_s: Sequence[float]
    one_s: float
    two_s: float
    strained: bool


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Weighs what a batch earns against what its time takes from everybody else.

    The value of running some requests on a stitch is their quality plus what all others can earn in
    the time that is left (`Demand`: the queue and the newcomers that the forecast expects, as a
    fluid on the best mix of stitches), less those whom the batch itself makes late: the engine is
    not preemptive.
    """

    menu: Menu
    overhead_s: float
    forecast: Forecast
    prices: Prices

    def __call__(self, queue: Sequence[Request], latency: LatencyView, now: float) -> Decision:
        if len(queue) == 1 and len(only := self.menu.candidates(queue[0])) == 1:
            return Decision((queue[0],), only[0])  # nothing to choose
        start = now + self.overhead_s
        near = list(queue[: 2 * latency.max_rows + 2])
        hopeless = self._hopeless(queue, near, latency, start)
        if hopeless == len(queue):
            return run_late(queue, self.menu, latency, now, self.overhead_s)
        moment = self._moment(queue, near, hopeless, latency, start)
        value, at, stitch, rows = self._best(queue, near, hopeless, latency, moment)
        if moment.strained and not self._all_in_time(queue, hopeless, latency, start):
            # Giving up a few urgent ones may save more of the others.
            full_s = latency.seconds(self.menu.frontier[0], latency.max_rows)
            skip = _due_from(start + full_s, queue, near, hopeless)
            if hopeless < skip < len(queue):
                value, at, stitch, rows = max(
                    (value, at, stitch, rows), self._best(queue, near, skip, latency, moment)
                )
        if hopeless and self._late_value(queue, latency, moment) > value:
            return run_late(queue, self.menu, latency, now, self.overhead_s)
        if at == 0:
            return Decision(take(queue, stitch, rows, self.menu), stitch)
        rest = queue[at : at + 4 * rows]
        return Decision(take(rest, stitch, rows, self.menu), stitch)

    def _all_in_time(
        self, queue: Sequence[Request], hopeless: int, latency: LatencyView, start: float
    ) -> bool:
        """Whether a short queue can be served one by one; the fluid is no judge of so few."""
        if len(queue) - hopeless > FEW:
            return False
        for request in queue[hopeless:]:
            start += latency.seconds(self.menu.candidates(request)[0], request.rows)
            if start > request.budget.target:
                return False
        return True

    def _moment(
        self,
        queue: Sequence[Request],
        near: Sequence[Request],
        hopeless: int,
        latency: LatencyView,
        start: float,
    ) -> Moment:
        demand = Demand.of(queue, near, hopeless, self.forecast, start)
        spell_s = SPELL * demand.impatient_s
        hull = self.prices.hull(latency.profiled_slack(spell_s))
        # The part of its time that the engine computes, if batches are as long as that.
        scale = latency.profiled_slack(spell_s / (spell_s + latency.transit_s))
        fastest = self.menu.frontier[0]
        one_s = latency.seconds(fastest, 1)
        two_s = latency.seconds(fastest, 2) if latency.max_rows > 1 else 2 * one_s
        return Moment(
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
        """How many at the head of the queue no stitch saves."""
        possible = start + latency.seconds(self.menu.frontier[0], 1)
        if near[0].budget.target >= possible:
            return 0
        return _due_from(possible, queue, near, 0)

    def _best(
        self,
        queue: Sequence[Request],
        near: Sequence[Request],
        at: int,
        latency: LatencyView,
        moment: Moment,
    ) -> tuple[float, int, int, int]:
        """Value, index of the head, stitch and rows of the best batch that begins there."""
        end = at + latency.max_rows + 2
        near = near[at:end] if end <= len(near) else list(queue[at:end])
        head = near[0]
        candidates = self.menu.candidates(head)
        slack_s = slack(near, self.menu, latency, moment.start, 0.0)
        left_s = [request.budget.target - moment.start for request in near] + [FAR_S]
        best = (float("-inf"), at, candidates[0], head.rows)
        declines = between = 0
        whole = True  # slower stitches want no larger parts of what fits
        for stitch in candidates:
            if stitch not in self.prices.efficient and stitch != candidates[0]:
                continue
            fits = latency.largest_fit(stitch, slack_s)
            if fits < head.rows:
                break  # candidates rise in latency
            most = max(head.rows, min(fits, len(near)))
            half = max(head.rows, (most + 1) // 2)
            declines += 1
            for rows in (half, most) if whole and half < most else (half,):
                value = self._value(left_s, at, stitch, rows, latency, moment)
                if value >= best[0]:
                    best = (value, at, stitch, rows)
                    between, declines = (half + most + 1) // 2, 0
            whole = whole and best[3] == most
            if declines == (1 if moment.strained else DECLINES):
                break
        if between > head.rows:
            value = self._value(left_s, at, best[2], between, latency, moment)
            if value > best[0]:
                best = (value, at, best[2], between)
        return best

    def _value(
        self,
        left_s: Sequence[float],
        at: int,
        stitch: int,
        rows: int,
        latency: LatencyView,
        moment: Moment,
    ) -> float:
        """Expected quality of the batch and of all others after it.

        `left_s` is the time left to those from index `at` of the queue on, and to one more.
        """
        menu, forecast = self.menu, self.forecast
        profiled_s = latency.profiled[stitch][rows]
        busy_s = profiled_s * moment.pace + latency.transit_s
        arrived = min(latency.max_rows, 1 + int(TOGETHER * forecast.rate * busy_s))
        late = forecast.late(busy_s, moment.fastest_s[arrived] * moment.pace + self.overhead_s)
        if at == moment.head and rows + 1 < len(left_s):  # those behind it: the next two
            after_s, then_s = left_s[rows] - busy_s, left_s[rows + 1] - busy_s
            late += after_s < moment.one_s or then_s < moment.two_s
        in_time: float = rows
        if latency.residuals[-1] * latency.slowdown * profiled_s > left_s[0]:
            in_time -= sum(1.0 - latency.chance(stitch, rows, s) for s in left_s[:rows][:RISKED])
        done = rows + at - moment.head
        others = moment.demand.earnings(moment.hull, busy_s, done, moment.scale)
        earned = (menu.quality[stitch] + TIE) * in_time
        return earned - menu.quality[menu.frontier[0]] * late + others

    def _late_value(self, queue: Sequence[Request], latency: LatencyView, moment: Moment) -> float:
        """As `_value`, of a batch of those that are late anyway."""
        fastest = self.menu.frontier[0]
        rows = min(moment.head, latency.max_rows)
        busy_s = latency.seconds(fastest, rows) + latency.transit_s
        worth = self.menu.quality[fastest]
        waited = max(0.0, moment.start - queue[0].budget.target) / PATIENCE_S
        late = self.forecast.late(busy_s, moment.one_s + self.overhead_s)
        if queue[moment.head].budget.target - moment.start - busy_s < latency.seconds(fastest, 1):
            late += 1
        others = moment.demand.earnings(moment.hull, busy_s, 0, moment.scale)
        return worth * (rows * waited - late) + others


def _due_from(time: float, queue: Sequence[Request], near: Sequence[Request], first: int) -> int:
    """Index, from `first` on, of the first request due by `time` or later; `near` is the queue's
    beginning."""
    if first < len(near):
        index = bisect_left(near, time, lo=first, key=_target)
        if index < len(near):
            return index
    return bisect_left(queue, time, lo=max(first, len(near)), key=_target)


def _target(request: Request) -> float:
    return request.budget.target
