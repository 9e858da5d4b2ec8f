"""What Prometheus sees of a language model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ladderstitch.telemetry.metrics import CALLERS_FAULT, Metrics, ModelMetrics


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did: its path and how many sequences it ran, seconds of compute, actual over
    expected seconds, and the correction of the latency model after it."""

    path: int
    sequences: int
    compute_s: float
    error: float
    slowdown: float
    tail: float


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Requests that wait and that run, and the share of the cache's blocks in use."""

    waiting: int
    running: int
    cache_share: float


class TextMetrics(ModelMetrics):
    """What a language model counts besides."""

    def __init__(self, metrics: Metrics, model: str, paths: Iterable[int]) -> None:
        super().__init__(metrics, model, paths)
        self._tokens = metrics.generated_tokens.labels(model)
        self._reused = metrics.reused_tokens.labels(model)
        self._preempted = metrics.preemptions.labels(model)
        self._first = metrics.time_to_first_token_seconds.labels(model)
        self._gap = metrics.inter_token_latency_seconds.labels(model)
        self._cache = metrics.cache.labels(model)

    def stepped(self, step: StepReport, load: Occupancy) -> None:
        """A step is done."""
        self._queue.set(load.waiting)
        self.running.set(load.running)
        self._cache.set(load.cache_share)
        self.computed(
            step.path, step.sequences, step.compute_s, step.error, step.slowdown, step.tail
        )

    def preempted(self, sequences: int) -> None:
        """Sequences gave their blocks to others."""
        self._preempted.inc(sequences)

    def first_token(self, queue_s: float, seconds: float) -> None:
        """`seconds` from arrival, of which `queue_s` were spent waiting."""
        self._tokens.inc()
        self._queue_seconds.observe(queue_s)
        self._first.observe(seconds)

    def next_token(self, gap_s: float) -> None:
        """A further token, `gap_s` after the one before it."""
        self._tokens.inc()
        self._gap.observe(gap_s)

    def completed(
        self, path: int, quality: float | None, reused_tokens: int, total_s: float, met: bool | None
    ) -> None:
        """The last token was made; `met` is None without a budget."""
        self._ended(str(path), "OK")
        self._request_duration_seconds.observe(total_s)
        self._reused.inc(reused_tokens)
        if quality is not None:
            self._quality.observe(quality)
        if met is not None:
            (self._met if met else self._missed).inc()

    def refused(self, code: str, *, had_budget: bool) -> None:
        """A request ended with a status, before or after its first token."""
        self._ended("none", code)
        if had_budget and code not in CALLERS_FAULT:
            self._missed.inc()
