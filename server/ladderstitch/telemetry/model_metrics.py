"""The metrics that models of every kind have, and those of an image model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from types import TracebackType

from prometheus_client import Counter

from ladderstitch.scheduling.requests import ImageAnswer, Request
from ladderstitch.telemetry.activity import RecentActivity, RecentAnswer
from ladderstitch.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

CALLER_ERROR_CODES = frozenset({"INVALID_ARGUMENT", "NOT_FOUND"})
"""Statuses that do not show whether a budget could have been met."""


class harmless:  # a context manager that is used like a function
    """A context in which recording and observing may fail: errors are logged and counted.

    An answer does not depend on whether it can be counted.
    """

    __slots__ = ("_failures", "_what")

    def __init__(self, what: str, failures: Counter) -> None:
        """Name the operation in the log by `what`, and count its errors in `failures`."""
        self._what, self._failures = what, failures

    def __enter__(self) -> None:
        """Enter the context."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        """Return true, which suppresses the error, unless it is an interrupt or a cancellation."""
        if not isinstance(error, Exception):
            return False
        log.error("%s failed", self._what, exc_info=error)
        self._failures.inc()
        return True


class ModelMetrics:
    """The metrics that models of every kind have.

    The children of `Metrics` for this model are looked up once, because `labels()` costs
    microseconds a call. `variants` are the ids that answers may name.
    """

    def __init__(self, metrics: Metrics, model: str, variants: Iterable[int]) -> None:
        self._all_requests, self._model = metrics.requests, model
        self._requests = {
            (str(variant), "OK"): metrics.requests.labels(model, str(variant), "OK")
            for variant in variants
        }
        self._slo_requests = {
            met: metrics.slo_requests.labels(model, str(met).lower()) for met in (True, False)
        }
        self._latency_predictions = {
            within: metrics.latency_predictions.labels(model, str(within).lower())
            for within in (True, False)
        }
        self._frontier_quality = {
            end: metrics.frontier_quality.labels(model, end) for end in ("fastest", "best", "floor")
        }
        self._switches = metrics.switches.labels(model)
        self._queue_requests = metrics.queue_requests.labels(model)
        self._latency_slowdown = metrics.latency_slowdown_ratio.labels(model)
        self._latency_tail = metrics.latency_tail_ratio.labels(model)
        self._latency_error = metrics.latency_actual_over_predicted_ratio.labels(model)
        self._queue_seconds = metrics.queue_seconds.labels(model)
        self._compute_seconds = metrics.compute_seconds.labels(model)
        self._request_duration_seconds = metrics.request_duration_seconds.labels(model)
        self._batch_size = metrics.batch_size.labels(model)
        self._served_quality = metrics.served_quality.labels(model)
        self._last_variant: int | None = None
        self.activity = RecentActivity() if metrics.keeps_activity else None
        """The record of the last minutes; None where no page shows it."""
        self.running = metrics.running_requests.labels(model)
        self.ready = metrics.model_ready.labels(model)
        self.restarts = metrics.engine_restarts.labels(model)
        self.dispatch_restarts = metrics.dispatch_restarts.labels(model)
        self.batch_hangs = metrics.batch_hangs.labels(model)
        self.non_finite_outputs = metrics.non_finite_outputs.labels(model)
        self.failures = metrics.telemetry_failures.labels(model)

    def set_quality_range(self, fastest: float, best: float, floor: float) -> None:
        """Set the quality of the fastest and of the best candidate, and the operator's floor."""
        for end, quality in (("fastest", fastest), ("best", best), ("floor", floor)):
            self._frontier_quality[end].set(quality)

    def set_queue_length(self, num_waiting: int) -> None:
        """Set the number of waiting requests."""
        self._queue_requests.set(num_waiting)
        if self.activity is not None:
            self.activity.set_queue_length(num_waiting)

    def observe_batch(
        self,
        variant: int,
        batch_size: int,
        compute_s: float,
        error: float,
        slowdown: float,
        tail: float,
    ) -> None:
        """Count a computed batch; `error` is its actual over its expected seconds.

        The batch was within the plan if `error` is at most `tail`.
        """
        self._latency_predictions[error <= tail].inc()
        self._batch_size.observe(batch_size)
        self._compute_seconds.observe(compute_s)
        self._latency_error.observe(error)
        self._latency_slowdown.set(slowdown)
        self._latency_tail.set(tail)
        if self._last_variant not in (None, variant):
            self._switches.inc()
        self._last_variant = variant

    def _count_request(self, variant: str, code: str) -> None:
        key = (variant, code)
        if key not in self._requests:
            self._requests[key] = self._all_requests.labels(self._model, variant, code)
        self._requests[key].inc()

    def _count_rejection(self, code: str, *, had_budget: bool) -> None:
        """Count a request without an answer; its budget is missed unless the caller is at fault."""
        self._count_request("none", code)
        is_missed = had_budget and code not in CALLER_ERROR_CODES
        if is_missed:
            self._count_budget(met=False)
        if self.activity is not None:
            self.activity.add_rejection(is_missed=is_missed)

    def _count_budget(self, *, met: bool) -> None:
        self._slo_requests[met].inc()


