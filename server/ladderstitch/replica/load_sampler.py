"""Load samples for the autoscaler, computed from the replica's own metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

from prometheus_client.metrics import MetricWrapperBase

from ladderstitch.hosting.registry import ModelRegistry, VisionModel
from ladderstitch.replica.autoscaling import LoadSample, VariantCost
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.model_metrics import CALLER_ERROR_CODES

BUSY_BATCH_SIZE = 8
"""Smallest batch size that the cost of a variant is estimated for: a busy replica fills it."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Counters since the replica's start."""

    requests: float
    """Requests that ended, except those that were invalid."""
    met: float
    """Requests with a soft deadline that were answered in time."""
    missed: float
    """Requests with a soft deadline that were late or failed."""
    batches: float
    images: float
    compute_s: float
    """Seconds of compute, summed over batches."""
    active_s: float
    """Seconds from dispatch to answer, summed over requests."""

    def __sub__(self, earlier: Totals) -> Totals:
        """Return the difference; zero where a model was unloaded, which takes its counts along."""
        return Totals(
            *(max(0.0, getattr(self, f.name) - getattr(earlier, f.name)) for f in fields(self))
        )


class LoadSampler:
    """Reader of a replica's counters, about once a second; requests never wait for it."""

    def __init__(
        self, registry: ModelRegistry, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry, self._metrics, self._clock = registry, metrics, clock
        self._sampled_at, self._last = clock(), self._read_totals()

    def sample(self) -> LoadSample:
        """Return the load since the last call, or since the creation of the sampler."""
        now, totals = self._clock(), self._read_totals()
        seconds, delta = max(now - self._sampled_at, 1e-9), totals - self._last
        self._sampled_at, self._last = now, totals
        with_budget = delta.met + delta.missed
        # a language model computes for a request from its first token to its last
        compute_s = delta.compute_s if self._registry.vision_models else delta.active_s
        return LoadSample(
            demand_per_s=delta.requests / seconds,
            utilization=compute_s / seconds,
            attainment=delta.met / with_budget if with_budget else 1.0,
            variants=self._variant_costs(delta, totals),
        )

    def _variant_costs(self, delta: Totals, totals: Totals) -> tuple[VariantCost, ...]:
        """Return the cost per request of each variant; empty before the first text request."""
        models = list(self._registry.vision_models.values())
        if models:
            seen = delta if delta.requests and delta.batches else totals
            images = seen.images / seen.requests if seen.requests else 1.0
            batch = seen.images / seen.batches if seen.batches else 1.0
            return _vision_costs(models[0], max(images, 1.0), max(BUSY_BATCH_SIZE, round(batch)))
        if not totals.requests:
            return ()
        return (VariantCost(totals.active_s / totals.requests, 1.0),)

    def _read_totals(self) -> Totals:
        metrics = self._metrics
        requests = sum(
            value
            for _, labels, value in _samples(metrics.requests, "_total")
            if labels["code"] not in CALLER_ERROR_CODES
        )
        budgets = {"true": 0.0, "false": 0.0}
        for _, labels, value in _samples(metrics.slo_requests, "_total"):
            budgets[labels["met"]] += value
        return Totals(
            requests=requests,
            met=budgets["true"],
            missed=budgets["false"],
            batches=_sum(metrics.batch_size, "_count"),
            images=_sum(metrics.batch_size, "_sum"),
            compute_s=_sum(metrics.compute_seconds, "_sum"),
            active_s=_sum(metrics.request_duration_seconds, "_sum")
            - _sum(metrics.queue_seconds, "_sum"),
        )


def _vision_costs(model: VisionModel, images: float, batch: int) -> tuple[VariantCost, ...]:
    """Return the cost of the frontier's variants, fastest first.

    A request has `images` images and runs in batches of size `batch`.
    """
    view, candidates = model.scheduler.planner.latency.view, model.scheduler.planner.candidates
    size = min(batch, view.max_batch_size)
    return tuple(
        VariantCost(images * view.expected(variant, size) / size, candidates.quality[variant])
        for variant in candidates.frontier
    )


def _samples(metric: MetricWrapperBase, suffix: str) -> Iterable[tuple[str, dict[str, str], float]]:
    for family in metric.collect():
        for sample in family.samples:
            if sample.name.endswith(suffix):
                yield sample.name, sample.labels, sample.value


def _sum(metric: MetricWrapperBase, suffix: str) -> float:
    return sum(value for _, _, value in _samples(metric, suffix))
