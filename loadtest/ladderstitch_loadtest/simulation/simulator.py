"""Replicas on a virtual clock: the server's own planner and policies, a profile, a trace.

Deterministic: the same family, trace, settings and seed give the same outcome.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from math import exp, inf
from random import Random

import numpy as np

from ladderstitch.errors import RequestError
from ladderstitch.gateway.routing import ReplicaLoad, RequestTicket, choose
from ladderstitch.scheduling.requests import Deadlines, Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.vision.scheduler.planner import Planner
from ladderstitch.vision.scheduler.policies.base import Decision
from ladderstitch_loadtest.load.outcome import LoadOutcome
from ladderstitch_loadtest.load.traces import Trace
from ladderstitch_loadtest.simulation.profiles import Family

ONE_IMAGE = np.zeros((1, 0, 0, 0), np.float32)
P99_SIGMAS = 2.326
"""Standard deviations between a normal's median and its 99th percentile."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What simulated replicas run on.

    They tell whoever routes how busy they are every `push_s`; 0: it is always known.

    `spread` scales the profile's own p99/median (0: every batch takes its median). `dispatch_overhead_s` is
    what a batch costs beyond compute. `slow` are (from, to, factor) spells of a noisy neighbour.
    """

    replicas: int = 1
    spread: float = 1.0
    dispatch_overhead_s: float = 0.0
    push_s: float = 0.0
    slow: tuple[tuple[float, float, float], ...] = ()

    def factor(self, now: float) -> float:
        return max((f for start, end, f in self.slow if start <= now < end), default=1.0)


class SimulatedReplica:
    """One planner, and the batch that its engine runs."""

    def __init__(self, family: Family, settings: SchedulerSettings) -> None:
        self.planner = Planner(family.quality, family.profile, settings)
        self.running: tuple[Request, ...] = ()
        self.variant = -1
        self.started = 0.0
        self.compute_s = 0.0
        self.view = ReplicaLoad(reported_at=-inf)
        self.marks: dict[Request, RequestTicket] = {}
        self.turn = 0
        """Counts decisions, so that a wake-up that is no longer wanted can be told."""


class Simulation:
    """One run; `run` may be called once."""

    def __init__(
        self, family: Family, settings: SchedulerSettings, machine: Machine, seed: int = 0
    ) -> None:
        self.family = family
        self.machine = machine
        self.replicas = [SimulatedReplica(family, settings) for _ in range(machine.replicas)]
        self._random = Random(seed)
        self._sigma = _sigmas(family, machine.spread)
        self._events: list[tuple[float, int, int, int]] = []
        self._sent = 0
        self._routed = 0

    def run(self, trace: Trace, *, hard: bool = True) -> LoadOutcome:
        """Every request's end; `hard` budgets are limits too: what passes them is dropped."""
        outcome = LoadOutcome.unanswered(trace)
        index: dict[Request, int] = {}
        for i, (at, budget) in enumerate(
            zip(trace.arrivals_s.tolist(), trace.budgets_s.tolist(), strict=True)
        ):
            self._advance(at, outcome, index)
            due = at + budget
            limit = due if hard else float("inf")
            request = Request("", ONE_IMAGE, at, Deadlines(due, limit, "trace", "trace"))
            number = self._route(request, at)
            replica = self.replicas[number]
            idle = not replica.running
            try:
                replica.planner.admit(request, at, alone=idle and not replica.planner.queue)
            except RequestError:
                continue
            replica.marks[request] = replica.view.on_sent(due)
            index[request] = i
            replica.planner.add(request)
            if idle:
                self._dispatch(number, at)
        self._advance(float("inf"), outcome, index)
        return outcome

    def _route(self, request: Request, now: float) -> int:
        """The replica with the most slack for this request: the gateway's rule, on what replicas
        have told."""
        if len(self.replicas) == 1:
            return 0
        for replica in self.replicas:
            if now - replica.view.reported_at >= self.machine.push_s:
                replica.view.on_report(replica.planner.load_report(now), now)
        self._routed += 1
        views = [replica.view for replica in self.replicas]
        return choose(views, request.deadlines.soft - now, now, self._routed)

    def _advance(self, until: float, outcome: LoadOutcome, index: dict[Request, int]) -> None:
        """Everything that happens before `until`."""
        events = self._events
        while events and events[0][0] <= until:
            now, _, number, turn = heappop(events)
            replica = self.replicas[number]
            if turn != replica.turn:
                continue
            if replica.running:
                self._finish(replica, now, outcome, index)
            self._dispatch(number, now)

    def _finish(
        self, replica: SimulatedReplica, now: float, outcome: LoadOutcome, index: dict[Request, int]
    ) -> None:
        batch, rows = replica.running, len(replica.running)
        quality = self.family.quality[replica.variant]
        for request in batch:
            replica.view.on_ended(replica.marks.pop(request))
            i = index.pop(request)
            outcome.answer(
                i, now, replica.started, replica.compute_s, replica.variant, quality, rows
            )
        replica.planner.finished(replica.variant, rows, replica.compute_s, now - replica.started)
        replica.planner.free()
        replica.running = ()

    def _dispatch(self, number: int, now: float) -> None:
        replica = self.replicas[number]
        planner = replica.planner
        for request in planner.take_expired(now):
            replica.view.on_ended(replica.marks.pop(request))
        replica.turn += 1
        if not planner.queue:
            return
        choice = planner.decide(now)
        if not isinstance(choice, Decision):
            self._at(now + choice.seconds, number, replica.turn)
            return
        replica.running, replica.variant, replica.started = choice.requests, choice.variant, now
        planner.started(len(choice.requests), choice.variant, now)
        replica.compute_s = self._compute_s(planner, choice.variant, len(choice.requests), now)
        self._at(now + replica.compute_s + self.machine.dispatch_overhead_s, number, replica.turn)

    def _compute_s(self, planner: Planner, variant: int, rows: int, now: float) -> float:
        seconds = planner.latency.view.profiled[variant][rows] * self.machine.factor(now)
        sigma = self._sigma[variant]
        return seconds * exp(sigma * self._random.gauss(0.0, 1.0)) if sigma else seconds

    def _at(self, time: float, number: int, turn: int) -> None:
        self._sent += 1
        heappush(self._events, (time, self._sent, number, turn))


def _sigmas(family: Family, spread: float) -> dict[int, float]:
    """Of the log-normal spread that puts the 99th percentile where the profile has it."""
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
    """One run of one policy."""
    return Simulation(family, settings, machine, seed).run(trace, hard=hard)
