"""Which tokens run in the next step. Pure: no clock, no lock, no I/O.

All sequences of a step are on one path: standard rows would make ladder rows wait. What is due
first decides on the path and goes first; decoding sequences of that path always come along, and as
many tokens of prompts as they can afford (chunked prefill, arXiv 2308.16369).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ladderstitch.text.scheduler.sequence import TokenSequence
from ladderstitch.text.scheduler.step_times import StepTimes

LEAST_CHUNK = 16
"""Tokens of prompts that a step takes even if decoding sequences fall behind by it."""
LATE_S = 5.0
"""A first token that cannot be on time any more lets those go first that can, for so long."""


@dataclass(frozen=True, slots=True)
class Part:
    """The next `count` tokens of a sequence."""

    sequence: TokenSequence
    count: int


@dataclass(frozen=True, slots=True)
class Plan:
    path: int
    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        return sum(part.count for part in self.parts)


def plan_step(active: Collection[TokenSequence], times: StepTimes, now: float) -> Plan | None:
    """The next step of sequences that hold blocks; None if there are none."""
    if not active:
        return None
    urgency = {sequence: _urgency(sequence, times, now) for sequence in active}
    path = min(active, key=urgency.__getitem__).path
    here = sorted((s for s in active if s.path == path), key=urgency.__getitem__)
    decoding = [s for s in here if s.pending == 1][: times.most_tokens]
    reading = [s for s in here if s.pending > 1]
    parts = [Part(sequence, 1) for sequence in decoding]
    left = _affordable(path, decoding, times, now) if reading else 0
    for sequence in reading:
        count = min(sequence.pending, left)
        if count <= 0:
            break
        parts.append(Part(sequence, count))
        left -= count
    return Plan(path, tuple(parts))


def _urgency(sequence: TokenSequence, times: StepTimes, now: float) -> float:
    token_s = times.expected(sequence.path, 1)
    due = sequence.due(token_s)
    late = now + times.prefill_s(sequence.path, sequence.pending) > due
    return due + LATE_S if late and sequence.first_at is None else due


def _affordable(path: int, decoding: list[TokenSequence], times: StepTimes, now: float) -> int:
    """Tokens of prompts beside one of each decoding sequence."""
    room = times.most_tokens - len(decoding)
    if not decoding:
        return room
    token_s = times.expected(path, 1)
    slack = min(sequence.due(token_s) for sequence in decoding) - now
    fits = times.fits(path, slack, len(decoding) + 1) - len(decoding)
    return min(room, max(LEAST_CHUNK, fits))
