"""What a text scheduler reports of its steps and answers, and to whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ladderstitch.scheduling.generation import GenerationInfo, GenerationUsage


@dataclass(frozen=True, slots=True)
class StepReport:
    """The cost of one step: its variant, its sequences and its seconds of compute.

    `error` is actual over expected seconds; `slowdown` and `tail` are the correction of the
    latency model after the step.
    """

    variant: int
    num_sequences: int
    compute_s: float
    error: float
    slowdown: float
    tail: float


@dataclass(frozen=True, slots=True)
class Occupancy:
    """The numbers of waiting and running requests, and the used share of cache blocks, 0 to 1."""

    num_waiting: int
    num_running: int
    kv_cache_usage: float


class TextObserver(Protocol):
    """A counter of the steps and answers of a text scheduler."""

    def observe_step(self, step: StepReport, occupancy: Occupancy) -> None:
        """Count a finished step."""

    def observe_occupancy(self, occupancy: Occupancy) -> None:
        """Report the requests in progress and the cache in use, after either has changed."""

    def observe_preemptions(self, num_sequences: int) -> None:
        """Count sequences whose blocks were given to others."""

    def observe_variant_changes(self, num_sequences: int) -> None:
        """Count sequences that go on with another variant."""

    def observe_translation(self, num_tokens: int) -> None:
        """Count cached tokens that were translated for another variant."""

    def observe_repair(self, num_tokens: int, seconds: float) -> None:
        """Count translated tokens that were computed again in idle time."""

    def observe_first_token(self, queue_s: float, seconds: float) -> None:
        """Count a first token, `seconds` after the arrival; `queue_s` of them were in the queue."""

    def observe_next_token(self, gap_s: float) -> None:
        """Count a later token, `gap_s` after the token before it."""

    def observe_completion(self, answer: GenerationInfo, usage: GenerationUsage) -> None:
        """Count a complete answer."""

    def observe_rejection(self, code: str, *, had_budget: bool) -> None:
        """Count a request that ended with a status, before or after its first token."""

    def observe_non_finite(self) -> None:
        """Count a request whose outputs were infinite or not a number."""

    def observe_restart(self) -> None:
        """Count a scheduler whose loop ended unexpectedly and was started again."""

    def observe_failure(self) -> None:
        """Count a call of this observer that failed."""


class NullObserver:
    """No-op observer."""

    def observe_step(self, step: StepReport, occupancy: Occupancy) -> None:
        """Do nothing."""

    def observe_occupancy(self, occupancy: Occupancy) -> None:
        """Do nothing."""

    def observe_preemptions(self, num_sequences: int) -> None:
        """Do nothing."""

    def observe_variant_changes(self, num_sequences: int) -> None:
        """Do nothing."""

    def observe_translation(self, num_tokens: int) -> None:
        """Do nothing."""

    def observe_repair(self, num_tokens: int, seconds: float) -> None:
        """Do nothing."""

    def observe_first_token(self, queue_s: float, seconds: float) -> None:
        """Do nothing."""

    def observe_next_token(self, gap_s: float) -> None:
        """Do nothing."""

    def observe_completion(self, answer: GenerationInfo, usage: GenerationUsage) -> None:
        """Do nothing."""

    def observe_rejection(self, code: str, *, had_budget: bool) -> None:
        """Do nothing."""

    def observe_non_finite(self) -> None:
        """Do nothing."""

    def observe_restart(self) -> None:
        """Do nothing."""

    def observe_failure(self) -> None:
        """Do nothing."""
