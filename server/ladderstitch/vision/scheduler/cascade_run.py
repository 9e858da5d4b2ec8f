"""The run of one batch on a cascade: who is sure after the first variant, and who goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ladderstitch.scheduling.cascades import Cascade, CascadeSet, row_confidences
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Certainty, Logits, StageEnd
from ladderstitch.vision.engine.base import CascadeResult, EngineResult, Rows, finite_rows
from ladderstitch.vision.scheduler.cascade_choice import select_in_time
from ladderstitch.vision.scheduler.in_flight import PendingRequest
from ladderstitch.vision.scheduler.policies.base import Decision


@dataclass(frozen=True, slots=True)
class StageAnswer:
    """The answer of a request when its stages have ended: its rows, and how sure they are."""

    pending: PendingRequest
    result: EngineResult
    certainty: Certainty


def certainty_of(variant: int, logits: Logits, cascades: CascadeSet) -> Certainty | None:
    """Return how sure a variant that ran alone is; None if it has no temperature."""
    temperature = cascades.temperatures.get(variant)
    if temperature is None:
        return None
    confidence = tuple(row_confidences(logits, temperature))
    return Certainty((variant,), confidence, (variant,) * len(logits))


class CascadeRun:
    """The requests of one batch on a cascade.

    `select` runs in the thread of the engine, between the variants. `answer` gets the requests that
    have ended with the first variant while the last one computes, in the event loop.
    """

    def __init__(
        self,
        decision: Decision,
        batch: Sequence[PendingRequest],
        temperatures: Mapping[int, float],
        latency: LatencyView,
        clock: Callable[[], float],
        answer: Callable[[list[StageAnswer]], None],
    ) -> None:
        assert decision.cascade is not None
        self.cascade: Cascade = decision.cascade
        self._latest_end, self._latency, self._clock = decision.latest_end, latency, clock
        self._temperatures, self._answer = temperatures, answer
        self._loop = asyncio.get_running_loop()
        ends = list(accumulate(pending.request.num_images for pending in batch))
        self._slices = [
            (pending, slice(end - pending.request.num_images, end))
            for pending, end in zip(batch, ends, strict=True)
        ]
        self._confidence: list[float] = []
        self._ended: list[StageAnswer] = []

    def select(self, first: EngineResult) -> Rows:
        """Return the rows that go on; the other requests are answered in the event loop."""
        confidence = row_confidences(first.logits, self._temperatures[self.cascade.first])
        self._confidence = confidence
        unsure = {
            pending.request: [
                row
                for row in range(rows.start, rows.stop)
                # NaN is not below: rows that are not finite fail in any case
                if confidence[row] < pending.request.min_confidence
            ]
            for pending, rows in self._slices
        }
        waiting = [(request, len(rows)) for request, rows in unsure.items() if rows]
        goes_on = (
            select_in_time(self.cascade, waiting, self._latency, self._clock(), self._latest_end)
            if waiting
            else []
        )
        for pending, rows in self._slices:
            if pending.request in goes_on:
                continue
            end: StageEnd = "time" if unsure[pending.request] else "sure"
            variants = (self.cascade.first,) * pending.request.num_images
            certainty = Certainty((self.cascade.first,), tuple(confidence[rows]), variants, end)
            self._ended.append(StageAnswer(pending, _rows_of(first, rows), certainty))
        if self._ended and goes_on:
            self._loop.call_soon_threadsafe(self._answer_ended)
        return np.array(sorted(row for request in goes_on for row in unsure[request]), np.intp)

    def finish(self, result: CascadeResult) -> None:
        """Answer all requests that have no answer yet."""
        self._answer_ended()
        if result.last is None:
            return
        first, last = self.cascade.variants
        logits = result.first.logits.copy()
        logits[result.rows] = result.last.logits
        went_on = set(result.rows.tolist())
        confidence = list(self._confidence)
        found = row_confidences(result.last.logits, self._temperatures[last])
        for row, value in zip(result.rows.tolist(), found, strict=True):
            confidence[row] = value
        compute_s = result.first.compute_s + result.last.compute_s
        merged = EngineResult(logits, compute_s)
        answers = []
        for pending, rows in self._slices:
            numbers = range(rows.start, rows.stop)
            if went_on.isdisjoint(numbers):
                continue
            variants = tuple(last if row in went_on else first for row in numbers)
            certainty = Certainty((first, last), tuple(confidence[rows]), variants)
            answers.append(StageAnswer(pending, _rows_of(merged, rows), certainty))
        self._answer(answers)

    def _answer_ended(self) -> None:
        ended, self._ended = self._ended, []
        if ended:
            self._answer(ended)


def _rows_of(result: EngineResult, rows: slice) -> EngineResult:
    logits = result.logits[rows]
    return EngineResult(logits, result.compute_s, finite_rows(logits))
