"""One batch on the engine, from its decision to what becomes of each of its requests."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from ladderstitch.errors import EngineRestarting, InternalError, RequestError
from ladderstitch.telemetry.metrics import VisionMetrics
from ladderstitch.vision.engine.base import Engine, EngineDied, EngineResult
from ladderstitch.vision.scheduler.in_flight import BatchResult, InFlightRequests, PendingRequest
from ladderstitch.vision.scheduler.planner import Planner
from ladderstitch.vision.scheduler.policies.base import Decision


class BatchRunner:
    """Runs them one after the other; `running` is the present one, `alone` are survivors of a
    batch that failed, each to be run by itself."""

    def __init__(
        self,
        engine: Engine,
        planner: Planner,
        in_flight: InFlightRequests,
        metrics: VisionMetrics,
        clock: Callable[[], float],
    ) -> None:
        self.running: list[PendingRequest] = []
        self.alone: deque[PendingRequest] = deque()
        self.idled = True
        """Whether the engine was free last for want of work, or on purpose."""
        self._engine, self._planner, self._in_flight = engine, planner, in_flight
        self._metrics, self._clock = metrics, clock
        self._free_since = 0.0

    async def run(self, decision: Decision, now: float) -> None:
        """Returns when every request of it has an answer, an error or another try ahead."""
        batch_size = sum(request.num_images for request in decision.requests)
        batch = [self._in_flight[request] for request in decision.requests]
        self.running = batch
        self._planner.started(batch_size, decision.variant, now)
        if not self.idled:
            self._metrics.turnaround.observe(self._clock() - self._free_since)
        self.idled = True
        self._metrics.dispatched(decision.requests, now, len(self._planner.queue))
        try:
            result = await self._engine.forward(
                [request.images for request in decision.requests], decision.variant
            )
            self._free_since = self._clock()
            self.idled = False
            self._complete(batch, decision.variant, batch_size, now, result)
        except EngineDied as error:
            self._metrics.restarts.inc()
            self._retry(batch, EngineRestarting(f"the engine was lost twice: {error}"))
        except Exception as error:
            self._retry_alone(batch, InternalError.logged(f"a batch of {len(batch)} failed", error))
        finally:
            self.running = []
            self._planner.free()
            if not self._planner.queue:
                self.idled = True

    def _complete(
        self,
        batch: list[PendingRequest],
        variant: int,
        batch_size: int,
        started: float,
        result: EngineResult,
    ) -> None:
        if len(result.logits) != batch_size:
            raise ValueError(f"logits: expected {batch_size} batch_size, got {len(result.logits)}")
        quality = self._planner.quality[variant]
        settled = self._in_flight.settle(batch, variant, quality, started, result)
        # Answers go out first: books are kept in the loop's next turn.
        total_s = settled.at - started
        loop = asyncio.get_running_loop()
        loop.call_soon(self._account, settled, variant, batch_size, total_s, result)

    def _account(
        self,
        settled: BatchResult,
        variant: int,
        batch_size: int,
        total_s: float,
        result: EngineResult,
    ) -> None:
        self._in_flight.count(settled)
        latency = self._planner.latency
        tail = latency.view.tail
        error = self._planner.finished(variant, batch_size, result.compute_s, total_s)
        self._metrics.computed(
            variant, batch_size, result.compute_s, error, latency.view.slowdown, tail
        )
        self._in_flight.statistics.computed(batch_size, result.compute_s)

    def _retry(self, batch: list[PendingRequest], final: RequestError) -> None:
        """Put the requests of a lost batch back; those lost before get the final error."""
        for waiting in batch:
            if waiting.lost:
                self._in_flight.fail(waiting, final)
            elif waiting in self._in_flight:
                waiting.lost = True
                self._planner.requeue(waiting.request)

    def _retry_alone(self, batch: list[PendingRequest], error: InternalError) -> None:
        """Run the requests of a failed batch one by one, so that a bad one fails alone."""
        for waiting in batch:
            if waiting.failed or len(batch) == 1:
                self._in_flight.fail(waiting, error)
            elif waiting in self._in_flight:
                waiting.failed = True
                self.alone.append(waiting)
