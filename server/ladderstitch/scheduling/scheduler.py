"""From accepted requests to batches on the engine; every request ends exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from typing import TextIO

from ladderstitch.core import Completion, Request
from ladderstitch.errors import (
    Draining,
    EngineRestarting,
    InternalError,
    RequestError,
)
from ladderstitch.measurements import LatencyProfile
from ladderstitch.metrics import ModelMetrics
from ladderstitch.scheduling import admission
from ladderstitch.scheduling.backlog import Backlog
from ladderstitch.scheduling.engine import Engine, EngineDied, EngineResult
from ladderstitch.scheduling.latency import LatencyTable
from ladderstitch.scheduling.ledger import Ledger, Settled, Waiting
from ladderstitch.scheduling.menu import Menu
from ladderstitch.scheduling.planner import Planner
from ladderstitch.scheduling.policy import Decision, Hold
from ladderstitch.scheduling.recording import RecordingPlanner
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.scheduling.statistics import Statistics
from ladderstitch.scheduling.sweeper import Sweeper

log = logging.getLogger(__name__)

SWEEP_S = 0.05
"""How late a passed limit may be noticed while a batch, or the engine's return, takes long."""


class Scheduler:
    """Owns the queue of one model and the dispatch loop that empties it onto the engine.

    Made inside a running event loop; raises `BadInput` if the settings do not fit the model.
    All that is planned goes to `record`, if there is one.
    """

    def __init__(
        self,
        engine: Engine,
        quality: Mapping[int, float],
        profile: LatencyProfile,
        settings: SchedulerSettings,
        metrics: ModelMetrics,
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
        self._ledger = Ledger(metrics, clock)
        self._alone: deque[Waiting] = deque()
        self._running: list[Waiting] = []
        self._last_stitch: int | None = None
        self._free_since: float | None = None
        self._draining = False
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._sweeper = Sweeper(self._sweep, SWEEP_S)
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
        return self._ledger.statistics

    @property
    def quality(self) -> Mapping[int, float]:
        return self.planner.quality

    @property
    def latency(self) -> LatencyTable:
        return self.planner.latency

    @property
    def menu(self) -> Menu:
        return self.planner.menu

    @property
    def settings(self) -> SchedulerSettings:
        return self.planner.settings

    @property
    def queue_requests(self) -> int:
        return len(self.planner.queue)

    @property
    def running_requests(self) -> int:
        return len(self._running)

    def backlog(self) -> Backlog:
        """What others have to wait for at present."""
        return self.planner.backlog(self.clock())

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
        waiting = self._ledger.open(request)
        self.planner.add(request)
        self.metrics.queued(self.queue_requests)
        self._idle.clear()
        self._wake.set()
        if request.budget.limit != float("inf"):
            self._sweeper.start()
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            if self._ledger.leave(waiting):
                with contextlib.suppress(ValueError):  # it is being computed, not queued
                    self.planner.withdraw(request)
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
        self._sweeper.stop()
        for waiting in self._ledger.all():
            self._ledger.fail(waiting, Draining("the replica is shutting down"))

    def _admit(self, request: Request) -> None:
        try:
            if self._draining:
                raise Draining("the replica is draining; try another one")
            self.planner.admit(request, self.clock(), alone=not self._ledger)
        except RequestError as error:
            self.metrics.refused(error.code, request)
            raise

    async def _dispatch(self) -> None:
        while True:
            if not self.planner.queue and not self._alone:
                if not self._ledger:
                    self._idle.set()
                self._wake.clear()
                await self._wake.wait()
            now = self.clock()
            self._expire(now)
            match self._decide(now):
                case Decision() as decision:
                    await self._run(decision, now)
                case Hold(seconds):
                    await self._hold(seconds)

    async def _hold(self, seconds: float) -> None:
        """Wait for that long, or until something changes."""
        self._free_since = None
        self._wake.clear()
        timer = asyncio.get_running_loop().call_later(seconds, self._wake.set)
        await self._wake.wait()
        timer.cancel()

    def _decide(self, now: float) -> Decision | Hold | None:
        """The next batch, taken off the queue, or how long to wait for a better one."""
        while self._alone:  # survivors of a failed batch, one by one
            waiting = self._alone.popleft()
            if now > waiting.request.budget.limit:
                self._ledger.expire_computing(waiting)
            elif waiting in self._ledger:
                return Decision((waiting.request,), self.menu.candidates(waiting.request)[0])
        queue = self.planner.queue
        if not queue:
            return None
        try:
            choice = self.planner.decide(now)
        except Exception as error:
            # Whatever is wrong with the policy, the head ends here and the others get their turn.
            head = queue.view[0]
            self.planner.withdraw(head)
            self._ledger.fail(self._ledger[head], _incident("the policy failed", error))
            return None
        if isinstance(choice, Hold):
            return choice
        wanted = tuple(r for r in choice.requests if self._ledger[r] in self._ledger)
        return Decision(wanted, choice.stitch) if wanted else None

    async def _run(self, decision: Decision, now: float) -> None:
        rows = sum(request.rows for request in decision.requests)
        batch = [self._ledger[request] for request in decision.requests]
        self._running = batch
        self.planner.started(rows, decision.stitch, now)
        if self._free_since is not None:
            self.metrics.turnaround.observe(self.clock() - self._free_since)
            self._free_since = None
        self.metrics.dispatched(decision.requests, now, self.queue_requests)
        try:
            result = await self.engine.forward(
                [request.images for request in decision.requests], decision.stitch
            )
            self._free_since = self.clock()
            self._complete(batch, decision.stitch, rows, now, result)
        except EngineDied as error:
            self.metrics.restarts.inc()
            self._retry(batch, EngineRestarting(f"the engine was lost twice: {error}"))
        except Exception as error:
            self._retry_alone(batch, _incident(f"a batch of {len(batch)} failed", error))
        finally:
            self._running = []
            self.planner.free()
            if not self.planner.queue:
                self._free_since = None

    def _complete(
        self, batch: list[Waiting], stitch: int, rows: int, started: float, result: EngineResult
    ) -> None:
        if len(result.logits) != rows:
            raise ValueError(f"logits: expected {rows} rows, got {len(result.logits)}")
        settled = self._ledger.settle(batch, stitch, self.quality[stitch], started, result)
        # Answers go out first: books are kept in the loop's next turn.
        total_s = settled.at - started
        loop = asyncio.get_running_loop()
        loop.call_soon(self._account, settled, stitch, rows, total_s, result)

    def _account(
        self, settled: Settled, stitch: int, rows: int, total_s: float, result: EngineResult
    ) -> None:
        self._ledger.count(settled)
        tail = self.latency.view.tail
        error = self.planner.finished(stitch, rows, result.compute_s, total_s)
        self.metrics.computed(rows, result.compute_s, error, tail)
        self.metrics.corrected(self.latency.view.slowdown, self.latency.view.tail)
        self.statistics.computed(rows, result.compute_s)
        if stitch != self._last_stitch:
            self.metrics.switched(result.switch_s)
            self._last_stitch = stitch

    def _expire(self, now: float) -> None:
        expired = self.planner.take_expired(now)
        if expired:
            self._ledger.expire_queued(expired, now)
            self.metrics.queued(self.queue_requests)

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
                self.planner.put_back(waiting.request)

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
