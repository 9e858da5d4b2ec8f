"""What Prometheus sees. Three seams: a request is queued or refused, dispatched, completed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from ladderstitch.scheduling.requests import Completion, Request
from ladderstitch.telemetry.metrics_server import expose

SECONDS = (
    0.0005,
    0.001,
    0.0015,
    0.002,
    0.003,
    0.004,
    0.006,
    0.008,
    0.012,
    0.016,
    0.024,
    0.032,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
SLACK = (-1.0, -0.1, -0.02, -0.005, 0.0, *SECONDS)
ERROR = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0, 3.0, 5.0)
CALLERS_FAULT = frozenset({"INVALID_ARGUMENT", "NOT_FOUND"})
"""Statuses that say nothing about whether a budget could have been met."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUALITY = (
    0.5,
    0.6,
    0.7,
    0.75,
    0.8,
    0.82,
    0.84,
    0.86,
    0.88,
    0.9,
    0.91,
    0.92,
    0.93,
    0.94,
    0.95,
    0.96,
    0.97,
    0.98,
    0.99,
    1.0,
)


class Metrics:
    """One registry, so that several replicas in a process, and tests, do not meet.

    Labels are bounded: `model` and `variant` only take values that were registered, `code` is a gRPC
    status name.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry, namespace="ladderstitch")
        gauge = partial(Gauge, registry=self.registry, namespace="ladderstitch")
        histogram = partial(Histogram, registry=self.registry, namespace="ladderstitch")
        model = ["model"]
        self.requests = counter(
            "requests", "Requests ended, by variant and status.", ["model", "variant", "code"]
        )
        self.budgets = counter(
            "slo_requests", "Requests with a target ended, by whether it was met.", ["model", "met"]
        )
        self.denials = counter(
            "denied_calls", "Calls refused by token, scope or a token's limits.", ["reason"]
        )
        self.switches = counter("switches", "Batches on another variant than the last.", model)
        self.restarts = counter("engine_restarts", "Workers and ranks lost and replaced.", model)
        self.queue = gauge("queue_requests", "Requests that wait.", model)
        self.running = gauge("running_requests", "Requests that are being computed.", model)
        self.cache = gauge(
            "kv_cache_usage_ratio", "Of the tokens that the cache holds, those taken.", model
        )
        self.frontier = gauge(
            "frontier_quality",
            "Quality of the fastest and of the best variant, and the operator's floor.",
            ["model", "end"],
        )
        self.ready = gauge("model_ready", "1 when the model answers requests.", model)
        self.slowdown = gauge("latency_slowdown_ratio", "This machine over the profile.", model)
        self.tail = gauge("latency_tail_ratio", "Planned quantile over expected latency.", model)
        self.slack = histogram(
            "dispatch_slack_seconds", "Target minus time of dispatch.", model, buckets=SLACK
        )
        self.queue_seconds = histogram(
            "queue_seconds", "Arrival to dispatch.", model, buckets=SECONDS
        )
        self.compute_seconds = histogram(
            "compute_seconds", "Computing a batch.", model, buckets=SECONDS
        )
        self.request_duration_seconds = histogram(
            "request_duration_seconds", "Arrival to answer.", model, buckets=SECONDS
        )
        self.batch = histogram("batch_size", "Rows of a batch.", model, buckets=ROWS)
        self.quality = histogram(
            "served_quality", "Calibrated quality of the variant served.", model, buckets=QUALITY
        )
        self.generated_tokens = counter("generated_tokens", "Tokens handed to callers.", model)
        self.reused_tokens = counter(
            "prefix_cache_hit_tokens", "Tokens of prompts that were in the cache already.", model
        )
        self.preemptions = counter(
            "preemptions", "Answers that gave their cache to others and computed anew.", model
        )
        self.time_to_first_token_seconds = histogram(
            "time_to_first_token_seconds", "Arrival to the first token.", model, buckets=SECONDS
        )
        self.inter_token_latency_seconds = histogram(
            "inter_token_latency_seconds",
            "Between two tokens of an answer.",
            model,
            buckets=SECONDS,
        )
        self.turnaround = histogram(
            "turnaround_seconds",
            "Engine free to next batch handed to it, while requests wait.",
            model,
            buckets=(2e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1),
        )
        self.planned = counter(
            "latency_predictions",
            "Batches, by whether they kept within the quantile planned with.",
            ["model", "within_plan"],
        )
        self.error = histogram(
            "latency_actual_over_predicted_ratio",
            "Compute time over its prediction, a batch each.",
            model,
            buckets=ERROR,
        )

    def denied(self, reason: str) -> None:
        """A call was refused before it reached a model."""
        self.denials.labels(reason).inc()

    def expose(
        self, port: int, address: str, *, share_port: bool = False
    ) -> tuple[int, Callable[[], None]]:
        """Serve `/metrics`; the bound port (0 takes a free one) and a function that stops it.

        With `share_port` a rolling replacement may listen beside its predecessor for a while.
        """
        return expose(make_wsgi_app(self.registry), port, address, share_port=share_port)


class ModelMetrics:
    """What models of every kind count: one model's children of `Metrics`, looked up once, because
    `labels()` costs microseconds a call.

    `variants` are the ids that answers may name as their variant or path.
    """

    def __init__(self, metrics: Metrics, model: str, variants: Iterable[int]) -> None:
        self._all_requests, self._model = metrics.requests, model
        self._requests = {
            (str(variant), "OK"): metrics.requests.labels(model, str(variant), "OK")
            for variant in variants
        }
        self._met = metrics.budgets.labels(model, "true")
        self._missed = metrics.budgets.labels(model, "false")
        self._kept = metrics.planned.labels(model, "true")
        self._overrun = metrics.planned.labels(model, "false")
        self._switches = metrics.switches.labels(model)
        self._queue = metrics.queue.labels(model)
        self._slowdown = metrics.slowdown.labels(model)
        self._tail = metrics.tail.labels(model)
        self._queue_seconds = metrics.queue_seconds.labels(model)
        self._compute_seconds = metrics.compute_seconds.labels(model)
        self._request_duration_seconds = metrics.request_duration_seconds.labels(model)
        self._batch = metrics.batch.labels(model)
        self._quality = metrics.quality.labels(model)
        self._error = metrics.error.labels(model)
        self._frontier = {
            end: metrics.frontier.labels(model, end) for end in ("fastest", "best", "floor")
        }
        self._last_variant: int | None = None
        self.running = metrics.running.labels(model)
        self.ready = metrics.ready.labels(model)
        self.restarts = metrics.restarts.labels(model)

    def offered(self, fastest: float, best: float, floor: float) -> None:
        """The qualities that requests may get from now on."""
        for end, quality in (("fastest", fastest), ("best", best), ("floor", floor)):
            self._frontier[end].set(quality)

    def queued(self, waiting: int) -> None:
        """A request was admitted, or left the queue otherwise than in a batch."""
        self._queue.set(waiting)

    def computed(
        self, variant: int, batch: int, compute_s: float, error: float, slowdown: float, tail: float
    ) -> None:
        """A batch came back: `error` is actual over predicted seconds, `tail` what was allowed."""
        (self._kept if error <= tail else self._overrun).inc()
        self._batch.observe(batch)
        self._compute_seconds.observe(compute_s)
        self._error.observe(error)
        self._slowdown.set(slowdown)
        self._tail.set(tail)
        if self._last_variant not in (None, variant):
            self._switches.inc()
        self._last_variant = variant

    def _ended(self, variant: str, code: str) -> None:
        key = (variant, code)
        if key not in self._requests:
            self._requests[key] = self._all_requests.labels(self._model, variant, code)
        self._requests[key].inc()


class VisionMetrics(ModelMetrics):
    """What an image model counts besides."""

    def __init__(self, metrics: Metrics, model: str, variants: Iterable[int]) -> None:
        super().__init__(metrics, model, variants)
        self._slack = metrics.slack.labels(model)
        self.turnaround = metrics.turnaround.labels(model)

    def dispatched(self, requests: Sequence[Request], now: float, waiting: int) -> None:
        """A batch goes to the engine, and `waiting` requests stay behind."""
        self._queue.set(waiting)
        for request in requests:
            self._queue_seconds.observe(now - request.arrival)
            if request.deadlines.soft != float("inf"):
                self._slack.observe(request.deadlines.soft - now)

    def completed(self, request: Request, completion: Completion, now: float) -> None:
        """A request was answered."""
        self._ended(str(completion.variant), "OK")
        self._request_duration_seconds.observe(now - request.arrival)
        self._quality.observe(completion.quality)
        if request.deadlines.soft != float("inf"):
            (self._met if now <= request.deadlines.soft else self._missed).inc()

    def refused(self, code: str, request: Request | None = None) -> None:
        """A request ended with a status instead of an answer; its budget counts as missed."""
        self._ended("none", code)
        if request is None or code in CALLERS_FAULT:
            return
        if request.deadlines.soft != float("inf"):
            self._missed.inc()
