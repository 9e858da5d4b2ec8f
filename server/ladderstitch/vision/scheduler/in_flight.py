"""Accepted requests until they end: each exactly once, by an answer, an error or its caller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ladderstitch.errors import ExpiredInCompute, ExpiredInQueue, RequestError
from ladderstitch.scheduling.requests import Completion, Request
from ladderstitch.telemetry.metrics import VisionMetrics
from ladderstitch.vision.engine.base import EngineResult


@dataclass(slots=True, eq=False)
class PendingRequest:
    """An accepted request and where its answer goes.

    The scheduler sets `lost` when the engine died under it and `failed` when its batch raised: each
    earns one more try.
    """

    request: Request
    answer: asyncio.Future[Completion]
    lost: bool = False
    failed: bool = False


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What a batch answered, and when."""

    at: float
    answers: list[tuple[Request, Completion]]


class InFlightRequests:
    """Ending a request that has already ended is allowed and changes nothing."""

    def __init__(self, metrics: VisionMetrics, clock: Callable[[], float]) -> None:
        self.metrics = metrics
        self.clock = clock
        self.statistics = Statistics()
        self._open: dict[Request, PendingRequest] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, waiting: PendingRequest) -> bool:
        """Whether somebody still wants the answer."""
        # A caller that is cancelled in this turn of the event loop has cancelled the future, but
        # not called `leave` yet.
        return waiting.request in self._open and not waiting.answer.done()

    def __getitem__(self, request: Request) -> PendingRequest:
        return self._open[request]

    def add(self, request: Request) -> PendingRequest:
        """Accept a request; must be called in the event loop that awaits the answer."""
        waiting = PendingRequest(request, asyncio.get_running_loop().create_future())
        self._open[request] = waiting
        return waiting

    def all(self) -> list[PendingRequest]:
        """In order of acceptance."""
        return list(self._open.values())

    def settle(
        self,
        batch: Iterable[PendingRequest],
        variant: int,
        quality: float,
        started: float,
        result: EngineResult,
    ) -> BatchResult:
        """Give each request of a batch that started at `started` its batch_size of the result.

        What was answered is yet to be counted, by `count`.
        """
        settled = BatchResult(self.clock(), [])
        first, batch_size = 0, len(result.logits)
        for waiting in batch:
            request = waiting.request
            logits = result.logits[first : first + request.num_images]
            first += request.num_images
            if settled.at > request.deadlines.hard:
                self.expire_computing(waiting)
            elif self._close(waiting):
                queue_s = started - request.arrival
                completion = Completion(
                    logits, variant, quality, queue_s, result.compute_s, batch_size
                )
                waiting.answer.set_result(completion)
                settled.answers.append((request, completion))
        return settled

    def count(self, settled: BatchResult) -> None:
        """Metrics and statistics of what `settle` answered."""
        for request, completion in settled.answers:
            self.metrics.completed(request, completion, settled.at)
            self.statistics.answered(
                request.num_images,
                completion.queue_s,
                completion.compute_s,
                settled.at - request.arrival,
            )

    def expire_queued(self, requests: Iterable[Request], now: float) -> None:
        for request in requests:
            waited_ms = 1e3 * (now - request.arrival)
            error = ExpiredInQueue(
                f"the limit was out of reach after {waited_ms:.1f} ms in the queue"
            )
            self.fail(self[request], error)

    def expire_computing(self, waiting: PendingRequest) -> None:
        self.fail(waiting, ExpiredInCompute("the limit passed while computing"))

    def fail(self, waiting: PendingRequest, error: RequestError) -> None:
        if self._close(waiting):
            waiting.answer.set_exception(error)
            self.metrics.refused(error.code, waiting.request)
            self.statistics.fail.add(self.clock() - waiting.request.arrival)

    def remove(self, waiting: PendingRequest) -> bool:
        """The caller is gone; whether the request was still open.

        It counts as a missed budget only if the caller left because the time was up.
        """
        if self._open.pop(waiting.request, None) is None:
            return False
        late = self.clock() >= waiting.request.deadlines.soft
        self.metrics.refused("CANCELLED", waiting.request if late else None)
        return True

    def _close(self, waiting: PendingRequest) -> bool:
        """Whether it was open until now."""
        return waiting in self and self._open.pop(waiting.request, None) is not None


@dataclass(slots=True)
class Total:
    """How often and how long in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds


@dataclass(slots=True)
class Statistics:
    """Of one model; `inferences` counts images, `batches` is by batch size in batch_size."""

    success: Total = field(default_factory=Total)
    fail: Total = field(default_factory=Total)
    queue: Total = field(default_factory=Total)
    compute: Total = field(default_factory=Total)
    batches: dict[int, Total] = field(default_factory=dict)
    inferences: int = 0
    last_inference_ms: int = 0

    def computed(self, batch_size: int, seconds: float) -> None:
        self.batches.setdefault(batch_size, Total()).add(seconds)
        self.last_inference_ms = time.time_ns() // 1_000_000

    def answered(self, batch_size: int, queue_s: float, compute_s: float, total_s: float) -> None:
        self.inferences += batch_size
        self.success.add(total_s)
        self.queue.add(queue_s)
        self.compute.add(compute_s)
