"""The choice of a request's variant and of the tokens of the next step: pure, no clock, no I/O.

All sequences of a step are on one variant, because standard rows would delay ladder rows. The most
urgent sequence decides on the variant. All decoding sequences of that variant take part, and as
many prompt tokens as these can afford (chunked prefill, arXiv 2308.16369).
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

from ladderstitch.errors import (
    BudgetInfeasible,
    Overloaded,
    QualityUnavailable,
    VariantNotFound,
)
from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.requests import GenerationRequest
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.text.messages import Step, StepOutput
from ladderstitch.text.scheduler.sequence import Sequence
from ladderstitch.text.scheduler.step_times import StepTimes

MIN_PREFILL_CHUNK = 16
"""Prompt tokens that a step takes even if decoding sequences then miss their deadlines."""
MISSED_TTFT_PENALTY_S = 5.0
"""Seconds added to the deadline of a sequence whose TTFT target is already missed."""


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The next `num_tokens` pending tokens of a sequence, scheduled for a step."""

    sequence: Sequence
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The chunks of one step, all on one variant."""

    variant: int
    chunks: tuple[ScheduledChunk, ...]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all chunks."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences of the chunks, in order."""
        return [chunk.sequence for chunk in self.chunks]


@dataclass(frozen=True, slots=True)
class ExecutedStep:
    """A step that the ranks ran, its output, and the instants at which it started and ended.

    `num_cached` is the number of cached tokens that its attention read.
    """

    plan: StepPlan
    step: Step
    num_cached: int
    output: StepOutput
    started_at: float
    ended_at: float


def plan_step(active: abc.Collection[Sequence], times: StepTimes, now: float) -> StepPlan | None:
    """Return the next step of the sequences that hold blocks; None if there are none."""
    if not active:
        return None
    deadlines = {sequence: _effective_deadline(sequence, times, now) for sequence in active}
    variant = min(active, key=deadlines.__getitem__).variant
    chosen = sorted((s for s in active if s.variant == variant), key=deadlines.__getitem__)
    decoding = [s for s in chosen if s.num_pending == 1][: times.max_step_tokens]
    prefilling = [s for s in chosen if s.num_pending > 1]
    chunks = [ScheduledChunk(sequence, 1) for sequence in decoding]
    left = _prefill_tokens(variant, decoding, times, now) if prefilling else 0
    for sequence in prefilling:
        num_tokens = min(sequence.num_pending, left, sequence.max_chunk_tokens)
        if num_tokens <= 0:
            break
        chunks.append(ScheduledChunk(sequence, num_tokens))
        left -= num_tokens
    return StepPlan(variant, tuple(chunks))


def _effective_deadline(sequence: Sequence, times: StepTimes, now: float) -> float:
    """Return the deadline of the next token, later if it is a first token that is late anyway."""
    deadline = sequence.token_deadline(times.expected(sequence.variant, 1))
    is_late = now + times.prefill_s(sequence.variant, sequence.num_pending) > deadline
    if is_late and sequence.first_token_at is None:
        return deadline + MISSED_TTFT_PENALTY_S
    return deadline


def _prefill_tokens(variant: int, decoding: list[Sequence], times: StepTimes, now: float) -> int:
    """Return the number of prompt tokens for a step that has one token per decoding sequence."""
    room = times.max_step_tokens - len(decoding)
    if not decoding:
        return room
    token_s = times.expected(variant, 1)
    slack_s = min(sequence.token_deadline(token_s) for sequence in decoding) - now
    cached = sum(sequence.history.num_tokens for sequence in decoding)
    affordable = times.largest_fit(variant, slack_s, len(decoding) + 1, cached) - len(decoding)
    return min(room, max(MIN_PREFILL_CHUNK, affordable))


@dataclass(frozen=True, slots=True)
class SchedulerLoad:
    """The sequences in progress, as the load that a new request meets."""

    num_sequences: dict[int, int]
    """Sequences by variant."""
    prefill_tokens: dict[int, int]
    """Prompt tokens that are still to be computed, by variant."""
    num_waiting: int
    num_cached: int = 0
    """Tokens of all sequences in the cache, which a round of tokens reads."""

    @classmethod
    def from_sequences(
        cls, active: abc.Collection[Sequence], waiting: abc.Collection[Sequence]
    ) -> SchedulerLoad:
        """Return the load of active and waiting sequences."""
        num_sequences: dict[int, int] = {}
        prefill_tokens: dict[int, int] = {}
        num_cached = 0
        for sequence in (*active, *waiting):
            variant, num_pending = sequence.variant, sequence.num_pending
            num_cached += sequence.history.num_tokens
            num_sequences[variant] = num_sequences.get(variant, 0) + 1
            if num_pending > 1:
                prefill_tokens[variant] = prefill_tokens.get(variant, 0) + num_pending
        return cls(num_sequences, prefill_tokens, len(waiting), num_cached)


NO_LOAD = SchedulerLoad({}, {}, 0)


@dataclass(frozen=True, slots=True)
class TokenTimeEstimate:
    """The expected seconds from now to the first token, and between later tokens."""

    first_s: float
    token_s: float

    def answer_s(self, num_tokens: int) -> float:
        """Return the expected seconds from now to the last of `num_tokens` tokens."""
        return self.first_s + self.token_s * (num_tokens - 1)


