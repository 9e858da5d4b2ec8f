"""The run of one batch on the engine, from its decision to the end or retry of each request."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ladderstitch.errors import EngineRestarting, InternalError, RequestError
from ladderstitch.scheduling.requests import ImageAnswer, Request
from ladderstitch.telemetry.model_metrics import VisionMetrics, harmless
from ladderstitch.vision.engine.base import Engine, EngineDied, EngineResult, run_cascade
from ladderstitch.vision.scheduler.cascade_run import CascadeRun, StageAnswer, certainty_of
from ladderstitch.vision.scheduler.in_flight import BatchResult, InFlightRequests, PendingRequest
from ladderstitch.vision.scheduler.planner import Planner
from ladderstitch.vision.scheduler.policies.base import Decision

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HangLimits:
    """The limits of a batch on an engine that cannot end it: a thread cannot be killed."""

    floor_s: float = 10.0
    """Smallest limit, seconds."""
    factor: float = 50.0
    """Limit of a batch over its expected seconds."""
    interval_s: float = 0.25
    """Seconds between two checks, in which a limit is counted.

    If this process was stopped, too, the batch is not blamed for it.
    """

    def limit_s(self, expected_s: float) -> float:
        """Return the seconds after which a batch counts as hung."""
        return max(self.floor_s, self.factor * expected_s)


class BatchRunner:
    """The runner of batches on one engine, one at a time."""

    def __init__(
        self,
        engine: Engine,
        planner: Planner,
        in_flight: InFlightRequests,
        metrics: VisionMetrics,
        clock: Callable[[], float],
    ) -> None:
        self.on_answer: Callable[[Request, ImageAnswer], None] = lambda request, answer: None
        """Called with every answer of a variant that ran alone, after it has left."""
        self.running: list[PendingRequest] = []
        """Requests of the batch that runs now."""
        self.isolated: deque[PendingRequest] = deque()
        """Requests of a failed batch, each of which is retried in a batch of its own."""
        self.was_idle = True
        """Whether the engine last became idle for lack of work or because the policy deferred."""
        self.num_started = self.num_answered = 0
        """Batches that went to the engine, and those whose answers were given."""
        self.expected_s = 0.0
        """Seconds that the batch that started last was expected to take."""
        self._engine, self._planner, self._in_flight = engine, planner, in_flight
        self._metrics, self._clock = metrics, clock
        self._free_since = 0.0

    async def run(self, decision: Decision, now: float) -> None:
        """Run a batch; return when each of its requests has ended or waits for another try."""
        batch_size = sum(request.num_images for request in decision.requests)
        batch = [self._in_flight[request] for request in decision.requests]
        self.running = batch
        self.num_started += 1
        self.expected_s = self._planner.expected_s(decision)
        with harmless("observation of a dispatch", self._metrics.failures):
            self._observe_dispatch(decision, now)
        try:
            if decision.cascade is None:
                await self._run_variant(decision, batch, batch_size, now)
            else:
                await self._run_cascade(decision, batch, batch_size, now)
        except EngineDied as error:
            with harmless("count of a restart", self._metrics.failures):
                self._metrics.restarts.inc()
            self._requeue(batch, EngineRestarting(f"the engine died twice: {error}"))
        except Exception as error:
            self._isolate(batch, InternalError.logged(f"a batch of {len(batch)} failed", error))
        finally:
            self.running = []
            self._planner.on_engine_idle()
            if not self._planner.queue:
                self.was_idle = True

    async def _run_variant(
        self, decision: Decision, batch: list[PendingRequest], batch_size: int, now: float
    ) -> None:
        self._planner.on_batch_started(batch_size, decision.variant, now)
        result = await self._engine.forward(
            [request.images for request in decision.requests], decision.variant
        )
        self._free_since = self._clock()
        self.was_idle = False
        self._complete(batch, decision.variant, batch_size, now, result)

    async def _run_cascade(
        self, decision: Decision, batch: list[PendingRequest], batch_size: int, now: float
    ) -> None:
        """Run the first variant on all images, and the last one on those that are not sure."""
        self._planner.on_batch_started(batch_size, decision.variant, now, self.expected_s)
        run = CascadeRun(
            decision,
            batch,
            self._planner.cascades.temperatures,
            self._planner.latency.view,
            self._clock,
            partial(self._settle_stages, batch_size, now),
        )
        images = [request.images for request in decision.requests]
        result = await run_cascade(self._engine, images, *run.cascade.variants, run.select)
        self._free_since = self._clock()
        self.was_idle = False
        if len(result.first.logits) != batch_size:
            raise ValueError(f"logits: expected {batch_size} rows, got {len(result.first.logits)}")
        run.finish(result)
        self.num_answered += 1
        last_s = 0.0 if result.last is None else result.last.compute_s
        total_s = self._clock() - now - last_s
        asyncio.get_running_loop().call_soon(
            self._record_first, decision.first, batch_size, total_s, result.first
        )
        if result.last is not None:
            with harmless("observation of a batch", self._metrics.failures):
                self._metrics.observe_last_stage(len(result.rows), last_s)
                self._in_flight.statistics.add_batch(len(result.rows), last_s)

    def _settle_stages(self, batch_size: int, started: float, answers: list[StageAnswer]) -> None:
        """Answer requests whose stages have ended."""
        settled = BatchResult(self._clock(), [])
        quality = self._planner.quality
        for stage in answers:
            result, certainty = stage.result, stage.certainty
            variants = certainty.variants
            answer = ImageAnswer(
                result.logits,
                certainty.stages[-1],
                sum(quality[variant] for variant in variants) / len(variants),
                started - stage.pending.request.arrival,
                result.compute_s,
                batch_size,
                certainty,
            )
            assert result.finite is not None
            self._in_flight.settle_one(settled, stage.pending, answer, result.finite)
        self._in_flight.count_soon(settled)

    def _record_first(
        self, variant: int, batch_size: int, total_s: float, result: EngineResult
    ) -> None:
        """Learn from the first variant of a cascade."""
        self._record(BatchResult(0.0, []), variant, batch_size, total_s, result)

    async def wait_until_hung(self, limits: HangLimits) -> None:
        """Return when a batch has exceeded its limit, which is logged and counted."""
        batch, num_checks, limit_s = 0, 0, limits.floor_s
        while num_checks * limits.interval_s <= limit_s:
            await asyncio.sleep(limits.interval_s)
            is_same = bool(self.running) and self.num_started == batch
            batch, num_checks = self.num_started, num_checks + 1 if is_same else 0
            limit_s = limits.limit_s(self.expected_s)
        log.critical(
            "batch hangs requests=%d limit_s=%.1f expected_s=%.4f; the replica has to be replaced",
            len(self.running),
            limit_s,
            self.expected_s,
        )
        with harmless("count of a batch that hangs", self._metrics.failures):
            self._metrics.batch_hangs.inc()

    def _observe_dispatch(self, decision: Decision, now: float) -> None:
        """Count a batch that goes to the engine."""
        was_idle, self.was_idle = self.was_idle, True
        if not was_idle:
            self._metrics.turnaround.observe(self._clock() - self._free_since)
        self._metrics.observe_dispatch(decision.requests, now, len(self._planner.queue))

    def _complete(
        self,
        batch: list[PendingRequest],
        variant: int,
        batch_size: int,
        started: float,
        result: EngineResult,
    ) -> None:
        if len(result.logits) != batch_size:
            raise ValueError(f"logits: expected {batch_size} rows, got {len(result.logits)}")
        quality = self._planner.quality[variant]
        certify = partial(certainty_of, variant, cascades=self._planner.cascades)
        settled = self._in_flight.settle(batch, variant, quality, started, result, certify)
        self.num_answered += 1
        # The answers leave first: metrics and the latency model follow in the loop's next turn.
        total_s = settled.answered_at - started
        loop = asyncio.get_running_loop()
        loop.call_soon(self._record, settled, variant, batch_size, total_s, result)

    def _record(
        self,
        settled: BatchResult,
        variant: int,
        batch_size: int,
        total_s: float,
        result: EngineResult,
    ) -> None:
        """Count the answers and learn from the batch."""
        with harmless("observation of a batch", self._metrics.failures):
            self._learn(settled, variant, batch_size, total_s, result)

    def _learn(
        self,
        settled: BatchResult,
        variant: int,
        batch_size: int,
        total_s: float,
        result: EngineResult,
    ) -> None:
        self._in_flight.count(settled)
        for request, answer in settled.answers:
            self.on_answer(request, answer)
        latency = self._planner.latency
        tail = latency.view.tail
        error = self._planner.on_batch_finished(variant, batch_size, result.compute_s, total_s)
        self._metrics.observe_batch(
            variant, batch_size, result.compute_s, error, latency.view.slowdown, tail
        )
        self._in_flight.statistics.add_batch(batch_size, result.compute_s)

    def _requeue(self, batch: list[PendingRequest], final: RequestError) -> None:
        """Queue the requests again after the engine died; fail those that it died with before."""
        for pending in batch:
            if pending.engine_died:
                self._in_flight.fail(pending, final)
            elif pending in self._in_flight:
                pending.engine_died = True
                self._planner.requeue(pending.request)

    def _isolate(self, batch: list[PendingRequest], error: InternalError) -> None:
        """Retry the requests of a failed batch one by one, so that a bad request fails alone."""
        for pending in batch:
            if pending.batch_failed or len(batch) == 1:
                self._in_flight.fail(pending, error)
            elif pending in self._in_flight:
                pending.batch_failed = True
                self.isolated.append(pending)
