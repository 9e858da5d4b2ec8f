"""Which tokens run in the next step. Pure: no clock, no lock, no I/O.

All sequences of a step are on one path: standard rows would make ladder rows wait. What is due
first decides on the path and goes first; decoding sequences of that path always come along, and as
many tokens of prompts as they can afford (chunked prefill, arXiv 2308.16369).
"""

from __future__ import annotations

from collections.abc import Collection
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
from ladderstitch.text.scheduler.sequence import Sequence_
from ladderstitch.text.scheduler.step_times import StepTimes

LEAST_CHUNK = 16
"""Tokens of prompts that a step takes even if decoding sequences fall behind by it."""
LATE_S = 5.0
"""A first token that cannot be on time any more lets those go first that can, for so long."""


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The next `count` tokens of a sequence."""

    sequence: Sequence_
    count: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    path: int
    parts: tuple[ScheduledChunk, ...]

    @property
    def tokens(self) -> int:
        return sum(part.count for part in self.parts)


def plan_step(active: Collection[Sequence_], times: StepTimes, now: float) -> StepPlan | None:
    """The next step of sequences that hold blocks; None if there are none."""
    if not active:
        return None
    urgency = {sequence: _urgency(sequence, times, now) for sequence in active}
    path = min(active, key=urgency.__getitem__).path
    here = sorted((s for s in active if s.path == path), key=urgency.__getitem__)
    decoding = [s for s in here if s.pending == 1][: times.most_tokens]
    reading = [s for s in here if s.pending > 1]
    parts = [ScheduledChunk(sequence, 1) for sequence in decoding]
    left = _affordable(path, decoding, times, now) if reading else 0
    for sequence in reading:
        count = min(sequence.pending, left)
        if count <= 0:
            break
        parts.append(ScheduledChunk(sequence, count))
        left -= count
    return StepPlan(path, tuple(parts))


def _urgency(sequence: Sequence_, times: StepTimes, now: float) -> float:
    token_s = times.expected(sequence.path, 1)
    due = sequence.due(token_s)
    late = now + times.prefill_s(sequence.path, sequence.pending) > due
    return due + LATE_S if late and sequence.first_at is None else due


def _affordable(path: int, decoding: list[Sequence_], times: StepTimes, now: float) -> int:
    """Tokens of prompts beside one of each decoding sequence."""
    room = times.most_tokens - len(decoding)
    if not decoding:
        return room
    token_s = times.expected(path, 1)
    slack = min(sequence.due(token_s) for sequence in decoding) - now
    fits = times.fits(path, slack, len(decoding) + 1) - len(decoding)
    return min(room, max(LEAST_CHUNK, fits))


@dataclass(frozen=True, slots=True)
class SchedulerLoad:
    """What is on its way: decoding sequences by path, and tokens of prompts to be read."""

    sequences: dict[int, int]
    unread: dict[int, int]
    waiting: int

    @classmethod
    def of(cls, active: Collection[Sequence_], waiting: Collection[Sequence_]) -> SchedulerLoad:
        sequences: dict[int, int] = {}
        unread: dict[int, int] = {}
        for sequence in (*active, *waiting):
            sequences[sequence.path] = sequences.get(sequence.path, 0) + 1
            if sequence.pending > 1:
                unread[sequence.path] = unread.get(sequence.path, 0) + sequence.pending
        return cls(sequences, unread, len(waiting))


IDLE = SchedulerLoad({}, {}, 0)


@dataclass(frozen=True, slots=True)
class TokenTimeEstimate:
    """Seconds until the first token from now, and between the others."""

    first_s: float
    token_s: float

    def answer_s(self, tokens: int) -> float:
        return self.first_s + self.token_s * (tokens - 1)


def forecast(
    path: int, fresh_tokens: int, load: SchedulerLoad, times: StepTimes
) -> TokenTimeEstimate:
    """For a request of so many tokens to compute; steps of different paths take turns."""
    counts = dict(load.sequences)
    counts[path] = counts.get(path, 0) + 1
    token_s = sum(times.expected(other, n, n) for other, n in counts.items())
    ahead = sum(times.prefill_s(other, tokens) for other, tokens in load.unread.items())
    return TokenTimeEstimate(ahead + times.prefill_s(path, fresh_tokens), token_s)


def choose_path(
    request: GenerationRequest,
    candidates: CandidateFilter,
    settings: SchedulerSettings,
    times: StepTimes,
    load: SchedulerLoad,
    reusable: dict[int, int],
    now: float,
) -> int:
    """The path of highest quality that is expected to keep the budget; else the fastest.

    The policy `max_quality` looks at the request alone, as if nobody else were there. `reusable`
    counts the tokens of its prompt that are in the caches, by path. Raises `VariantNotFound`,
    `QualityUnavailable`, `BudgetInfeasible` for a limit before its first token even when idle,
    `Overloaded` for one before it at present, or for a full queue.
    """
    variants = _variants(request, candidates)
    forecasts = {
        path: (
            forecast(path, len(request.tokens) - reusable.get(path, 0), IDLE, times),
            forecast(path, len(request.tokens) - reusable.get(path, 0), load, times),
        )
        for path in variants
    }
    _refuse_hopeless(request, settings, load, forecasts, now)
    for path in reversed(variants):
        alone, shared = forecasts[path]
        if _keeps(request, alone if settings.policy == "max_quality" else shared, now):
            return path
    return variants[0]


def _variants(request: GenerationRequest, candidates: CandidateFilter) -> tuple[int, ...]:
    """Paths to choose from, fastest first."""
    pin = request.variant
    if pin is not None and pin not in candidates.quality:
        raise VariantNotFound(f"variant_id: expected 0 to {len(candidates.quality) - 1}, got {pin}")
    highest = max(candidates.quality.values()) if pin is None else candidates.quality[pin]
    if request.min_quality > highest:
        raise QualityUnavailable(
            f"min_quality: expected at most {highest:.4f}, got {request.min_quality:.4f}",
            max_quality=f"{highest:.6f}",
        )
    return (pin,) if pin is not None else candidates.for_quality(request.min_quality)


def _refuse_hopeless(
    request: GenerationRequest,
    settings: SchedulerSettings,
    load: SchedulerLoad,
    forecasts: dict[int, tuple[TokenTimeEstimate, TokenTimeEstimate]],
    now: float,
) -> None:
    alone_s = min(alone.first_s for alone, _ in forecasts.values())
    shared_s = min(shared.first_s for _, shared in forecasts.values())
    left_s = request.hard_deadline - now
    if left_s < alone_s:
        feasible_us = round(1e6 * (alone_s + now - request.arrival))
        raise BudgetInfeasible(
            f"the first token takes {1e3 * alone_s:.1f} ms at least, the limit is in "
            f"{1e3 * max(0.0, left_s):.1f} ms",
            min_feasible_us=str(feasible_us),
        )
    ahead_s = shared_s - alone_s
    if load.waiting >= settings.queue_limit_requests or ahead_s > settings.queue_limit_s:
        raise Overloaded(
            f"{load.waiting} requests wait, {ahead_s:.1f} s of prompts are to be read before this "
            "one",
            retry_after_s=max(0.1, ahead_s / 2),
        )
    if left_s < shared_s:
        raise Overloaded(
            f"the first token is expected in {shared_s:.2f} s, the limit is in {left_s:.2f} s",
            retry_after_s=max(0.1, shared_s - left_s),
        )


def _keeps(request: GenerationRequest, expected: TokenTimeEstimate, now: float) -> bool:
    budget, spent = request.budget, now - request.arrival
    return (
        spent + expected.first_s <= budget.first_token_s
        and expected.token_s <= budget.per_token_s
        and spent + expected.answer_s(request.max_tokens) <= budget.answer_s
    )
