"""The accepted image requests that have not ended yet, and the statistics of those that have."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ladderstitch.errors import (
    ExpiredInCompute,
    ExpiredInQueue,
    NonFiniteOutput,
    RequestError,
)
from ladderstitch.scheduling.requests import Certainty, ImageAnswer, Logits, Mask, Request
from ladderstitch.telemetry.model_metrics import VisionMetrics, harmless
from ladderstitch.telemetry.statistics import Statistics
from ladderstitch.vision.engine.base import EngineResult, finite_rows

MAX_LISTED = 8
"""Maximum number of images that one error message lists."""


@dataclass(slots=True, eq=False)
class PendingRequest:
    """An accepted request and the future that receives its answer.

    Each of the two flags gives the request one more try.
    """

    request: Request
    answer: asyncio.Future[ImageAnswer]
    engine_died: bool = False
    """Whether the engine died once while it computed this request."""
    batch_failed: bool = False
    """Whether a batch with this request raised an error once."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The answers that a batch gave at the instant `answered_at`."""

    answered_at: float
    answers: list[tuple[Request, ImageAnswer]]


class InFlightRequests:
    """The accepted requests, each until it ends once: by an answer, an error or its caller.

    `settle`, `fail` and `cancel` are idempotent.
    """

    def __init__(self, metrics: VisionMetrics, clock: Callable[[], float]) -> None:
        self.metrics = metrics
        self.clock = clock
        self.statistics = Statistics()
        self._pending: dict[Request, PendingRequest] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, pending: PendingRequest) -> bool:
        """Return whether a caller still waits for the answer."""
        # A caller that is cancelled in this turn of the event loop has cancelled the future, but
        # `cancel` was not called yet.
        return pending.request in self._pending and not pending.answer.done()

    def __getitem__(self, request: Request) -> PendingRequest:
        return self._pending[request]

    def add(self, request: Request) -> PendingRequest:
        """Accept a request; call this in the event loop that awaits the answer."""
        pending = PendingRequest(request, asyncio.get_running_loop().create_future())
        self._pending[request] = pending
        return pending

    def all(self) -> list[PendingRequest]:
        """Return the requests in order of acceptance."""
        return list(self._pending.values())

    def settle(
        self,
        batch: Iterable[PendingRequest],
        variant: int,
        quality: float,
        started: float,
        result: EngineResult,
        certify: Callable[[Logits], Certainty | None] | None = None,
    ) -> BatchResult:
        """Give each request of a batch its part of the logits, [B, K] for its B images.

        `started` is the instant at which the batch started. The answers do not count in metrics and
        statistics until the result is passed to `count`. A request of finite inputs whose logits
        are not finite fails with `NonFiniteOutput`; the others of the batch keep theirs. `certify`
        says how sure the answers of requests with `min_confidence` are.
        """
        settled = BatchResult(self.clock(), [])
        first, batch_size = 0, len(result.logits)
        finite = finite_rows(result.logits) if result.finite is None else result.finite
        for pending in batch:
            rows = slice(first, first + pending.request.num_images)
            first += pending.request.num_images
            queue_s = started - pending.request.arrival
            part = result.logits[rows]
            certainty = certify(part) if certify and pending.request.min_confidence else None
            answer = ImageAnswer(
                part, variant, quality, queue_s, result.compute_s, batch_size, certainty
            )
            self.settle_one(settled, pending, answer, finite[rows])
        return settled

    def settle_one(
        self, settled: BatchResult, pending: PendingRequest, answer: ImageAnswer, finite: Mask
    ) -> None:
        """Give one request its answer, unless it has ended, is late or is not `finite` [B]."""
        if settled.answered_at > pending.request.deadlines.hard:
            self.expire_in_compute(pending)
        elif pending.request.is_finite and not finite.all():
            self._fail_non_finite(pending, finite)
        elif self._remove(pending):
            pending.answer.set_result(answer)
            settled.answers.append((pending.request, answer))

    def count(self, settled: BatchResult) -> None:
        """Count the answers of a batch in metrics and statistics."""
        for request, completion in settled.answers:
            self.metrics.observe_completion(request, completion, settled.answered_at)
            self.statistics.add_answer(
                request.num_images,
                completion.queue_s,
                completion.compute_s,
                settled.answered_at - request.arrival,
            )

    def count_soon(self, settled: BatchResult) -> None:
        """Count answers in the next turn of the event loop, so that they leave first."""
        asyncio.get_running_loop().call_soon(self._count_safely, settled)

    def _count_safely(self, settled: BatchResult) -> None:
        with harmless("count of answers", self.metrics.failures):
            self.count(settled)

    def expire_in_queue(self, requests: Iterable[Request], now: float) -> None:
        """Fail requests that were removed from the queue for their hard deadlines."""
        for request in requests:
            waited_ms = 1e3 * (now - request.arrival)
            error = ExpiredInQueue(
                f"the hard deadline is out of reach after {waited_ms:.1f} ms in the queue"
            )
            self.fail(self[request], error)

    def expire_in_compute(self, pending: PendingRequest) -> None:
        """Fail a request whose hard deadline passed while its batch ran or failed."""
        self.fail(pending, ExpiredInCompute("the hard deadline passed during compute"))

    def _fail_non_finite(self, pending: PendingRequest, finite: Mask) -> None:
        """Fail a request of which some images, those that are not `finite` [B], have no answer."""
        images = np.flatnonzero(~finite)
        listed = ", ".join(map(str, images[:MAX_LISTED]))
        self.fail(
            pending,
            NonFiniteOutput(
                f"outputs: expected finite numbers, got NaN or infinity for {len(images)} of "
                f"{len(finite)} images ({listed}); the input or the weights exceed the range of "
                "the number format that the model computes in"
            ),
        )
        with harmless("count of a non-finite output", self.metrics.failures):
            self.metrics.non_finite_outputs.inc()

    def fail(self, pending: PendingRequest, error: RequestError) -> None:
        """End a request with an error."""
        if self._remove(pending):
            pending.answer.set_exception(error)
            with harmless("count of a failed request", self.metrics.failures):
                self.metrics.observe_rejection(error.code, pending.request)
                self.statistics.fail.add(self.clock() - pending.request.arrival)

    def cancel(self, pending: PendingRequest) -> bool:
        """End a request whose caller was cancelled; return whether it had not ended before.

        The request counts as a missed budget only if its soft deadline has passed.
        """
        if self._pending.pop(pending.request, None) is None:
            return False
        late = self.clock() >= pending.request.deadlines.soft
        with harmless("count of a cancelled request", self.metrics.failures):
            self.metrics.observe_rejection("CANCELLED", pending.request if late else None)
        return True

    def _remove(self, pending: PendingRequest) -> bool:
        """Remove a request; return whether its caller still waited."""
        return pending in self and self._pending.pop(pending.request, None) is not None
