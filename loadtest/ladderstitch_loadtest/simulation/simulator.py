"""The simulator: the server's planner and policies on a virtual clock, a profile and a trace.

It is deterministic: the same family, trace, settings and seed give the same outcome.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from math import exp, inf
from random import Random

import numpy as np

from ladderstitch.errors import RequestError
from ladderstitch.gateway.routing import ReplicaLoad, RequestTicket, pick_replica
from ladderstitch.scheduling.cascades import Cascade
from ladderstitch.scheduling.requests import Deadlines, Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.vision.scheduler.cascade_choice import select_in_time
from ladderstitch.vision.scheduler.planner import Planner
from ladderstitch.vision.scheduler.policies.base import Decision
from ladderstitch_loadtest.load.outcome import LoadOutcome
from ladderstitch_loadtest.load.traces import Trace
from ladderstitch_loadtest.simulation.profiles import Family

ONE_IMAGE = np.zeros((1, 0, 0, 0), np.float32)
P99_SIGMAS = 2.326
"""Standard deviations between the median and the 99th percentile of a normal distribution."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that simulated replicas run on, and the requests that it gets."""

    replicas: int = 1
    spread: float = 1.0
    """Factor on the profile's own p99 over median; 0: every batch takes its median."""
    dispatch_overhead_s: float = 0.0
    """Seconds of a batch in addition to compute."""
    push_s: float = 0.0
    """Seconds between two load reports to the router; 0: the router always knows the load."""
    slow: tuple[tuple[float, float, float], ...] = ()
    """Periods (from, to, factor) in which a noisy neighbour slows everything by the factor."""
    images: int = 1
    """Images of a request."""
    min_confidence: float = 0.0
    """Minimum confidence of every request; 0: none."""

    def factor(self, now: float) -> float:
        """Return the factor by which batches are slower at `now`."""
        return max((f for start, end, f in self.slow if start <= now < end), default=1.0)


@dataclass(frozen=True, slots=True)
class CascadeDraw:
    """The drawn course of a batch on a cascade: its seconds, and the requests that go on."""

    cascade: Cascade
    first_s: float
    last_s: float
    unsure: Mapping[Request, int]
    """Images of each request of which the first variant is not sure."""
    going: frozenset[Request]

    def answer(self, request: Request, started: float, ended: float) -> tuple[float, int, float]:
        """Return the instant of the answer, its last variant and its expected quality."""
        cascade, share = self.cascade, self.unsure[request] / request.num_images
        go_on = request in self.going
        sure, unsure = cascade.part_qualities(request.min_confidence, complete=go_on)
        quality = (1 - share) * sure + share * unsure
        overhead_s = ended - started - self.first_s - self.last_s
        at = ended if go_on else started + self.first_s + overhead_s
        return at, cascade.last if go_on else cascade.first, quality


class SimulatedReplica:
    """A planner, and the batch that its engine runs."""

    def __init__(self, family: Family, settings: SchedulerSettings) -> None:
        self.planner = Planner(family.quality, family.profile, settings, cascades=family.cascades)
        self.running: tuple[Request, ...] = ()
        self.variant = -1
        self.started = 0.0
        self.compute_s = 0.0
        self.stages: CascadeDraw | None = None
        self.load = ReplicaLoad(reported_at=-inf)
        self.tickets: dict[Request, RequestTicket] = {}
        self.num_decisions = 0
        """Count of decisions, by which a wake-up for an earlier decision is recognised."""


