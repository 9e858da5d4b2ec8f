"""The scheduler of one image model: from accepted requests to batches on the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TextIO

from ladderstitch.errors import Draining, EngineRestarting, InternalError, RequestError
from ladderstitch.scheduling.cascades import NO_CASCADES, CascadeSet
from ladderstitch.scheduling.load_report import LoadReport
from ladderstitch.scheduling.profiles import LatencyProfile
from ladderstitch.scheduling.requests import ImageAnswer, Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.model_metrics import VisionMetrics, harmless
from ladderstitch.vision.engine.base import Engine
from ladderstitch.vision.scheduler import admission
from ladderstitch.vision.scheduler.audit import Auditor
from ladderstitch.vision.scheduler.audit_run import AuditRunner
from ladderstitch.vision.scheduler.batch_runner import BatchRunner, HangLimits
from ladderstitch.vision.scheduler.in_flight import InFlightRequests
from ladderstitch.vision.scheduler.planner import Planner
from ladderstitch.vision.scheduler.policies.base import Decision, Defer
from ladderstitch.vision.scheduler.recorder import PlannerRecorder

log = logging.getLogger(__name__)

EXPIRY_INTERVAL_S = 0.05
"""Seconds between checks for passed hard deadlines, which also run while the engine computes."""

MAX_TURNS_WITHOUT_ARRIVAL = 3
"""Turns of the event loop without a new request after which a batch is not waited for."""
DECAY = 0.8
"""Factor per batch on the number of requests that were in flight."""
MAX_COLLECTING_S = 0.003
COLLECTING_SHARE = 0.1
"""A batch waits for requests that long at most, and for this share of the first one's budget."""
MAX_FAILURES = 5
"""Failures of the dispatch loop in a row, with no batch answered in between, that end it."""
FIRST_RESTART_DELAY_S = 0.01
"""Delay before the dispatch loop is started again; it doubles with each failure in a row."""


