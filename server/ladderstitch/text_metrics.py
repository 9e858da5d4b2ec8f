"""What Prometheus sees of a language model."""

from __future__ import annotations

from ladderstitch.metrics import CALLERS_FAULT, Metrics

PATH = "0"
"""The path that answers, as the label `stitch`."""

LEARNING = 0.1
"""Weight of the newest answer in what answers take of late."""


class TextMetrics:
    """One model's children of `Metrics`, looked up once."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._requests, self._model = metrics.requests, model
        self._met = metrics.budgets.labels(model, "true")
        self._missed = metrics.budgets.labels(model, "false")
        self._queue = metrics.queue.labels(model)
        self._queue_seconds = metrics.queue_seconds.labels(model)
        self._total_seconds = metrics.total_seconds.labels(model)
        self._tokens = metrics.generated_tokens.labels(model)
        self._first = metrics.first_token_seconds.labels(model)
        self._gap = metrics.token_gap_seconds.labels(model)
        self._running = metrics.running.labels(model)
        self._cache = metrics.cache.labels(model)
        self.ready = metrics.ready.labels(model)
        self.restarts = metrics.restarts.labels(model)
        self.answer_s = 0.0
        """What an answer took of late, its wait included."""

    def queued(self, waiting: int) -> None:
        self._queue.set(waiting)

    def generating(self, streams: int, cache_share: float) -> None:
        """So many answers are being written, and they fill so much of the cache."""
        self._running.set(streams)
        self._cache.set(cache_share)

    def first_token(self, queue_s: float, seconds: float) -> None:
        """`seconds` from arrival, of which `queue_s` were spent waiting."""
        self._tokens.inc()
        self._queue_seconds.observe(queue_s)
        self._first.observe(seconds)

    def next_token(self, gap_s: float) -> None:
        self._tokens.inc()
        self._gap.observe(gap_s)

    def completed(self, seconds: float, met: bool | None) -> None:
        """The last piece was handed over; `met` is None without a budget."""
        self._requests.labels(self._model, PATH, "OK").inc()
        self._total_seconds.observe(seconds)
        self.answer_s += LEARNING * (seconds - self.answer_s) if self.answer_s else seconds
        if met is not None:
            (self._met if met else self._missed).inc()

    def refused(self, code: str, *, had_budget: bool) -> None:
        """A request ended with a status, before or after its first piece."""
        self._requests.labels(self._model, "none", code).inc()
        if had_budget and code not in CALLERS_FAULT:
            self._missed.inc()