class Simulation:
    """One simulation of a trace; call `run` once."""

    def __init__(
        self, family: Family, settings: SchedulerSettings, machine: Machine, seed: int = 0
    ) -> None:
        self.family = family
        self.machine = machine
        self.replicas = [SimulatedReplica(family, settings) for _ in range(machine.replicas)]
        self._random = Random(seed)
        self._sigma = _log_normal_sigmas(family, machine.spread)
        self._events: list[tuple[float, int, int, int]] = []
        self._num_events = 0
        self._num_routed = 0

    def run(self, trace: Trace, *, hard: bool = True) -> LoadOutcome:
        """Return the outcome of every request; with `hard`, late requests are dropped."""
        outcome = LoadOutcome.unanswered(trace)
        index: dict[Request, int] = {}
        images = np.zeros((self.machine.images, 0, 0, 0), np.float32)
        for i, (at, budget) in enumerate(
            zip(trace.arrivals_s.tolist(), trace.budgets_s.tolist(), strict=True)
        ):
            self._advance(at, outcome, index)
            soft = at + budget
            deadlines = Deadlines(soft, soft if hard else inf, "trace", "trace")
            confidence = self.machine.min_confidence
            request = Request("", images, at, deadlines, min_confidence=confidence)
            if self._submit(request, at):
                index[request] = i
        self._advance(inf, outcome, index)
        return outcome

    def _submit(self, request: Request, now: float) -> bool:
        """Send a request to a replica, and return whether the replica admits it."""
        number = self._route(request, now)
        replica = self.replicas[number]
        idle = not replica.running
        try:
            replica.planner.admit(request, now, alone=idle and not replica.planner.queue)
        except RequestError:
            return False
        replica.tickets[request] = replica.load.on_sent(request.deadlines.soft)
        replica.planner.add(request)
        if idle:
            self._dispatch(number, now)
        return True

    def _route(self, request: Request, now: float) -> int:
        """Return the replica with the most slack for a request, by the gateway's own rule.

        The rule knows only what the replicas have reported.
        """
        if len(self.replicas) == 1:
            return 0
        for replica in self.replicas:
            if now - replica.load.reported_at >= self.machine.push_s:
                replica.load.on_report(replica.planner.load_report(now), now)
        self._num_routed += 1
        loads = [replica.load for replica in self.replicas]
        return pick_replica(loads, request.deadlines.soft - now, now, self._num_routed)

    def _advance(self, until: float, outcome: LoadOutcome, index: dict[Request, int]) -> None:
        """Process all events up to `until`."""
        events = self._events
        while events and events[0][0] <= until:
            now, _, number, decision = heappop(events)
            replica = self.replicas[number]
            if decision != replica.num_decisions:
                continue
            if replica.running:
                self._finish(replica, now, outcome, index)
            self._dispatch(number, now)

    def _finish(
        self, replica: SimulatedReplica, now: float, outcome: LoadOutcome, index: dict[Request, int]
    ) -> None:
        batch, batch_size = replica.running, _num_images(replica.running)
        variant, started, compute_s = replica.variant, replica.started, replica.compute_s
        stages = replica.stages
        for request in batch:
            replica.load.on_ended(replica.tickets.pop(request))
            i = index.pop(request)
            if stages is None:
                quality = self.family.quality[variant]
                outcome.answer(i, now, started, compute_s, variant, quality, batch_size)
                continue
            at, answered, quality = stages.answer(request, started, now)
            outcome.answer(i, at, started, at - started, answered, quality, batch_size)
        last_s = 0.0 if stages is None else stages.last_s
        first = variant if stages is None else stages.cascade.first
        replica.planner.on_batch_finished(
            first, batch_size, compute_s - last_s, now - started - last_s
        )
        replica.planner.on_engine_idle()
        replica.running = ()

    def _dispatch(self, number: int, now: float) -> None:
        replica = self.replicas[number]
        planner = replica.planner
        for request in planner.remove_expired(now):
            replica.load.on_ended(replica.tickets.pop(request))
        replica.num_decisions += 1
        if not planner.queue:
            return
        choice = planner.decide(now)
        if not isinstance(choice, Decision):
            self._schedule(now + choice.seconds, number, replica.num_decisions)
            return
        variant, batch_size = choice.variant, _num_images(choice.requests)
        replica.running, replica.variant, replica.started = choice.requests, variant, now
        expected_s = None if choice.cascade is None else planner.expected_s(choice)
        planner.on_batch_started(batch_size, variant, now, expected_s)
        replica.stages = None
        if choice.cascade is None:
            replica.compute_s = self._draw_compute_s(planner, variant, batch_size, now)
        else:
            replica.stages = self._draw_stages(planner, choice, now)
            replica.compute_s = replica.stages.first_s + replica.stages.last_s
        end = now + replica.compute_s + self.machine.dispatch_overhead_s
        self._schedule(end, number, replica.num_decisions)

    def _draw_compute_s(self, planner: Planner, variant: int, batch_size: int, now: float) -> float:
        seconds = planner.latency.view.profiled[variant][batch_size] * self.machine.factor(now)
        sigma = self._sigma[variant]
        return seconds * exp(sigma * self._random.gauss(0.0, 1.0)) if sigma else seconds

    def _draw_stages(self, planner: Planner, choice: Decision, now: float) -> CascadeDraw:
        """Return which images of a batch go on, at the share that was calibrated.

        The planner's rule says which requests stop because no time is left.
        """
        cascade, view = choice.cascade, planner.latency.view
        assert cascade is not None
        first_s = self._draw_compute_s(planner, cascade.first, choice.num_images, now)
        unsure = {
            request: sum(
                self._random.random() < cascade.going_on(request.min_confidence)
                for _ in range(request.num_images)
            )
            for request in choice.requests
        }
        waiting = [(request, count) for request, count in unsure.items() if count]
        going = select_in_time(cascade, waiting, view, now + first_s, choice.latest_end)
        count, last_s = sum(unsure[request] for request in going), 0.0
        if count:
            last_s = self._draw_compute_s(planner, cascade.last, count, now)
            last_s *= 1.0 - cascade.shared
        return CascadeDraw(cascade, first_s, last_s, unsure, frozenset(going))

    def _schedule(self, time: float, number: int, decision: int) -> None:
        self._num_events += 1
        heappush(self._events, (time, self._num_events, number, decision))


def _num_images(requests: Iterable[Request]) -> int:
    return sum(request.num_images for request in requests)


def _log_normal_sigmas(family: Family, spread: float) -> dict[int, float]:
    """Return sigmas of log-normal seconds whose 99th percentile is that of the profile."""
    return {
        variant: spread
        * float(np.median(np.log(np.array(latency.p99_s) / np.array(latency.median_s))))
        / P99_SIGMAS
        for variant, latency in family.profile.variants.items()
    }


def simulate(
    family: Family,
    trace: Trace,
    settings: SchedulerSettings,
    machine: Machine,
    *,
    seed: int = 0,
    hard: bool = True,
) -> LoadOutcome:
    """Return the outcome of one policy on one trace; with `hard`, late requests are dropped."""
    return Simulation(family, settings, machine, seed).run(trace, hard=hard)
