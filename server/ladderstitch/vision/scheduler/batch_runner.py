"""One batch on the engine, from its decision to what becomes of each of its requests."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from ladderstitch.errors import EngineRestarting, InternalError, RequestError
from ladderstitch.telemetry.metrics import ImageMetrics
from ladderstitch.vision.engine.base import Engine, EngineDied, EngineResult
from ladderstitch.vision.scheduler.in_flight import Ledger, Settled, Waiting
from ladderstitch.vision.scheduler.planner import Planner
from ladderstitch.vision.scheduler.policies.base import Decision


class Batches:
    """Runs them one after the other; `running` is the present one, `alone` are survivors of a
    batch that failed, each to be run by itself."""

    def __init__(
        self,
        engine: Engine,
        planner: Planner,
        ledger: Ledger,
        metrics: ImageMetrics,
        clock: Callable[[], float],
    ) -> None:
        self.running: list[Waiting] = []
        self.alone: deque[Waiting] = deque()
        self.idled = True
        """Whether the engine was free last for want of work, or on purpose."""
        self._engine, self._planner, self._ledger = engine, planner, ledger
        self._metrics, self._clock = metrics, clock
        self._free_since = 0.0

    async def run(self, decision: Decision, now: float) -> None:
        """Returns when every request of it has an answer, an error or another try ahead."""
        rows = sum(request.rows for request in decision.requests)
        batch = [self._ledger[request] for request in decision.requests]
        self.running = batch
        self._planner.started(rows, decision.stitch, now)
        if not self.idled:
            self._metrics.turnaround.observe(self._clock() - self._free_since)
        self.idled = True
        self._metrics.dispatched(decision.requests, now, len(self._planner.queue))
        try:
            result = await self._engine.forward(
                [request.images for request in decision.requests], decision.stitch
            )
            self._free_since = self._clock()
            self.idled = False
            self._complete(batch, decision.stitch, rows, now, result)
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
        self, batch: list[Waiting], stitch: int, rows: int, started: float, result: EngineResult
    ) -> None:
        if len(result.logits) != rows:
            raise ValueError(f"logits: expected {rows} rows, got {len(result.logits)}")
        quality = self._planner.quality[stitch]
        settled = self._ledger.settle(batch, stitch, quality, started, result)
        # Answers go out first: books are kept in the loop's next turn.
        total_s = settled.at - started
        loop = asyncio.get_running_loop()
        loop.call_soon(self._account, settled, stitch, rows, total_s, result)

    def _account(
        self, settled: Settled, stitch: int, rows: int, total_s: float, result: EngineResult
    ) -> None:
        self._ledger.count(settled)
        latency = self._planner.latency
        tail = latency.view.tail
        error = self._planner.finished(stitch, rows, result.compute_s, total_s)
        self._metrics.computed(stitch, rows, result.compute_s, error, latency.view.slowdown, tail)
        self._ledger.statistics.computed(rows, result.compute_s)

    def _retry(self, batch: list[Waiting], final: RequestError) -> None:
        """Put the requests of a lost batch back; those lost before get the final error."""
        for waiting in batch:
            if waiting.lost:
                self._ledger.fail(waiting, final)
            elif waiting in self._ledger:
                waiting.lost = True
                self._planner.put_back(waiting.request)

    def _retry_alone(self, batch: list[Waiting], error: InternalError) -> None:
        """Run the requests of a failed batch one by one, so that a bad one fails alone."""
        for waiting in batch:
            if waiting.failed or len(batch) == 1:
                self._ledger.fail(waiting, error)
            elif waiting in self._ledger:
                waiting.failed = True
                self.alone.append(waiting)
