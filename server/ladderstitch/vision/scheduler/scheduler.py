"""From accepted requests to batches on the engine; every request ends exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from ladderstitch.errors import Draining, InternalError, RequestError
from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.latency_model import LatencyModel
from ladderstitch.scheduling.load_report import LoadReport
from ladderstitch.scheduling.profiles import LatencyProfile
from ladderstitch.scheduling.requests import Completion, Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.metrics import VisionMetrics
from ladderstitch.vision.engine.base import Engine
from ladderstitch.vision.scheduler import admission
from ladderstitch.vision.scheduler.batch_runner import BatchRunner
from ladderstitch.vision.scheduler.in_flight import InFlightRequests, Statistics
from ladderstitch.vision.scheduler.planner import Planner
from ladderstitch.vision.scheduler.policies.base import Decision, Defer
from ladderstitch.vision.scheduler.recorder import RecordingPlanner

SWEEP_S = 0.05
"""How late a passed limit may be noticed while a batch, or the engine's return, takes long."""


class Scheduler:
    """Owns the queue of one model and the dispatch loop that empties it onto the engine.

    Made inside a running event loop; raises `InvalidArgument` if the settings do not fit the model.
    All that is planned goes to `record`, if there is one.
    """

    def __init__(
        self,
        engine: Engine,
        quality: Mapping[int, float],
        profile: LatencyProfile,
        settings: SchedulerSettings,
        metrics: VisionMetrics,
        clock: Callable[[], float] = time.monotonic,
        record: TextIO | None = None,
    ) -> None:
        self.engine = engine
        self.metrics = metrics
        self.clock = clock
        self.planner = (
            Planner(quality, profile, settings)
            if record is None
            else RecordingPlanner(quality, profile, settings, record)
        )
        self._in_flight = InFlightRequests(metrics, clock)
        self._batch_runner = BatchRunner(engine, self.planner, self._in_flight, metrics, clock)
        self._draining = False
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._timer = PeriodicTimer(self._expire_hard_deadlines, SWEEP_S)
        self._loop = asyncio.create_task(self._dispatch(), name="dispatch")

    def configure(self, settings: SchedulerSettings) -> None:
        """As `Planner.configure`."""
        self.planner.configure(settings)
        self._wake.set()

    @property
    def running(self) -> bool:
        return not self._loop.done()

    @property
    def statistics(self) -> Statistics:
        return self._in_flight.statistics

    @property
    def quality(self) -> Mapping[int, float]:
        return self.planner.quality

    @property
    def latency(self) -> LatencyModel:
        return self.planner.latency

    @property
    def candidates(self) -> CandidateFilter:
        return self.planner.candidates

    @property
    def settings(self) -> SchedulerSettings:
        return self.planner.settings

    @property
    def queue_requests(self) -> int:
        return len(self.planner.queue)

    @property
    def running_requests(self) -> int:
        return len(self._batch_runner.running)

    def load_report(self) -> LoadReport:
        """What others have to wait for at present."""
        return self.planner.load_report(self.clock())

    def check_budget(
        self, budget_s: float | None, min_quality: float = 0.0
    ) -> admission.BudgetCheck:
        """What could be had within a budget, now and when idle."""
        return self.planner.check_budget(budget_s, min_quality, self.clock())

    async def submit(self, request: Request) -> Completion:
        """Answer one request; raises a `RequestError` that says why not.

        Cancelling the caller frees the request's place at once.
        """
        self._admit(request)
        waiting = self._in_flight.add(request)
        self.planner.add(request)
        self.metrics.queued(self.queue_requests)
        self._idle.clear()
        self._wake.set()
        if request.deadlines.hard != float("inf"):
            self._timer.start()
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            if self._in_flight.remove(waiting):
                with contextlib.suppress(ValueError):  # it is being computed, not queued
                    self.planner.remove(request)
                self.metrics.queued(self.queue_requests)
                self._wake.set()
            raise

    async def drain(self) -> None:
        """Refuse new requests and return when all accepted ones have ended."""
        self._draining = True
        await self._idle.wait()

    async def close(self) -> None:
        """Stop at once; requests that have not ended get `Draining`."""
        self._draining = True
        self._loop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._loop
        self._timer.stop()
        for waiting in self._in_flight.all():
            self._in_flight.fail(waiting, Draining("the replica is shutting down"))

    def _admit(self, request: Request) -> None:
        try:
            if self._draining:
                raise Draining("the replica is draining; try another one")
            self.planner.admit(request, self.clock(), alone=not self._in_flight)
        except RequestError as error:
            self.metrics.refused(error.code, request)
            raise

    async def _dispatch(self) -> None:
        while True:
            if not self.planner.queue and not self._batch_runner.alone:
                if not self._in_flight:
                    self._idle.set()
                self._wake.clear()
                await self._wake.wait()
            now = self.clock()
            self._expire(now)
            match self._decide(now):
                case Decision() as decision:
                    await self._batch_runner.run(decision, now)
                case Defer(seconds):
                    await self._hold(seconds)

    async def _hold(self, seconds: float) -> None:
        """Wait for that long, or until something changes."""
        self._batch_runner.idled = True
        self._wake.clear()
        timer = asyncio.get_running_loop().call_later(seconds, self._wake.set)
        await self._wake.wait()
        timer.cancel()

    def _decide(self, now: float) -> Decision | Defer | None:
        """The next batch, taken off the queue, or how long to wait for a better one."""
        while self._batch_runner.alone:  # survivors of a failed batch, one by one
            waiting = self._batch_runner.alone.popleft()
            if now > waiting.request.deadlines.hard:
                self._in_flight.expire_computing(waiting)
            elif waiting in self._in_flight:
                return Decision((waiting.request,), self.candidates.for_request(waiting.request)[0])
        queue = self.planner.queue
        if not queue:
            return None
        try:
            choice = self.planner.decide(now)
        except Exception as error:
            # Whatever is wrong with the policy, the head ends here and the others get their turn.
            head = queue.view[0]
            self.planner.remove(head)
            self._in_flight.fail(
                self._in_flight[head], InternalError.logged("the policy failed", error)
            )
            return None
        if isinstance(choice, Defer):
            return choice
        wanted = tuple(r for r in choice.requests if self._in_flight[r] in self._in_flight)
        return Decision(wanted, choice.variant) if wanted else None

    def _expire(self, now: float) -> None:
        expired = self.planner.take_expired(now)
        if expired:
            self._in_flight.expire_queued(expired, now)
            self.metrics.queued(self.queue_requests)

    def _expire_hard_deadlines(self) -> bool:
        """End what is past its limit, even if the engine does not come back for long.

        Returns whether others have limits.
        """
        now = self.clock()
        self._expire(now)
        for waiting in (*self._batch_runner.running, *self._batch_runner.alone):
            if now > waiting.request.deadlines.hard:
                self._in_flight.expire_computing(waiting)
        self._wake.set()
        return any(w.request.deadlines.hard != float("inf") for w in self._in_flight.all())


class PeriodicTimer:
    """Calls `sweep` every `interval_s` from `start` on, until it returns that nothing is left."""

    def __init__(self, sweep: Callable[[], bool], interval_s: float) -> None:
        self._expire_hard_deadlines = sweep
        self._interval_s = interval_s
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """May be called again while it runs."""
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._interval_s, self._turn)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _turn(self) -> None:
        self._timer = None
        if self._expire_hard_deadlines():
            self.start()
