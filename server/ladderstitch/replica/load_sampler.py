"""What a replica tells the autoscaler: its load since it was last asked, read off its metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

from prometheus_client.metrics import MetricWrapperBase

from ladderstitch.hosting.registry import Host, HostedModel
from ladderstitch.replica.autoscaling import Load, Offer
from ladderstitch.telemetry.metrics import CALLERS_FAULT, Metrics

BATCH_ROWS = 8
"""A busy replica computes batches at least so large."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Counters since the replica's start."""

    requests: float
    met: float
    missed: float
    batches: float
    rows: float
    compute_s: float
    occupied_s: float

    def __sub__(self, earlier: Totals) -> Totals:
        return Totals(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


class Pressure:
    """Nothing on the way of a request: it only reads counters, once a second or less."""

    def __init__(
        self, host: Host, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._host, self._metrics, self._clock = host, metrics, clock
        self._at, self._last = clock(), self._totals()

    def sample(self) -> Load:
        """The load since the last call."""
        now, totals = self._clock(), self._totals()
        seconds, grown = max(now - self._at, 1e-9), totals - self._last
        self._at, self._last = now, totals
        judged = grown.met + grown.missed
        # a language model computes for a request from its first token to its last
        computing_s = grown.compute_s if self._host.models else grown.occupied_s
        return Load(
            demand_per_s=grown.requests / seconds,
            busy=computing_s / seconds,
            attainment=grown.met / judged if judged else 1.0,
            offers=self._offers(grown, totals),
        )

    def _offers(self, grown: Totals, totals: Totals) -> tuple[Offer, ...]:
        models = list(self._host.models.values())
        if models:
            seen = grown if grown.requests and grown.batches else totals
            rows = seen.rows / seen.requests if seen.requests else 1.0
            batch = seen.rows / seen.batches if seen.batches else 1.0
            return _offers_of(models[0], max(rows, 1.0), max(BATCH_ROWS, round(batch)))
        if not totals.requests:
            return ()
        return (Offer(totals.occupied_s / totals.requests, 1.0),)

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
            rows=_sum(metrics.batch, "_sum"),
            compute_s=_sum(metrics.compute_seconds, "_sum"),
            occupied_s=_sum(metrics.total_seconds, "_sum") - _sum(metrics.queue_seconds, "_sum"),
        )


def _offers_of(model: HostedModel, rows: float, batch: int) -> tuple[Offer, ...]:
    """The frontier's stitches: what a request of so many rows costs in a batch of such a size."""
    view, menu = model.scheduler.latency.view, model.scheduler.menu
    size = min(batch, view.max_rows)
    return tuple(
        Offer(rows * view.expected(stitch, size) / size, menu.quality[stitch])
        for stitch in menu.frontier
    )


def _samples(metric: MetricWrapperBase, suffix: str) -> Iterable[tuple[str, dict[str, str], float]]:
    for family in metric.collect():
        for sample in family.samples:
            if sample.name.endswith(suffix):
                yield sample.name, sample.labels, sample.value


def _sum(metric: MetricWrapperBase, suffix: str) -> float:
    return sum(value for _, _, value in _samples(metric, suffix))
