"""From accepted requests to batches on the engine; every request ends exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ladderstitch.core import Completion, Request
from ladderstitch.errors import (
    BadInput,
    Draining,
    EngineRestarting,
    ExpiredInCompute,
    ExpiredInQueue,
    InternalError,
    RequestError,
)
from ladderstitch.measurements import LatencyProfile
from ladderstitch.metrics import ModelMetrics
from ladderstitch.scheduling.admission import BudgetCheck, Load, admit, check_budget
from ladderstitch.scheduling.engine import Engine, EngineDied, EngineResult
from ladderstitch.scheduling.latency import LatencyTable
from ladderstitch.scheduling.menu import Menu
from ladderstitch.scheduling.policy import Decision, make_policy
from ladderstitch.scheduling.queue import DeadlineQueue
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.scheduling.statistics import Statistics

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Waiting:
    """An accepted request and where its answer goes; `retried` once its batch has failed."""

    request: Request
    answer: asyncio.Future[Completion]
    retried: bool = False


class Scheduler:
    """Owns the queue of one model and the dispatch loop that empties it onto the engine."""

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
        self.statistics = Statistics()
        self._waiting: dict[Request, Waiting] = {}
        self._queue = DeadlineQueue(settings.priority_window_s)
        self._wake = asyncio.Event()
        self._busy_until = 0.0
        self._last_stitch: int | None = None
        self._alone: list[Waiting] = []
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._apply(settings)
        self._loop = asyncio.create_task(self._dispatch(), name="dispatch")

    def _apply(self, settings: SchedulerSettings) -> None:
        self.settings = settings
        self.menu = Menu.of(self.quality, self.latency.profile, settings)
        self.policy = make_policy(settings, self.menu)

    def configure(self, settings: SchedulerSettings) -> None:
        """Use other settings from the next batch on; requests that wait keep waiting.

        Raises `BadInput` if they name a stitch or a floor that this model does not have.
        """
        for field in ("stitch", "pinned_stitch"):
            stitch = getattr(settings, field)
            if stitch is not None and stitch not in self.quality:
                raise BadInput(field, f"expected one of the model's stitches, got {stitch}")
        best = max(self.quality.values())
        if settings.min_quality > best:
            raise BadInput(
                "min_quality", f"expected at most {best:.4f}, the best stitch's, "
                f"got {settings.min_quality}"
            )  # fmt: skip
        waiting = list(self._queue.view)
        self._queue = DeadlineQueue(settings.priority_window_s)
        for request in waiting:
            self._queue.add(request)
        self.latency.probability = settings.attainment_probability
        self._apply(settings)

    @property
    def running(self) -> bool:
        return not self._loop.done()

    @property
    def queue_requests(self) -> int:
        return len(self._queue)

    @property
    def queue_rows(self) -> int:
        return self._queue.rows

    def load(self) -> Load:
        """What admission knows of the present."""
        now = self.clock()
        busy_s = max(0.0, self._busy_until - now)
        return Load(now, busy_s, len(self._queue), self._queue.rows, self._draining)

    def check_budget(self, budget_s: float | None, min_quality: float = 0.0) -> BudgetCheck:
        """What could be had within a budget, now and when idle."""
        return check_budget(
            budget_s, min_quality, self.menu, self.latency.view, self.load(), self.settings
        )

    async def submit(self, request: Request) -> Completion:
        """Answer one request; raises a `RequestError` that says why not.

        Cancelling the caller frees the request's place at once.
        """
        try:
            self._admit(request)
        except RequestError as error:
            self.metrics.refused(error.code)
            raise
        waiting = Waiting(request, asyncio.get_running_loop().create_future())
        self._waiting[request] = waiting
        self._queue.add(request)
        self.metrics.admitted(len(self._queue))
        self._idle.clear()
        self._wake.set()
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            self._forget(waiting)
            self.metrics.refused("CANCELLED")
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
        for waiting in list(self._waiting.values()):
            self._fail(waiting, Draining("the replica is shutting down"))

    def _admit(self, request: Request) -> None:
        if self._draining:
            raise Draining("the replica is draining; try another one")
        admit(
            request,
            self.menu,
            self.latency.view,
            self.load(),
            self._queue.rows_before(request),
            self.settings,
        )

    async def _dispatch(self) -> None:
        while True:
            if not self._queue and not self._alone:
                if not self._waiting:
                    self._idle.set()
                self._wake.clear()
                await self._wake.wait()
            now = self.clock()
            for request in self._queue.take_expired(now):
                self._expire(request, now)
            decision = self._decide(now)
            if decision is not None:
                await self._run(decision, now)

    def _decide(self, now: float) -> Decision | None:
        """The next batch, taken off the queue."""
        while self._alone:  # survivors of a failed batch, one by one
            waiting = self._alone.pop()
            if waiting.request in self._waiting:
                return Decision((waiting.request,), self.menu.candidates(waiting.request)[0])
        if not self._queue:
            return None
        decision = self.policy(self._queue.view, self.latency.view, now)
        for request in decision.requests:
            self._queue.remove(request)
        return decision

    async def _run(self, decision: Decision, now: float) -> None:
        rows = sum(request.rows for request in decision.requests)
        self._busy_until = now + self.latency.view.expected(decision.stitch, rows)
        batch = [self._waiting[request] for request in decision.requests]
        self.metrics.dispatched(decision.requests, now, len(self._queue))
        try:
            result = await self.engine.forward(
                [request.images for request in decision.requests], decision.stitch
            )
        except EngineDied as error:
            self.metrics.restarts.inc()
            self._retry(batch, EngineRestarting(f"the engine was lost twice: {error}"))
        except Exception as error:
            self._retry_alone(batch, error)
        else:
            self._complete(batch, decision.stitch, rows, now, result)

    def _complete(
        self, batch: list[Waiting], stitch: int, rows: int, started: float, result: EngineResult
    ) -> None:
        now = self.clock()
        error = self.latency.observe(stitch, rows, result.compute_s)
        self.metrics.computed(rows, result.compute_s, error)
        self.statistics.computed(rows, result.compute_s)
        self.metrics.corrected(self.latency.view.slowdown, self.latency.view.tail)
        if stitch != self._last_stitch:
            self.metrics.switched(result.switch_s)
            self._last_stitch = stitch
        quality, first = self.quality[stitch], 0
        for waiting in batch:
            request = waiting.request
            logits = result.logits[first : first + request.rows]
            first += request.rows
            if now > request.budget.limit:
                self._fail(waiting, ExpiredInCompute("the limit passed while computing"))
                continue
            completion = Completion(
                logits, stitch, quality, started - request.arrival, result.compute_s, rows
            )
            self._waiting.pop(request, None)
            if not waiting.answer.done():
                waiting.answer.set_result(completion)
                self.metrics.completed(request, completion, now)
                self.statistics.answered(
                    request.rows, completion.queue_s, result.compute_s, now - request.arrival
                )

    def _expire(self, request: Request, now: float) -> None:
        waited_ms = 1e3 * (now - request.arrival)
        error = ExpiredInQueue(f"the limit passed after {waited_ms:.1f} ms in the queue")
        self._fail(self._waiting[request], error)

    def _retry(self, batch: list[Waiting], final: RequestError) -> None:
        """Put the requests of a lost batch back; those lost before get the final error."""
        for waiting in batch:
            if waiting.request not in self._waiting:
                continue
            if waiting.retried:
                self._fail(waiting, final)
            else:
                waiting.retried = True
                self._queue.add(waiting.request)

    def _retry_alone(self, batch: list[Waiting], error: Exception) -> None:
        """A batch failed inside the engine: run its requests one by one, so that one bad request
        fails alone."""
        incident = uuid.uuid4().hex[:12]
        log.error("incident %s: a batch of %d failed", incident, len(batch), exc_info=error)
        for waiting in batch:
            if waiting.retried or len(batch) == 1:
                failure = InternalError(f"the model failed; incident {incident}", incident=incident)
                self._fail(waiting, failure)
            elif waiting.request in self._waiting:
                waiting.retried = True
                self._alone.append(waiting)

    def _fail(self, waiting: Waiting, error: RequestError) -> None:
        self._waiting.pop(waiting.request, None)
        if not waiting.answer.done():
            waiting.answer.set_exception(error)
            self.metrics.refused(error.code)
            self.statistics.fail.add(self.clock() - waiting.request.arrival)

    def _forget(self, waiting: Waiting) -> None:
        """The caller is gone: free its place, whether it still waits or is being computed."""
        if self._waiting.pop(waiting.request, None) is not None:
            with contextlib.suppress(ValueError):
                self._queue.remove(waiting.request)
        self._wake.set()
