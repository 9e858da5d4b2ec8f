"""The choice of a request's variant and of the tokens of the next step: pure, no clock, no I/O.

All sequences of a step are on one variant, because standard rows would delay ladder rows. The most
urgent sequence decides on the variant. All decoding sequences of that variant take part, and as
many prompt tokens as these can afford (chunked prefill, arXiv 2308.16369).
"""

from __future__ import annotations

import math
from collections import abc
from dataclasses import dataclass

from ladderstitch.errors import (
    BudgetInfeasible,
    Overloaded,
    QualityUnavailable,
    VariantNotFound,
)
from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.generation import GenerationRequest
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.text.messages import Step, StepOutput
from ladderstitch.text.scheduler.decode_load import (
    MAX_SHARE,
    NO_LOAD,
    DecodeLoad,
    SchedulerLoad,
    first_token_s,
)
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
    left = times.max_step_tokens
    if decoding and prefilling:
        slack_s = min(deadlines[sequence] for sequence in decoding) - now
        left = _prefill_tokens(variant, decoding, times, slack_s)
    for sequence in prefilling:
        num_tokens = min(sequence.num_pending, left, sequence.max_chunk_tokens)
        if num_tokens <= 0:
            break
        chunks.append(ScheduledChunk(sequence, num_tokens))
        left -= num_tokens
    return StepPlan(variant, tuple(chunks))


def _effective_deadline(sequence: Sequence, times: StepTimes, now: float) -> float:
    """Return the deadline of the next token, later if it is a first token that is late anyway."""
    deadline = sequence.pace.deadline(times.expected(sequence.variant, 1))
    if sequence.pace.first_token_at is not None:
        return deadline
    is_late = now + times.prefill_s(sequence.variant, sequence.num_pending) > deadline
    return deadline + MISSED_TTFT_PENALTY_S if is_late else deadline


def _prefill_tokens(
    variant: int, decoding: list[Sequence], times: StepTimes, slack_s: float
) -> int:
    """Return the number of prompt tokens for a step that has one token per decoding sequence.

    The step is to end within `slack_s`.
    """
    room = times.max_step_tokens - len(decoding)
    cached = sum(sequence.history.num_tokens for sequence in decoding)
    affordable = times.largest_fit(variant, slack_s, len(decoding) + 1, cached) - len(decoding)
    return min(room, max(MIN_PREFILL_CHUNK, affordable))


def choose_variant(
    request: GenerationRequest,
    candidates: CandidateFilter,
    settings: SchedulerSettings,
    times: StepTimes,
    load: SchedulerLoad,
    cached_tokens: dict[int, int],
    now: float,
) -> int:
    """Return the variant of highest quality with which all budgets are expected to be met.

    If there is none, return the fastest one. The policy `max_quality` ignores the load of other
    requests. `cached_tokens` is the number of the prompt's tokens in the prefix cache, by variant.
    Raises `VariantNotFound` or `QualityUnavailable` if no variant is admissible,
    `BudgetInfeasible` if the hard deadline comes before the first token even without load, and
    `Overloaded` if it does under the current load or if the queue is full.
    """
    variants = _admissible_variants(request, candidates)
    uncached = {v: len(request.tokens) - cached_tokens.get(v, 0) for v in variants}
    alone = {v: first_token_s(v, uncached[v], NO_LOAD, times) for v in variants}
    shared = {v: first_token_s(v, uncached[v], load, times) for v in variants}
    _reject_infeasible(request, settings, load, min(alone.values()), min(shared.values()), now)
    if settings.policy == "max_quality":
        load, shared = NO_LOAD, alone
    decoding, shortest_s = DecodeLoad(load, times), times.shortest_token_s
    spent_s = now - request.arrival
    for variant in reversed(variants):
        period_s = _token_period_s(request, shared[variant], now)
        share = 0.0
        if not math.isinf(period_s):
            share = decoding.share_with(variant, max(shortest_s, period_s))
        is_first_met = spent_s + shared[variant] <= request.budget.first_token_s
        if is_first_met and share <= MAX_SHARE:
            return variant
    return variants[0]


def _token_period_s(request: GenerationRequest, first_s: float, now: float) -> float:
    """Return the seconds that each token after the first may take; it comes in `first_s`."""
    budget, followers = request.budget, max(1, request.max_tokens - 1)
    left_s = request.arrival + budget.answer_s - now - first_s
    return min(budget.per_token_s, left_s / followers)


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