class Scheduler:
    """The queue of one model and the dispatch loop that runs it on the engine.

    Every accepted request ends exactly once. A scheduler is created inside a running event loop. If
    `record` is given, every planner input and decision is written to it as JSON lines. Raises
    `InvalidArgument` if the settings do not fit the model.

    A dispatch loop that fails, for any reason, is started again: the requests that it was handling
    fail, and the waiting ones stay in the queue. If it fails again before it has answered a batch,
    the waiting ones fail, too. After `MAX_FAILURES` failures in a row the scheduler is not
    `running` any more: it rejects requests, and its replica has to be replaced. With `hang_limits`,
    that is also so after a batch that exceeds them.
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
        hang_limits: HangLimits | None = None,
        cascades: CascadeSet = NO_CASCADES,
        agreements: Mapping[int, float] | None = None,
    ) -> None:
        self.engine = engine
        self.metrics = metrics
        self.clock = clock
        recorder = None if record is None else PlannerRecorder(record, metrics.failures.inc)
        self.planner = Planner(quality, profile, settings, recorder, cascades)
        self.in_flight = InFlightRequests(metrics, clock)
        self.batch_runner = BatchRunner(engine, self.planner, self.in_flight, metrics, clock)
        self._draining = self._closing = False
        self._recent_in_flight = 1.0
        self._wake = asyncio.Event()
        auditor = Auditor(agreements or {}, clock())
        self._audits = AuditRunner(engine, self.planner, auditor, metrics, clock, self._wake)
        self._audits.configure(settings)
        self.batch_runner.on_answer = self._audits.sample
        self._idle = asyncio.Event()
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._hang_watch: asyncio.Task[None] | None = None
        if hang_limits is not None:
            self._hang_watch = asyncio.create_task(self._watch_batches(hang_limits), name="hangs")
        self._dispatch_task = asyncio.create_task(self._supervise(), name="dispatch")
        self._dispatch_task.add_done_callback(self._on_stopped)

    def configure(self, settings: SchedulerSettings) -> None:
        """Apply other settings from the next batch on; waiting requests stay in the queue.

        Raises `InvalidArgument` if the model lacks a variant or the floor that they name.
        """
        self.planner.configure(settings)
        self._audits.configure(settings)
        self._wake.set()

    @property
    def running(self) -> bool:
        """Whether the dispatch loop runs."""
        return not self._dispatch_task.done()

    def load_report(self) -> LoadReport:
        """Return the seconds that a new request would wait now, for each horizon."""
        return self.planner.load_report(self.clock())

    def check_budget(
        self, budget_s: float | None, min_quality: float = 0.0
    ) -> admission.BudgetCheck:
        """Return the variants that one image could get within a budget, now and when idle.

        Raises `QualityUnavailable` if no variant has the requested quality.
        """
        return self.planner.check_budget(budget_s, min_quality, self.clock())

    async def submit(self, request: Request) -> ImageAnswer:
        """Return the answer to one request. Raises the `RequestError` that ends it instead.

        If the caller is cancelled, the request leaves the queue at once.
        """
        self._admit(request)
        self.planner.add(request)
        pending = self.in_flight.add(request)
        self._observe_queue()
        self._idle.clear()
        self._wake.set()
        if request.deadlines.hard != float("inf"):
            self._start_expiry_timer()
        try:
            return await pending.answer
        except asyncio.CancelledError:
            if self.in_flight.cancel(pending):
                with contextlib.suppress(ValueError):  # it is being computed, not queued
                    self.planner.remove(request)
                self._observe_queue()
                self._wake.set()
            raise

    async def drain(self) -> None:
        """Reject new requests, and return when all accepted requests have ended."""
        self._draining = True
        await self._idle.wait()

    async def close(self) -> None:
        """Stop at once; requests that have not ended fail with `Draining`."""
        self._draining = self._closing = True
        if self._hang_watch is not None:
            self._hang_watch.cancel()
        self._dispatch_task.cancel()
        await asyncio.wait([self._dispatch_task])
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
            self._expiry_timer = None
        for pending in self.in_flight.all():
            self.in_flight.fail(pending, Draining("the replica is shutting down"))

    def _admit(self, request: Request) -> None:
        try:
            if self._draining:
                raise Draining("the replica is draining; try another one")
            if not self.running:
                raise EngineRestarting("the scheduler has stopped; try another replica")
            self.planner.admit(request, self.clock(), alone=not self.in_flight)
        except RequestError as error:
            with harmless("count of a rejection", self.metrics.failures):
                self.metrics.observe_rejection(error.code, request)
            raise

    async def _supervise(self) -> None:
        """Run the dispatch loop, and start it again when it fails, until `close`."""
        failures = 0
        while failures < MAX_FAILURES:
            answered = self.batch_runner.num_answered
            error = await self._run_until_failure()
            failures = 1 if self.batch_runner.num_answered > answered else failures + 1
            self._recover(error, everything=failures > 1)
            await asyncio.sleep(FIRST_RESTART_DELAY_S * 2 ** (failures - 1))
        log.critical("dispatch stopped failures=%d; the replica has to be replaced", failures)

    async def _watch_batches(self, limits: HangLimits) -> None:
        """End the dispatch loop for ever if a batch exceeds its limit."""
        await self.batch_runner.wait_until_hung(limits)
        self._dispatch_task.cancel()

    async def _run_until_failure(self) -> BaseException:
        """Return the error with which the dispatch loop ended."""
        try:
            await self._dispatch()
        except asyncio.CancelledError as error:
            if self._dispatch_task.cancelling():
                raise
            return error  # what the loop waited for was cancelled, not this task
        except Exception as error:
            return error
        return RuntimeError("the dispatch loop returned")

    def _recover(self, error: BaseException, *, everything: bool) -> None:
        """Fail the requests that the dispatch loop had taken from the queue, or all of them."""
        failure = InternalError.logged("the dispatch loop failed and is started again", error)
        with harmless("count of a failed dispatch loop", self.metrics.failures):
            self.metrics.dispatch_restarts.inc()
        if everything:
            self._fail_all(failure)
            return
        waiting = {pending.request for pending in self.batch_runner.isolated}
        waiting |= set(self.planner.queue.view)
        for pending in self.in_flight.all():
            if pending.request not in waiting:
                self.in_flight.fail(pending, failure)

    def _fail_all(self, error: RequestError) -> None:
        """Fail all accepted requests, and empty the queue."""
        self.planner.clear()
        self.batch_runner.isolated.clear()
        for pending in self.in_flight.all():
            self.in_flight.fail(pending, error)
        self._observe_queue()

    def _on_stopped(self, task: asyncio.Task[None]) -> None:
        """Fail all requests if the dispatch loop has ended for ever."""
        if not self._closing:
            error = None if task.cancelled() else task.exception()
            log.critical("dispatch task ended; requests are rejected", exc_info=error)
            self._fail_all(EngineRestarting("the scheduler has stopped; try another replica"))
        self._idle.set()

    async def _dispatch(self) -> None:
        """Run batches until the task is cancelled."""
        while True:
            if not self.planner.queue and not self.batch_runner.isolated:
                if not self.in_flight:
                    self._idle.set()
                self._wake.clear()
                await self._audits.wait()
            await self._collect()
            now = self.clock()
            self._expire_queued(now)
            match self._decide(now):
                case Decision() as decision:
                    await self.batch_runner.run(decision, now)
                case Defer(seconds):
                    await self._defer(seconds)

    async def _collect(self) -> None:
        """Let requests that have reached this process join the next batch.

        gRPC passes on one request in each turn of the event loop. If the loop, not the engine, is
        the bottleneck, the engine would get batches of one or two requests, and each batch costs
        the loop as much as one to two answers do. So the loop goes on while requests arrive, until
        as many wait as were recently in flight. A single caller does not wait.
        """
        queue, started = self.planner.queue, self.clock()
        self._recent_in_flight = max(len(self.in_flight), DECAY * self._recent_in_flight)
        wanted = min(self._recent_in_flight, self.planner.latency.view.max_batch_size)
        turns_without_arrival, seen = 0, len(queue)
        while len(queue) < wanted and turns_without_arrival < MAX_TURNS_WITHOUT_ARRIVAL:
            await asyncio.sleep(0)
            turns_without_arrival = 0 if len(queue) > seen else turns_without_arrival + 1
            seen = len(queue)
            if self._is_urgent(started):
                return

    def _is_urgent(self, since: float) -> bool:
        """Return whether the first request has waited for its share of its budget."""
        queue = self.planner.queue.view
        if not queue:
            return True
        waited_s = self.clock() - since
        return waited_s > MAX_COLLECTING_S or waited_s > COLLECTING_SHARE * (
            queue[0].deadlines.soft - since
        )

    async def _defer(self, seconds: float) -> None:
        """Wait for `seconds`, or until a request arrives or the settings change."""
        self.batch_runner.was_idle = True
        self._wake.clear()
        timer = asyncio.get_running_loop().call_later(seconds, self._wake.set)
        await self._wake.wait()
        timer.cancel()

    def _decide(self, now: float) -> Decision | Defer | None:
        """Return the next batch, removed from the queue, or the seconds to defer, if any."""
        isolated = self._decide_isolated(now)
        if isolated is not None:
            return isolated
        queue = self.planner.queue
        if not queue:
            return None
        try:
            choice = self.planner.decide(now)
        except Exception as error:
            # Whatever is wrong with the policy, the first request ends here and the others go on.
            head = queue.view[0]
            self.planner.remove(head)
            self.in_flight.fail(
                self.in_flight[head], InternalError.logged("the policy failed", error)
            )
            return None
        if isinstance(choice, Defer):
            return choice
        wanted = tuple(r for r in choice.requests if self.in_flight[r] in self.in_flight)
        return replace(choice, requests=wanted) if wanted else None

    def _decide_isolated(self, now: float) -> Decision | None:
        """Return a batch of the next request that must run alone, or None."""
        while self.batch_runner.isolated:
            pending = self.batch_runner.isolated.popleft()
            if now > pending.request.deadlines.hard:
                self.in_flight.expire_in_compute(pending)
            elif pending in self.in_flight:
                fastest = self.planner.candidates.for_request(pending.request)[0]
                return Decision((pending.request,), fastest)
        return None

    def _expire_queued(self, now: float) -> None:
        expired = self.planner.remove_expired(now)
        if expired:
            self.in_flight.expire_in_queue(expired, now)
            self._observe_queue()

    def _observe_queue(self) -> None:
        with harmless("observation of the queue", self.metrics.failures):
            self.metrics.set_queue_length(len(self.planner.queue))

    def _start_expiry_timer(self) -> None:
        """Start the timer of the next check for passed hard deadlines, unless it runs already."""
        if self._expiry_timer is None:
            loop = asyncio.get_running_loop()
            self._expiry_timer = loop.call_later(EXPIRY_INTERVAL_S, self._expire_hard_deadlines)

    def _expire_hard_deadlines(self) -> None:
        """Fail the requests whose hard deadline has passed, even if the engine does not return."""
        self._expiry_timer = None
        now = self.clock()
        with harmless("check for passed deadlines", self.metrics.failures):
            self._expire_queued(now)
        for pending in (*self.batch_runner.running, *self.batch_runner.isolated):
            if now > pending.request.deadlines.hard:
                self.in_flight.expire_in_compute(pending)
        self._wake.set()
        if any(p.request.deadlines.hard != float("inf") for p in self.in_flight.all()):
            self._start_expiry_timer()
