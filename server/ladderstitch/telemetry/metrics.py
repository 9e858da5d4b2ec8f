"""The Prometheus metrics of a replica, counted when a request is queued, dispatched or ended."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from ladderstitch.telemetry.metrics_server import Probes, expose, metrics_pages
from ladderstitch.telemetry.process_metrics import ProcessCollector, define_build_info

SECONDS_BUCKETS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008),
    *(0.012, 0.016, 0.024, 0.032, 0.05, 0.075),
    *(0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
TOKEN_SECONDS_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25),
    *(0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0),
)
"""Seconds to a token of an answer, up to 10 minutes: dense where budgets of tokens lie."""
ANSWER_SECONDS_BUCKETS = (*SECONDS_BUCKETS, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Seconds of requests of both kinds: those of images, and whole answers of up to 10 minutes."""
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
SLACK_BUCKETS = (-1.0, -0.1, -0.02, -0.005, 0.0, *SECONDS_BUCKETS)
TURNAROUND_BUCKETS = (2e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1)
RATIO_BUCKETS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0, 3.0, 5.0)
BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUALITY_BUCKETS = (
    *(0.5, 0.6, 0.7, 0.75, 0.8, 0.82, 0.84, 0.86, 0.88),
    *(0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0),
)


class Metrics:
    """All metrics of one replica, in a registry of their own.

    Several replicas in a process, and tests, do not share counts. An attribute has the name of its
    metric without the prefix `ladderstitch_`. Labels are bounded: `model` and `variant` only take
    values that were registered, and `code` is the name of a gRPC status.
    """

    def __init__(self, *, keeps_activity: bool = False) -> None:
        """With `keeps_activity`, each model also records what it did in the last minutes."""
        self.keeps_activity = keeps_activity
        self.registry = CollectorRegistry()
        self.build_info = define_build_info(self.registry)
        self._counts_processes = False
        self._counter = partial(Counter, registry=self.registry, namespace="ladderstitch")
        self._gauge = partial(Gauge, registry=self.registry, namespace="ladderstitch")
        self._histogram = partial(Histogram, registry=self.registry, namespace="ladderstitch")
        self._define_request_metrics()
        self._define_state_metrics()
        self._define_batch_metrics()
        self._define_text_metrics()
        self.event_loop_lag_seconds = self._histogram(
            "event_loop_lag_seconds",
            "Delay of a task that wakes up ten times a second.",
            buckets=LAG_BUCKETS,
        )

    def _define_request_metrics(self) -> None:
        self.requests = self._counter(
            "requests", "Requests ended, by variant and status.", ["model", "variant", "code"]
        )
        self.slo_requests = self._counter(
            "slo_requests",
            "Requests with a budget ended, by whether it was met.",
            ["model", "met"],
        )
        self.denied_calls = self._counter(
            "denied_calls", "Calls denied for their token, its scope or its limits.", ["reason"]
        )
        self.queue_seconds = self._histogram(
            "queue_seconds", "Arrival to dispatch.", ["model"], buckets=ANSWER_SECONDS_BUCKETS
        )
        self.request_duration_seconds = self._histogram(
            "request_duration_seconds",
            "Arrival to answer.",
            ["model"],
            buckets=ANSWER_SECONDS_BUCKETS,
        )
        self.served_quality = self._histogram(
            "served_quality",
            "Calibrated quality of the variant that answered.",
            ["model"],
            buckets=QUALITY_BUCKETS,
        )
        self.dispatch_slack_seconds = self._histogram(
            "dispatch_slack_seconds",
            "Soft deadline minus time of dispatch.",
            ["model"],
            buckets=SLACK_BUCKETS,
        )

        self.cascade_answers = self._counter(
            "cascade_answers",
            "Answers with a minimum confidence, by the variants that ran and why they ended: sure, "
            "complete, or time.",
            ["model", "stages", "end"],
        )
        variant = ["model", "variant"]
        self.audited_images = self._counter(
            "audited_images",
            "Answered images that ran again on the best variant, by whether both agree.",
            [*variant, "agrees"],
        )
        self.audit_seconds = self._counter(
            "audit_seconds", "Idle time in which answered images ran again.", ["model"]
        )
        self.audit_agreement = self._gauge(
            "audit_agreement",
            "Agreement of the last 1,000 audited images with the best variant, and the ends of its "
            "95 % interval.",
            [*variant, "end"],
        )
        self.audit_drift = self._gauge(
            "audit_drift",
            "1 while the audited agreement of a variant is below the calibrated one, else 0.",
            variant,
        )
        self.cascade_images = self._counter(
            "cascade_images", "Images that went on to the last variant of a cascade.", ["model"]
        )

    def _define_state_metrics(self) -> None:
        model = ["model"]
        self.model_ready = self._gauge(
            "model_ready", "1 while the model answers requests, else 0.", model
        )
        self.queue_requests = self._gauge("queue_requests", "Requests that wait.", model)
        self.running_requests = self._gauge(
            "running_requests", "Requests that are being computed.", model
        )
        self.kv_cache_usage_ratio = self._gauge(
            "kv_cache_usage_ratio", "Share of the KV cache blocks in use.", model
        )
        self.frontier_quality = self._gauge(
            "frontier_quality",
            "Quality of the fastest and of the best variant, and the operator's floor.",
            ["model", "end"],
        )
        self.latency_slowdown_ratio = self._gauge(
            "latency_slowdown_ratio", "Latency on this machine over the profile.", model
        )
        self.latency_tail_ratio = self._gauge(
            "latency_tail_ratio", "Latency at the planned quantile over expected latency.", model
        )

    def _define_batch_metrics(self) -> None:
        model = ["model"]
        self.batch_size = self._histogram(
            "batch_size", "Images or sequences of a batch.", model, buckets=BATCH_SIZE_BUCKETS
        )
        self.compute_seconds = self._histogram(
            "compute_seconds", "Compute time of a batch.", model, buckets=ANSWER_SECONDS_BUCKETS
        )
        self.turnaround_seconds = self._histogram(
            "turnaround_seconds",
            "End of a batch to dispatch of the next one, while requests wait.",
            model,
            buckets=TURNAROUND_BUCKETS,
        )
        self.latency_predictions = self._counter(
            "latency_predictions",
            "Batches, by whether they took at most the planned quantile.",
            ["model", "within_plan"],
        )
        self.latency_actual_over_predicted_ratio = self._histogram(
            "latency_actual_over_predicted_ratio",
            "Compute time of a batch over its prediction.",
            model,
            buckets=RATIO_BUCKETS,
        )
        self.switches = self._counter(
            "variant_switches", "Batches on another variant than the batch before.", model
        )
        self.engine_restarts = self._counter(
            "engine_restarts", "Workers and ranks that died and were replaced.", model
        )
        self.dispatch_restarts = self._counter(
            "dispatch_restarts", "Dispatch loops that failed and were started again.", model
        )
        self.batch_hangs = self._counter(
            "batch_hangs", "Batches that did not return, so that the replica ended.", model
        )
        self.non_finite_outputs = self._counter(
            "non_finite_outputs", "Requests whose outputs were infinite or not a number.", model
        )
        self.telemetry_failures = self._counter(
            "telemetry_failures", "Records and observations that failed.", model
        )

    def _define_text_metrics(self) -> None:
        model = ["model"]
        self.time_to_first_token_seconds = self._histogram(
            "time_to_first_token_seconds",
            "Arrival to the first token.",
            model,
            buckets=TOKEN_SECONDS_BUCKETS,
        )
        self.inter_token_latency_seconds = self._histogram(
            "inter_token_latency_seconds",
            "Time between two tokens of an answer.",
            model,
            buckets=TOKEN_SECONDS_BUCKETS,
        )
        self.generated_tokens = self._counter(
            "generated_tokens", "Tokens delivered to callers.", model
        )
        self.prefix_cache_hit_tokens = self._counter(
            "prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache.", model
        )
        self.preemptions = self._counter(
            "preemptions", "Sequences whose cache blocks were given to others.", model
        )
        self.variant_changes = self._counter(
            "variant_changes", "Answers that went on with another variant.", model
        )
        self.variant_tokens = self._counter(
            "variant_tokens", "Tokens of complete answers, by variant.", ["model", "variant"]
        )
        self.translated_tokens = self._counter(
            "translated_tokens", "Cached tokens that were translated for another variant.", model
        )
        self.repaired_tokens = self._counter(
            "repaired_tokens", "Translated tokens that were computed again in idle time.", model
        )
        self.repair_seconds = self._counter(
            "repair_seconds", "Idle time in which translated tokens were computed again.", model
        )

    def remove_model(self, model: str) -> None:
        """Remove all series of a model that was unloaded."""
        for metric in vars(self).values():
            if isinstance(metric, MetricWrapperBase) and "model" in metric._labelnames:
                metric.remove_by_labels({"model": model})

    def observe_denial(self, reason: str) -> None:
        """Count a call that was denied before it reached a model."""
        self.denied_calls.labels(reason).inc()

    def expose(
        self, port: int, address: str, *, share_port: bool = False, probes: Probes | None = None
    ) -> tuple[int, Callable[[], None]]:
        """Serve `/metrics` and probes; return the bound port and a function that stops the server.

        Port 0 binds a free port. With `share_port` a rolling replacement may listen on the same
        port as its predecessor for a while. Raises `OSError` if the port is taken.
        """
        if not self._counts_processes:
            self.registry.register(ProcessCollector())
            self._counts_processes = True
        pages = metrics_pages(self.registry, probes or Probes())
        return expose(pages, port, address, share_port=share_port)
