"""What Prometheus sees of a language model."""

from __future__ import annotations

from collections.abc import Sequence

from ladderstitch.generation.generator import Generator
from ladderstitch.generation.planning import Plan
from ladderstitch.generation.request import Answer
from ladderstitch.metrics import CALLERS_FAULT, Metrics


class TextMetrics:
    """One model's children of `Metrics`, looked up once; an `Observer` of its generator."""

    def __init__(self, metrics: Metrics, model: str, paths: Sequence[str]) -> None:
        self._requests, self._model = metrics.requests, model
        self._met = metrics.budgets.labels(model, "true")
        self._missed = metrics.budgets.labels(model, "false")
        self._queue = metrics.queue.labels(model)
        self._queue_seconds = metrics.queue_seconds.labels(model)
        self._total_seconds = metrics.total_seconds.labels(model)
        self._compute_seconds = metrics.compute_seconds.labels(model)
        self._batch = metrics.batch.labels(model)
        self._quality = metrics.quality.labels(model)
        self._error = metrics.error.labels(model)
        self._slowdown = metrics.slowdown.labels(model)
        self._tail = metrics.tail.labels(model)
        self._switches = metrics.switches.labels(model)
        self._frontier = {
            end: metrics.frontier.labels(model, end) for end in ("fastest", "best", "floor")
        }
        self._kept = metrics.planned.labels(model, "true")
        self._overrun = metrics.planned.labels(model, "false")
        self._tokens = metrics.generated_tokens.labels(model)
        self._reused = metrics.reused_tokens.labels(model)
        self._preempted = metrics.preemptions.labels(model)
        self._first = metrics.first_token_seconds.labels(model)
        self._gap = metrics.token_gap_seconds.labels(model)
        self._running = metrics.running.labels(model)
        self._cache = metrics.cache.labels(model)
        self.ready = metrics.ready.labels(model)
        self.restarts = metrics.restarts.labels(model)
        self._last_path: int | None = None
        for path in range(len(paths)):
            metrics.requests.labels(model, str(path), "OK")

    def offered(self, fastest: float, best: float, floor: float) -> None:
        """The qualities that requests may get from now on."""
        for end, quality in (("fastest", fastest), ("best", best), ("floor", floor)):
            self._frontier[end].set(quality)

    def counted(self, generator: Generator) -> None:
        """Who waits, who is computed on, how full the cache is."""
        self._queue.set(generator.waiting)
        self._running.set(generator.running)
        self._cache.set(generator.cache_share)

    def stepped(self, generator: Generator, plan: Plan, seconds: float, error: float) -> None:
        self.counted(generator)
        view = generator.times.table.view
        (self._kept if error <= view.tail else self._overrun).inc()
        self._batch.observe(len(plan.parts))
        self._compute_seconds.observe(seconds)
        self._error.observe(error)
        self._slowdown.set(view.slowdown)
        self._tail.set(view.tail)
        if self._last_path not in (None, plan.path):
            self._switches.inc()
        self._last_path = plan.path

    def preempted(self, sequences: int) -> None:
        self._preempted.inc(sequences)

    def first_token(self, queue_s: float, seconds: float) -> None:
        """`seconds` from arrival, of which `queue_s` were spent waiting."""
        self._tokens.inc()
        self._queue_seconds.observe(queue_s)
        self._first.observe(seconds)

    def next_token(self, gap_s: float) -> None:
        self._tokens.inc()
        self._gap.observe(gap_s)

    def completed(self, answer: Answer, seconds: float, met: bool | None) -> None:
        """The last piece was made; `met` is None without a budget."""
        self._requests.labels(self._model, str(answer.path), "OK").inc()
        self._total_seconds.observe(seconds)
        self._reused.inc(answer.reused_tokens)
        if answer.quality is not None:
            self._quality.observe(answer.quality.value)
        if met is not None:
            (self._met if met else self._missed).inc()

    def refused(self, code: str, *, had_budget: bool) -> None:
        """A request ended with a status, before or after its first piece."""
        self._requests.labels(self._model, "none", code).inc()
        if had_budget and code not in CALLERS_FAULT:
            self._missed.inc()
