"""What a replica tells the autoscaler: its load since it was last asked, read off its metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

from prometheus_client.metrics import MetricWrapperBase

from ladderstitch.hosting.registry import ModelRegistry, VisionModel
from ladderstitch.replica.autoscaling import LoadSample, VariantCost
from ladderstitch.telemetry.metrics import CALLERS_FAULT, Metrics

BUSY_BATCH_SIZE = 8
"""A busy replica computes batches at least so large."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Counters since the replica's start."""

    requests: float
    met: float
    missed: float
    batches: float
    images: float
    compute_s: float
    occupied_s: float

    def __sub__(self, earlier: Totals) -> Totals:
        return Totals(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


class LoadSampler:
    """Nothing on the way of a request: it only reads counters, once a second or less."""

    def __init__(
        self, registry: ModelRegistry, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry, self._metrics, self._clock = registry, metrics, clock
        self._at, self._last = clock(), self._totals()

    def sample(self) -> LoadSample:
        """The load since the last call."""
        now, totals = self._clock(), self._totals()
        seconds, grown = max(now - self._at, 1e-9), totals - self._last
        self._at, self._last = now, totals
        judged = grown.met + grown.missed
        # a language model computes for a request from its first token to its last
        computing_s = grown.compute_s if self._registry.vision_models else grown.occupied_s
        return LoadSample(
            demand_per_s=grown.requests / seconds,
            busy=computing_s / seconds,
            attainment=grown.met / judged if judged else 1.0,
            offers=self._offers(grown, totals),
        )

    def _offers(self, grown: Totals, totals: Totals) -> tuple[VariantCost, ...]:
        models = list(self._registry.vision_models.values())
        if models:
            seen = grown if grown.requests and grown.batches else totals
            images = seen.images / seen.requests if seen.requests else 1.0
            batch = seen.images / seen.batches if seen.batches else 1.0
            return _offers_of(models[0], max(images, 1.0), max(BUSY_BATCH_SIZE, round(batch)))
        if not totals.requests:
            return ()
        return (VariantCost(totals.occupied_s / totals.requests, 1.0),)

    def _totals(self) -> Totals:
        metrics = self._metrics
        requests = sum(
            value
            for _, labels, value in _samples(metrics.requests, "_total")
            if labels["code"] not in CALLERS_FAULT
        )
        judged = {"true": 0.0, "false": 0.0}
        for _, labels, value in _samples(metrics.budgets, "_total"):
            judged[labels["met"]] += value
        return Totals(
            requests=requests,
            met=judged["true"],
            missed=judged["false"],
            batches=_sum(metrics.batch, "_count"),
            images=_sum(metrics.batch, "_sum"),
            compute_s=_sum(metrics.compute_seconds, "_sum"),
            occupied_s=_sum(metrics.request_duration_seconds, "_sum")
            - _sum(metrics.queue_seconds, "_sum"),
        )


def _offers_of(model: VisionModel, images: float, batch: int) -> tuple[VariantCost, ...]:
    """The frontier's variants: what a request of so many images costs in a batch of such a size."""
    view, candidates = model.scheduler.latency.view, model.scheduler.candidates
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