class VisionMetrics(ModelMetrics):
    """The metrics of one image model."""

    def __init__(self, metrics: Metrics, model: str, variants: Iterable[int]) -> None:
        super().__init__(metrics, model, variants)
        self._dispatch_slack_seconds = metrics.dispatch_slack_seconds.labels(model)
        self.turnaround = metrics.turnaround_seconds.labels(model)
        self._all = metrics
        self._cascade_answers = metrics.cascade_answers
        self._cascade_images = metrics.cascade_images.labels(model)

    def observe_audit(
        self,
        variant: int,
        seconds: float,
        *,
        agrees: bool,
        agreement: tuple[float, float, float],
        drifted: bool,
    ) -> None:
        """Count an audited image; `agreement` has the share and both ends of its interval."""
        model, name = self._model, str(variant)
        self._all.audited_images.labels(model, name, str(agrees).lower()).inc()
        self._all.audit_seconds.labels(model).inc(seconds)
        for end, share in zip(("mean", "low", "high"), agreement, strict=True):
            self._all.audit_agreement.labels(model, name, end).set(share)
        self._all.audit_drift.labels(model, name).set(int(drifted))

    def observe_last_stage(self, num_images: int, compute_s: float) -> None:
        """Count the images that went on to the last variant of a cascade."""
        self._cascade_images.inc(num_images)
        self._compute_seconds.observe(compute_s)

    def observe_dispatch(self, requests: Sequence[Request], now: float, num_waiting: int) -> None:
        """Count a batch that goes to the engine while `num_waiting` requests stay in the queue."""
        self.set_queue_length(num_waiting)
        for request in requests:
            self._queue_seconds.observe(now - request.arrival)
            if request.deadlines.soft != float("inf"):
                self._dispatch_slack_seconds.observe(request.deadlines.soft - now)

    def observe_completion(self, request: Request, completion: ImageAnswer, now: float) -> None:
        """Count an answered request."""
        self._count_request(str(completion.variant), "OK")
        self._request_duration_seconds.observe(now - request.arrival)
        self._served_quality.observe(completion.quality)
        if (certainty := completion.certainty) is not None:
            stages = "+".join(map(str, certainty.stages))
            self._cascade_answers.labels(self._model, stages, certainty.end).inc()
        soft, met = request.deadlines.soft, None
        if soft != float("inf"):
            met = now <= soft
            self._count_budget(met=met)
        if self.activity is not None:
            self.activity.add(
                RecentAnswer(
                    completion.variant,
                    completion.quality,
                    now - request.arrival,
                    met,
                    None if met is None else soft - request.arrival,
                )
            )

    def observe_rejection(self, code: str, request: Request | None = None) -> None:
        """Count a request that ended with a status instead of an answer.

        Its budget counts as missed unless the caller caused the error.
        """
        has_budget = request is not None and request.deadlines.soft != float("inf")
        self._count_rejection(code, had_budget=has_budget)
