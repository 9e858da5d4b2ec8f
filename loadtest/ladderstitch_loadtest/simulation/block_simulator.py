"""An engine simulated block by block: mixed batches, late binding and preemption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from ladderstitch.errors import RequestError
from ladderstitch.scheduling.requests import Deadlines, Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.vision.scheduler.planner import Planner
from ladderstitch.vision.scheduler.policies.adaptive import (
    ARRIVALS_SHARING_A_BATCH,
    Adaptive,
)
from ladderstitch.vision.scheduler.policies.base import Decision
from ladderstitch.vision.scheduler.policies.decision_context import DecisionContext
from ladderstitch_loadtest.load.outcome import LoadOutcome
from ladderstitch_loadtest.load.traces import Trace
from ladderstitch_loadtest.simulation.block_routes import BlockRoutes
from ladderstitch_loadtest.simulation.profiles import Family

REBIND_MARGIN = 0.1
"""Quality that another variant must gain in addition, because values are estimates."""
MAX_LOOKED_AT = 32
"""Waiting requests that a decision at a block's end looks at."""


@dataclass(frozen=True, slots=True)
class BlockOptions:
    """What the simulated engine can do beyond one variant for a whole batch; all off by default."""

    mixed: bool = False
    """Requests of other variants share the blocks that they have in common with the batch."""
    late_binding: bool = False
    """After each block, the variant may change to one with the same blocks so far."""
    preemption: bool = False
    """After each block, requests that would be late otherwise may go first."""
    boundary_s: float = 0.0
    """Seconds that stopping after a block takes."""


