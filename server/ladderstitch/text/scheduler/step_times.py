"""How long steps take, and by when an answer needs its next token."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from statistics import median

import torch

from ladderstitch.scheduling.latency_model import LatencyModel
from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch.scheduling.requests import TokenBudget
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.step import SequenceInput, Step

RELAXED_FIRST_S = 10.0
RELAXED_TOKEN_S = 0.25
"""What answers without a budget are paced by: nobody waits for ever, or reads slower than this."""


def due(
    budget: TokenBudget,
    arrival: float,
    first_at: float | None,
    made: int,
    most: int,
    token_s: float,
) -> float:
    """When token number `made` (from 0) of at most `most` is due, on the clock of `arrival`.

    `first_at` is when token 0 came, `token_s` what one takes at least. Time that an answer has in
    hand is kept: it may fall behind for a while and still hold its mean.
    """
    end = arrival + budget.answer_s
    if first_at is None:
        first = arrival + min(budget.first_token_s, RELAXED_FIRST_S)
        return min(first, end - token_s * (most - 1))
    paced = first_at + made * min(budget.per_token_s, RELAXED_TOKEN_S)
    if math.isinf(end) or most < 2:
        return paced
    return min(paced, first_at + (end - first_at) * made / (most - 1))


class StepTimes:
    """Seconds of a step: a profile over its tokens, `sequence_s` for every sequence beyond the
    first, and what this machine does right now."""

    def __init__(
        self, profile: LatencyProfile, sequence_s: float, probability: float = 0.99
    ) -> None:
        self.table = LatencyModel(profile, probability)
        self._sequence_s = sequence_s

    @property
    def most_tokens(self) -> int:
        return self.table.view.max_batch_size

    def expected(self, path: int, tokens: int, sequences: int = 1) -> float:
        """Seconds of one step of so many tokens, at least one."""
        view = self.table.view
        whole = view.expected(path, min(tokens, view.max_batch_size)) * max(
            1.0, tokens / view.max_batch_size
        )
        return whole + max(0, sequences - 1) * self._sequence_s * view.slowdown

    def fits(self, path: int, slack_s: float, sequences: int) -> int:
        """Tokens, those of the sequences included, that a step may have to stay within."""
        view = self.table.view
        left = slack_s - max(0, sequences - 1) * self._sequence_s * view.slowdown * view.tail
        return view.largest_fit(path, left) if left > 0 else 0

    def prefill_s(self, path: int, tokens: int) -> float:
        """Seconds to read so many tokens of a prompt, in steps as large as they may be."""
        most = self.most_tokens
        whole, rest = divmod(tokens, most)
        return whole * self.expected(path, most) + (self.expected(path, rest) if rest else 0.0)

    def observe(self, path: int, tokens: int, sequences: int, seconds: float) -> float:
        """Learn from a step; actual over expected seconds."""
        extra = max(0, sequences - 1) * self._sequence_s * self.table.view.slowdown
        return self.table.observe(path, tokens, max(seconds - extra, 0.1 * seconds))


def placeholder_profile(paths: int, most_tokens: int) -> LatencyProfile:
    """Before anything was measured: every step alike, so that order decides and not the path."""
    sizes = (1, most_tokens) if most_tokens > 1 else (1,)
    same = Latency(median_s=(0.01,) * len(sizes), p99_s=(0.01,) * len(sizes))
    return LatencyProfile(
        device="unmeasured",
        threads=1,
        date="",
        versions={},
        batch_sizes=sizes,
        variants=dict.fromkeys(range(paths), same),
    )


SIZES = (1, 8, 64)
"""Tokens of a step that are measured, besides the most that one may have."""
REPEATS = 3
SEQUENCES = 8


async def measure_steps(group: RankGroup, most_tokens: int) -> StepTimes:
    """Seconds of prompts of some sizes on every path, and of several sequences at once.

    The caches hold nonsense afterwards. Raises `RankLost`.
    """
    job = group.job
    sizes = (*(size for size in SIZES if size < most_tokens), most_tokens)
    variants = {}
    for path in range(len(job.paths)):
        samples = [await _seconds(group, path, size, 1) for size in sizes]
        variants[path] = Latency(
            median_s=tuple(min(seconds) for seconds in samples),
            p99_s=tuple(max(seconds) for seconds in samples),
        )
    together = min(SEQUENCES, most_tokens, job.blocks)
    sequence_s = 0.0
    if together > 1:
        apart = median(await _seconds(group, 0, 1, together))
        sequence_s = max(0.0, (apart - median(await _seconds(group, 0, together, 1))) / together)
    profile = LatencyProfile(
        device=job.device,
        threads=job.threads,
        date=datetime.now(UTC).date().isoformat(),
        versions={"torch": torch.__version__},
        batch_sizes=sizes,
        variants=variants,
    )
    return StepTimes(profile, sequence_s)


async def _seconds(group: RankGroup, path: int, tokens: int, sequences: int) -> list[float]:
    """Of steps of `tokens` fresh tokens of each of so many sequences."""
    step = Step(tuple(_runs(group, tokens, sequences)), path)
    seconds = []
    await group.run(step)  # the first one of a size is slower
    for _ in range(REPEATS):
        started = time.perf_counter()
        await group.run(step)
        seconds.append(time.perf_counter() - started)
    return seconds


def _runs(group: RankGroup, tokens: int, sequences: int) -> Iterator[SequenceInput]:
    each = -(-tokens // group.job.block_tokens)
    for sequence in range(sequences):
        yield SequenceInput([1] * tokens, 0, range(sequence * each, (sequence + 1) * each))