class DecodeRound:
    """The expected seconds until every sequence has one more token.

    Each variant in use takes one step, which all of its sequences share.
    """

    def __init__(self, load: SchedulerLoad, times: StepTimes) -> None:
        self._counts, self._times = dict(load.num_sequences), times
        steps_s = sum(self._step_s(variant, n) for variant, n in self._counts.items())
        self.seconds = steps_s + times.cached_s(load.num_cached)

    def seconds_with(self, variant: int) -> float:
        """Return the seconds with one more sequence on a variant."""
        count = self._counts.get(variant, 0)
        return self.seconds + self._step_s(variant, count + 1) - self._step_s(variant, count)

    def add(self, variant: int) -> None:
        """Add a sequence on a variant."""
        self.seconds = self.seconds_with(variant)
        self._counts[variant] = self._counts.get(variant, 0) + 1

    def remove(self, variant: int) -> None:
        """Remove one of the sequences on a variant."""
        count = self._counts[variant]
        self.seconds += self._step_s(variant, count - 1) - self._step_s(variant, count)
        self._counts[variant] = count - 1

    def _step_s(self, variant: int, num_sequences: int) -> float:
        return self._times.expected(variant, num_sequences, num_sequences) if num_sequences else 0.0


def estimate_token_times(
    variant: int, num_tokens: int, load: SchedulerLoad, times: StepTimes
) -> TokenTimeEstimate:
    """Return the estimate for a request with `num_tokens` prompt tokens to compute.

    Steps of different variants take turns, so that every variant in progress adds its step.
    """
    token_s = DecodeRound(load, times).seconds_with(variant) + times.cached_s(num_tokens)
    ahead_s = sum(times.prefill_s(other, n) for other, n in load.prefill_tokens.items())
    return TokenTimeEstimate(ahead_s + times.prefill_s(variant, num_tokens), token_s)


def choose_variant(
    request: GenerationRequest,
    candidates: CandidateFilter,
    settings: SchedulerSettings,
    times: StepTimes,
    load: SchedulerLoad,
    cached_tokens: dict[int, int],
    now: float,
) -> int:
    """Return the variant of highest quality that is expected to meet the budget, or the fastest.

    The policy `max_quality` ignores the load of other requests. `cached_tokens` is the number of
    the prompt's tokens in the prefix cache, by variant. Raises `VariantNotFound` or
    `QualityUnavailable` if no variant is admissible, `BudgetInfeasible` if the hard deadline comes
    before the first token even without load, and `Overloaded` if it does under the current load or
    if the queue is full.
    """
    variants = _admissible_variants(request, candidates)
    estimates: dict[int, tuple[TokenTimeEstimate, TokenTimeEstimate]] = {}
    for variant in variants:
        num_tokens = len(request.tokens) - cached_tokens.get(variant, 0)
        estimates[variant] = (
            estimate_token_times(variant, num_tokens, NO_LOAD, times),
            estimate_token_times(variant, num_tokens, load, times),
        )
    alone_s = min(alone.first_s for alone, _ in estimates.values())
    shared_s = min(shared.first_s for _, shared in estimates.values())
    _reject_infeasible(request, settings, load, alone_s, shared_s, now)
    for variant in reversed(variants):
        alone, shared = estimates[variant]
        if _meets_budget(request, alone if settings.policy == "max_quality" else shared, now):
            return variant
    return variants[0]


def _admissible_variants(
    request: GenerationRequest, candidates: CandidateFilter
) -> tuple[int, ...]:
    """Return the variants that the request may be answered with, fastest first."""
    pin = request.variant
    if pin is not None and pin not in candidates.quality:
        raise VariantNotFound(f"variant_id: expected 0 to {len(candidates.quality) - 1}, got {pin}")
    highest = candidates.quality[candidates.best if pin is None else pin]
    if request.min_quality > highest:
        raise QualityUnavailable(
            f"min_quality: expected at most {highest:.4f}, got {request.min_quality:.4f}",
            max_quality=f"{highest:.6f}",
        )
    return (pin,) if pin is not None else candidates.for_quality(request.min_quality)


def _reject_infeasible(
    request: GenerationRequest,
    settings: SchedulerSettings,
    load: SchedulerLoad,
    alone_s: float,
    shared_s: float,
    now: float,
) -> None:
    """Raise `BudgetInfeasible` or `Overloaded` if the request cannot be accepted.

    `alone_s` and `shared_s` are the expected seconds to the first token of the fastest variant,
    without load and under the current one.
    """
    left_s = request.hard_deadline - now
    if left_s < alone_s:
        feasible_us = round(1e6 * (alone_s + now - request.arrival))
        raise BudgetInfeasible(
            f"hard deadline: expected at least {1e3 * alone_s:.3f} ms for the first token, got "
            f"{1e3 * max(0.0, left_s):.3f} ms",
            min_feasible_us=str(feasible_us),
        )
    ahead_s = shared_s - alone_s
    if load.num_waiting >= settings.queue_limit_requests or ahead_s > settings.queue_limit_s:
        raise Overloaded(
            f"{load.num_waiting} requests are waiting, and {ahead_s:.1f} s of prefill are ahead of "
            "this one",
            retry_after_s=max(0.1, ahead_s / 2),
        )
    if left_s < shared_s:
        raise Overloaded(
            f"the first token is expected in {shared_s:.2f} s, after the hard deadline in "
            f"{left_s:.2f} s",
            retry_after_s=max(0.1, shared_s - left_s),
        )


def _meets_budget(request: GenerationRequest, expected: TokenTimeEstimate, now: float) -> bool:
    budget, spent_s = request.budget, now - request.arrival
    return (
        spent_s + expected.first_s <= budget.first_token_s
        and expected.token_s <= budget.per_token_s
        and spent_s + expected.answer_s(request.max_tokens) <= budget.answer_s
    )