@dataclass(slots=True)
class Job:
    """Requests that run in step: (requests, variant) of each part, and the steps behind them."""

    parts: list[tuple[tuple[Request, ...], int]]
    started: float
    depth: int = 0

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Variant and images of each part."""
        return [(variant, len(requests)) for requests, variant in self.parts]

    @property
    def due(self) -> float:
        """The earliest soft deadline."""
        return min(r.deadlines.soft for requests, _ in self.parts for r in requests)


class BlockSimulation:
    """One engine that runs block by block, with medians of the profile; call `run` once.

    Requests have one image each. The policy must be `adaptive`.
    """

    def __init__(
        self,
        family: Family,
        routes: BlockRoutes,
        settings: SchedulerSettings,
        options: BlockOptions,
    ) -> None:
        self.family, self.routes, self.options = family, routes, options
        self.planner = Planner(family.quality, family.profile, settings)
        self.jobs: list[Job] = []
        """Jobs under way; the last one runs, and the others wait for it."""
        self._index: dict[Request, int] = {}

    def run(self, trace: Trace, image: Request) -> LoadOutcome:
        """Return the outcome of every request, each with the images of `image`; late ones drop."""
        outcome = LoadOutcome.unanswered(trace)
        arrivals, next_one, now = trace.arrivals_s.tolist(), 0, 0.0
        budgets = trace.budgets_s.tolist()
        while True:
            while next_one < len(arrivals) and arrivals[next_one] <= now:
                soft = arrivals[next_one] + budgets[next_one]
                deadlines = Deadlines(soft, soft, "trace", "trace")
                self._add(replace(image, arrival=arrivals[next_one], deadlines=deadlines), next_one)
                next_one += 1
            for request in self.planner.remove_expired(now):
                del self._index[request]
            if self.jobs or self.planner.queue:
                now = self._advance(now, outcome)
            elif next_one < len(arrivals):
                now = arrivals[next_one]
            else:
                return outcome

    def _add(self, request: Request, number: int) -> None:
        alone = not self.jobs and not self.planner.queue
        try:
            self.planner.admit(request, request.arrival, alone=alone)
        except RequestError:
            return
        self._index[request] = number
        self.planner.add(request)

    def _advance(self, now: float, outcome: LoadOutcome) -> float:
        """Decide what to do at the end of a block, run the next one, and return its end."""
        if not self.jobs:
            self._start(now)
        elif self.options.preemption and len(self.jobs) == 1 and self.planner.queue:
            self._preempt(now)
        if self.options.late_binding and self.jobs[-1].depth and len(self.jobs[-1].parts) == 1:
            self._rebind(self.jobs[-1], now)
        job, view = self.jobs[-1], self.planner.latency.view
        end = now + self.routes.step_s(job.sizes, job.depth, view.profiled)
        # A request that is admitted during a block waits for it, or for all that is under way.
        self.planner.busy_until = end if self.options.preemption else now + self._left_s()
        now = end + self.options.boundary_s
        job.depth += 1
        for part in [p for p in job.parts if job.depth == len(self.routes.steps[p[1]])]:
            job.parts.remove(part)
            self._answer(part, job.started, now, outcome)
        if not job.parts:
            self.jobs.pop()
        if not self.jobs:
            self.planner.on_engine_idle()
        return now

    def _answer(
        self, part: tuple[tuple[Request, ...], int], started: float, now: float, out: LoadOutcome
    ) -> None:
        requests, variant = part
        size, quality = len(requests), self.family.quality[variant]
        for request in requests:
            out.answer(
                self._index.pop(request), now, started, now - started, variant, quality, size
            )
        seconds = self.planner.latency.view.profiled[variant][size]
        self.planner.on_batch_finished(variant, size, seconds, seconds)

    def _left_s(self) -> float:
        """Return the seconds of all jobs under way."""
        profiled = self.planner.latency.view.profiled
        return sum(self.routes.rest_s(job.sizes, job.depth, profiled) for job in self.jobs)

    def _start(self, now: float) -> None:
        """Start the batch that the policy decides, with others if that is worth more."""
        choice = self.planner.decide(now)
        assert isinstance(choice, Decision)
        job = Job([(choice.requests, choice.variant)], now)
        if self.options.mixed:
            self._add_others(job, now)
        self.jobs.append(job)

    def _preempt(self, now: float) -> None:
        """Let requests go first that would be late after the running job, if that keeps it."""
        planner, view = self.planner, self.planner.latency.view
        fastest, left_s = planner.candidates.frontier[0], self._left_s()
        one_s = view.seconds(fastest, 1)
        urgent = [
            request
            for request in planner.queue.view[:MAX_LOOKED_AT]
            if now + one_s <= request.deadlines.soft < now + left_s * view.tail + one_s
        ]
        spare_s = min(job.due for job in self.jobs) - now - left_s * view.tail
        if not urgent or spare_s < one_s:
            return
        due = min(urgent[0].deadlines.soft, now + spare_s)
        context, most = self._context((), now), min(len(urgent), view.max_batch_size)
        best, job = self._value(context, now, left_s, 0.0, 0, inf), None
        for size in {most, (most + 1) // 2, 1}:
            for variant in planner.candidates.frontier:
                if now + view.seconds(variant, size) > due:
                    break
                busy_s, earned = (
                    left_s + view.expected(variant, size),
                    self.family.quality[variant] * size,
                )
                value = self._value(context, now, busy_s, earned, size, inf, urgent[:size])
                if value > best:
                    best, job = value, Job([(tuple(urgent[:size]), variant)], now)
        if job is not None:
            for request in job.parts[0][0]:
                planner.queue.remove(request)
            self.jobs.append(job)

    def _rebind(self, job: Job, now: float) -> None:
        """Change the variant of a job to the one of highest value with the same steps so far."""
        requests, current = job.parts[0]
        context = self._context(requests, now)
        view, best, variant = self.planner.latency.view, -inf, current
        for other in self.planner.candidates.frontier:
            if self.routes.agree(other, current, job.depth):
                left_s = self.routes.rest_s([(other, len(requests))], job.depth, view.profiled)
                earned = self.family.quality[other] * len(requests)
                value = self._value(context, now, left_s, earned, len(requests), job.due)
                value += REBIND_MARGIN * (other == current)
                if value > best:
                    best, variant = value, other
        job.parts[0] = (requests, variant)

    def _add_others(self, job: Job, now: float) -> None:
        """Add waiting requests on another variant with the same front, if that is worth more."""
        view, queue = self.planner.latency.view, self.planner.queue
        requests, variant = job.parts[0]
        waiting = list(queue.view[:MAX_LOOKED_AT])
        most = min(len(waiting), view.max_batch_size - len(requests))
        if not most:
            return
        context, profiled = self._context(requests, now), view.profiled
        alone_s = self.routes.rest_s(job.sizes, 0, profiled)
        earned = self.family.quality[variant] * len(requests)
        best = self._value(context, now, alone_s, earned, len(requests), job.due)
        chosen: tuple[tuple[Request, ...], int] | None = None
        for other in self.planner.candidates.frontier:
            if other == variant or not self.routes.agree(other, variant, 1):
                continue
            for count in {most, (most + 1) // 2, 1}:
                parts = [*job.sizes, (other, count)]
                busy_s = self.routes.rest_s(parts, 0, profiled)
                due = min(job.due, waiting[0].deadlines.soft)
                total = earned + self.family.quality[other] * count
                value = self._value(context, now, busy_s, total, len(requests) + count, due)
                if value > best:
                    best, chosen = value, (tuple(waiting[:count]), other)
        if chosen is not None:
            for request in chosen[0]:
                queue.remove(request)
            job.parts.append(chosen)

    def _context(self, requests: Sequence[Request], now: float) -> DecisionContext:
        """Return the policy's view of these requests and of those that wait."""
        policy, view = self.planner.policy, self.planner.latency.view
        assert isinstance(policy, Adaptive)
        both = sorted([*requests, *self.planner.queue.view], key=lambda r: r.deadlines.soft)
        return policy.make_context(both, 0, view, now)

    def _value(
        self,
        context: DecisionContext,
        now: float,
        busy_s: float,
        earned: float,
        done: int,
        due: float,
        taken: Sequence[Request] = (),
    ) -> float:
        """Return the quality earned and that of all others after `busy_s`, as the policy does.

        Of the waiting requests, those `taken` are part of what is done.
        """
        view = self.planner.latency.view
        busy_s *= view.tail
        if now + busy_s > due:
            return -inf
        sharing = 1 + int(ARRIVALS_SHARING_A_BATCH * context.forecast.rate * busy_s)
        next_s = context.fastest_s[min(sharing, view.max_batch_size)] * context.planned_scale
        late = context.forecast.expected_late(busy_s, next_s)
        for place, request in enumerate(self.planner.queue.view[:MAX_LOOKED_AT]):
            next_s = context.fastest_s[min(1 + place, view.max_batch_size)] * view.tail
            if now + context.one_s <= request.deadlines.soft < now + busy_s + next_s:
                late += request not in taken
        lowest = self.family.quality[self.planner.candidates.frontier[0]]
        others = context.remaining.after(busy_s, done)
        return earned - lowest * late + others
