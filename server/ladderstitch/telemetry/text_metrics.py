"""The metrics of one language model."""

from __future__ import annotations

from collections.abc import Iterable

from ladderstitch.scheduling.generation import GenerationInfo, GenerationUsage
from ladderstitch.telemetry.activity import RecentAnswer
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.model_metrics import ModelMetrics
from ladderstitch.telemetry.text_observer import Occupancy, StepReport


class TextMetrics(ModelMetrics):
    """The metrics of one language model; a `TextObserver`."""

    def __init__(self, metrics: Metrics, model: str, variants: Iterable[int]) -> None:
        super().__init__(metrics, model, variants)
        self._generated_tokens = metrics.generated_tokens.labels(model)
        self._prefix_cache_hit_tokens = metrics.prefix_cache_hit_tokens.labels(model)
        self._preemptions = metrics.preemptions.labels(model)
        self._variant_changes = metrics.variant_changes.labels(model)
        self._translated_tokens = metrics.translated_tokens.labels(model)
        self._repaired_tokens = metrics.repaired_tokens.labels(model)
        self._repair_seconds = metrics.repair_seconds.labels(model)
        self._variant_tokens = metrics.variant_tokens
        self._time_to_first_token_seconds = metrics.time_to_first_token_seconds.labels(model)
        self._inter_token_latency_seconds = metrics.inter_token_latency_seconds.labels(model)
        self._kv_cache_usage = metrics.kv_cache_usage_ratio.labels(model)

    def observe_step(self, step: StepReport, occupancy: Occupancy) -> None:
        """Count a finished step as a batch of its sequences."""
        self.observe_occupancy(occupancy)
        self.observe_batch(
            step.variant, step.num_sequences, step.compute_s, step.error, step.slowdown, step.tail
        )

    def observe_occupancy(self, occupancy: Occupancy) -> None:
        """Set the gauges, which thereby return to zero however a request ends."""
        self.set_queue_length(occupancy.num_waiting)
        self.running.set(occupancy.num_running)
        self._kv_cache_usage.set(occupancy.kv_cache_usage)

    def observe_non_finite(self) -> None:
        """Count a request whose outputs were infinite or not a number."""
        self.non_finite_outputs.inc()

    def observe_restart(self) -> None:
        """Count a scheduler whose loop ended unexpectedly and was started again."""
        self.dispatch_restarts.inc()

    def observe_failure(self) -> None:
        """Count a call of this observer that failed."""
        self.failures.inc()

    def observe_preemptions(self, num_sequences: int) -> None:
        """Count sequences whose blocks were given to others."""
        self._preemptions.inc(num_sequences)

    def observe_variant_changes(self, num_sequences: int) -> None:
        """Count sequences that go on with another variant."""
        self._variant_changes.inc(num_sequences)

    def observe_translation(self, num_tokens: int) -> None:
        """Count cached tokens that were translated for another variant."""
        self._translated_tokens.inc(num_tokens)

    def observe_repair(self, num_tokens: int, seconds: float) -> None:
        """Count translated tokens that were computed again in idle time."""
        self._repaired_tokens.inc(num_tokens)
        self._repair_seconds.inc(seconds)

    def observe_first_token(self, queue_s: float, seconds: float) -> None:
        """Count a first token, `seconds` after the arrival; `queue_s` of them were in the queue."""
        self._generated_tokens.inc()
        self._queue_seconds.observe(queue_s)
        self._time_to_first_token_seconds.observe(seconds)

    def observe_next_token(self, gap_s: float) -> None:
        """Count a later token, `gap_s` after the token before it."""
        self._generated_tokens.inc()
        self._inter_token_latency_seconds.observe(gap_s)

    def observe_completion(self, answer: GenerationInfo, usage: GenerationUsage) -> None:
        """Count a complete answer."""
        self._count_request(str(answer.variant), "OK")
        self._request_duration_seconds.observe(usage.total_s)
        self._prefix_cache_hit_tokens.inc(answer.reused_tokens)
        for span in answer.spans:
            self._variant_tokens.labels(self._model, str(span.variant)).inc(span.num_tokens)
        if answer.quality is not None:
            self._served_quality.observe(answer.quality.value)
        if usage.met is not None:
            self._count_budget(met=usage.met)
        if self.activity is not None:
            self.activity.add(
                RecentAnswer(
                    answer.variant,
                    answer.quality.value if answer.quality is not None else None,
                    usage.total_s,
                    usage.met,
                    token_s=usage.mean_token_s if usage.generated_tokens > 1 else None,
                    spans=answer.spans,
                )
            )

    def observe_rejection(self, code: str, *, had_budget: bool) -> None:
        """Count a request that ended with a status, before or after its first token.

        Its budget counts as missed unless the caller caused the error.
        """
        self._count_rejection(code, had_budget=had_budget)
