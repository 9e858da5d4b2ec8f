"""From accepted requests to batches on the engine; every request ends exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping

from ladderstitch.core import Completion, Request
from ladderstitch.errors import (
    BudgetInfeasible,
    Draining,
    EngineRestarting,
    InternalError,
    Overloaded,
    RequestError,
)
from ladderstitch.measurements import LatencyProfile
from ladderstitch.metrics import ModelMetrics
from ladderstitch.scheduling import admission
from ladderstitch.scheduling.arrivals import Arrivals
from ladderstitch.scheduling.engine import Engine, EngineDied, EngineResult
from ladderstitch.scheduling.latency import LatencyTable, Transit
from ladderstitch.scheduling.ledger import Ledger, Waiting
from ladderstitch.scheduling.menu import Menu
from ladderstitch.scheduling.policies import make_policy
from ladderstitch.scheduling.policy import Decision
from ladderstitch.scheduling.queue import DeadlineQueue
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.scheduling.statistics import Statistics
from ladderstitch.scheduling.sweeper import Sweeper

log = logging.getLogger(__name__)

SWEEP_S = 0.05
"""How late a passed limit may be noticed while a batch, or the engine's return, takes long."""


class Scheduler:
    """Owns the queue of one model and the dispatch loop that empties it onto the engine.

    Made inside a running event loop; raises `BadInput` if the settings do not fit the model.
    """

    def __init__(
        self,
        engine: Engine,
        quality: Mapping[int, float],
        profile: LatencyProfile,
        settings: SchedulerSettings,
        metrics: ModelMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.quality = quality
        self.metrics = metrics
        self.clock = clock
        self.latency = LatencyTable(profile, settings.attainment_probability)
        self._ledger = Ledger(metrics, clock)
        self._queue = DeadlineQueue(settings.priority_window_s)
        self._arrivals = Arrivals()
        self._transit = Transit()
        self._alone: deque[Waiting] = deque()
        self._running: list[Waiting] = []
        self._busy_until = 0.0
        self._last_stitch: int | None = None
        self._draining = False
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._sweeper = Sweeper(self._sweep, SWEEP_S)
        self.configure(settings)
        self._loop = asyncio.create_task(self._dispatch(), name="dispatch")

    def configure(self, settings: SchedulerSettings) -> None:
        """Use other settings from the next batch on; requests that wait keep waiting.

        Raises `BadInput` if they name a stitch or a floor that this model does not have.
        """
        admission.check_settings(settings, self.quality)
        if settings.priority_window_s != self._queue.priority_window_s:
            waiting = list(self._queue.view)
            self._queue = DeadlineQueue(settings.priority_window_s)
            for request in waiting:
                self._queue.add(request)
        self.latency.set_probability(settings.attainment_probability)
        self.settings = settings
        self.menu = Menu.of(self.quality, self.latency.profile, settings)
        self.policy = make_policy(settings, self.menu, self._arrivals.forecast)

    @property
    def running(self) -> bool:
        return not self._loop.done()

    @property
    def statistics(self) -> Statistics:
        return self._ledger.statistics

    @property
    def queue_requests(self) -> int:
        return len(self._queue)

    @property
    def running_requests(self) -> int:
        return len(self._running)

    @property
    def queue_rows(self) -> int:
        return self._queue.rows

    def load(self) -> admission.Load:
        """What admission knows of the present."""
        now = self.clock()
        busy_s = max(0.0, self._busy_until - now)
        return admission.Load(now, busy_s, len(self._queue), self._queue.rows)

    def check_budget(
        self, budget_s: float | None, min_quality: float = 0.0
    ) -> admission.BudgetCheck:
        """What could be had within a budget, now and when idle."""
        return admission.check_budget(
            budget_s, min_quality, self.menu, self.latency.view, self.load(), self.settings
        )

    async def submit(self, request: Request) -> Completion:
        """Answer one request; raises a `RequestError` that says why not.

        Cancelling the caller frees the request's place at once.
        """
        self._admit(request)
        waiting = self._ledger.open(request)
        self._queue.add(request)
        if self._arrivals.add(request) and self.settings.policy == "adaptive":
            self.policy = make_policy(self.settings, self.menu, self._arrivals.forecast)
        self.metrics.queued(len(self._queue))
        self._idle.clear()
        self._wake.set()
        if request.budget.limit != float("inf"):
            self._sweeper.start()
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            if self._ledger.leave(waiting):
                with contextlib.suppress(ValueError):  # it is being computed, not queued
                    self._queue.remove(request)
                self.metrics.queued(len(self._queue))
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
        self._sweeper.stop()
        for waiting in self._ledger.all():
            self._ledger.fail(waiting, Draining("the replica is shutting down"))

    def _admit(self, request: Request) -> None:
        try:
            if self._draining:
                raise Draining("the replica is draining; try another one")
            ahead = self._queue.rows_before(request)
            admission.admit(
                request, self.menu, self.latency.view, self.load(), ahead, self.settings
            )
        except RequestError as error:
            if isinstance(error, BudgetInfeasible | Overloaded) and not self._ledger:
                self.latency.doubt()
            self.metrics.refused(error.code, request)
            raise

    async def _dispatch(self) -> None:
        while True:
            if not self._queue and not self._alone:
                if not self._ledger:
                    self._idle.set()
                self._wake.clear()
                await self._wake.wait()
            now = self.clock()
            self._expire(now)
            decision = self._decide(now)
            if decision is not None:
                await self._run(decision, now)

    def _decide(self, now: float) -> Decision | None:
        """The next batch, taken off the queue."""
        while self._alone:  # survivors of a failed batch, one by one
            waiting = self._alone.popleft()
            if now > waiting.request.budget.limit:
                self._ledger.expire_computing(waiting)
            elif waiting in self._ledger:
                return Decision((waiting.request,), self.menu.candidates(waiting.request)[0])
        if not self._queue:
            return None
        try:
            start = now + self._transit.seconds
            decision = self.policy(self._queue.view, self.latency.view, start)
        except Exception as error:
            # Whatever is wrong with the policy, the head ends here and the others get their turn.
            head = self._queue.view[0]
            self._queue.remove(head)
            self._ledger.fail(self._ledger[head], _incident("the policy failed", error))
            return None
        for request in decision.requests:
            self._queue.remove(request)
        wanted = tuple(r for r in decision.requests if self._ledger[r] in self._ledger)
        return Decision(wanted, decision.stitch) if wanted else None

    async def _run(self, decision: Decision, now: float) -> None:
        rows = sum(request.rows for request in decision.requests)
        batch = [self._ledger[request] for request in decision.requests]
        self._running = batch
        self._busy_until = now + self.latency.view.expected(decision.stitch, rows)
        self.metrics.dispatched(decision.requests, now, len(self._queue))
        try:
            result = await self.engine.forward(
                [request.images for request in decision.requests], decision.stitch
            )
            self._complete(batch, decision.stitch, rows, now, result)
        except EngineDied as error:
            self.metrics.restarts.inc()
            self._retry(batch, EngineRestarting(f"the engine was lost twice: {error}"))
        except Exception as error:
            self._retry_alone(batch, _incident(f"a batch of {len(batch)} failed", error))
        finally:
            self._running = []
            self._busy_until = 0.0

    def _complete(
        self, batch: list[Waiting], stitch: int, rows: int, started: float, result: EngineResult
    ) -> None:
        if len(result.logits) != rows:
            raise ValueError(f"logits: expected {rows} rows, got {len(result.logits)}")
        self._transit.observe(self.clock() - started - result.compute_s)
        error = self.latency.observe(stitch, rows, result.compute_s)
        self.metrics.computed(rows, result.compute_s, error)
        self.metrics.corrected(self.latency.view.slowdown, self.latency.view.tail)
        self.statistics.computed(rows, result.compute_s)
        if stitch != self._last_stitch:
            self.metrics.switched(result.switch_s)
            self._last_stitch = stitch
        self._ledger.settle(batch, stitch, self.quality[stitch], started, result)

    def _expire(self, now: float) -> None:
        expired = self._queue.take_expired(now)
        if expired:
            self._ledger.expire_queued(expired, now)
            self.metrics.queued(len(self._queue))

    def _sweep(self) -> bool:
        """End what is past its limit, even if the engine does not come back for long.

        Returns whether others have limits.
        """
        now = self.clock()
        self._expire(now)
        for waiting in (*self._running, *self._alone):
            if now > waiting.request.budget.limit:
                self._ledger.expire_computing(waiting)
        self._wake.set()
        return any(w.request.budget.limit != float("inf") for w in self._ledger.all())

    def _retry(self, batch: list[Waiting], final: RequestError) -> None:
        """Put the requests of a lost batch back; those lost before get the final error."""
        for waiting in batch:
            if waiting.lost:
                self._ledger.fail(waiting, final)
            elif waiting in self._ledger:
                waiting.lost = True
                self._queue.add(waiting.request)

    def _retry_alone(self, batch: list[Waiting], error: InternalError) -> None:
        """Run the requests of a failed batch one by one, so that a bad one fails alone."""
        for waiting in batch:
            if waiting.failed or len(batch) == 1:
                self._ledger.fail(waiting, error)
            elif waiting in self._ledger:
                waiting.failed = True
                self._alone.append(waiting)


def _incident(what: str, error: Exception) -> InternalError:
    """Log the traceback under a number that the caller is told instead."""
    incident = uuid.uuid4().hex[:12]
    log.error("incident %s: %s", incident, what, exc_info=error)
    return InternalError(f"the model failed; incident {incident}", incident=incident)
