"""The duration of steps, measured and corrected online, and the deadline of the next token."""

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
from ladderstitch.text.messages import SequenceInput, Step, Translation

DEFAULT_TTFT_S = 10.0
"""Time to first token that an answer without a budget is scheduled for."""
DEFAULT_TPOT_S = 0.25
"""Time per output token that an answer without a budget is scheduled for."""


def token_deadline(
    budget: TokenBudget,
    arrival: float,
    first_token_at: float | None,
    num_generated: int,
    max_tokens: int,
    token_s: float,
) -> float:
    """Return the instant until which an answer needs its next token, on the clock of `arrival`.

    The next token is number `num_generated`, from 0, of at most `max_tokens`. `first_token_at` is
    the instant of token 0, None before it; `token_s` is the shortest time of one token. An answer
    that is ahead of its budget keeps that time: it may fall behind for a while and still meet
    its mean time per token.
    """
    end = arrival + budget.answer_s
    if first_token_at is None:
        first = arrival + min(budget.first_token_s, DEFAULT_TTFT_S)
        return min(first, end - token_s * (max_tokens - 1))
    paced = first_token_at + num_generated * min(budget.per_token_s, DEFAULT_TPOT_S)
    if math.isinf(end) or max_tokens < 2:
        return paced
    return min(paced, first_token_at + (end - first_token_at) * num_generated / (max_tokens - 1))


class StepTimes:
    """The expected seconds of a step by variant, tokens and sequences.

    They are a profile over the tokens of a step, plus `sequence_s` for every sequence after the
    first, times the current slowdown of this machine.
    """

    def __init__(
        self,
        profile: LatencyProfile,
        sequence_s: float,
        probability: float = 0.99,
        translation_s: float = 0.0,
    ) -> None:
        """Set up; `translation_s` are the seconds of one token and plane of the cache."""
        self.latency = LatencyModel(profile, probability)
        self._sequence_s, self._translation_s = sequence_s, translation_s

    def copy(self) -> StepTimes:
        """Return the times as they were measured, without what has been learned since."""
        latency = self.latency
        return StepTimes(
            latency.profile, self._sequence_s, latency.probability, self._translation_s
        )

    @property
    def max_step_tokens(self) -> int:
        """The largest number of tokens of one step."""
        return self.latency.view.max_batch_size

    def expected(self, variant: int, num_tokens: int, num_sequences: int = 1) -> float:
        """Return the expected seconds of `num_tokens` tokens, at least 1.

        Beyond `max_step_tokens` the seconds grow in proportion to the tokens.
        """
        view = self.latency.view
        seconds = view.expected(variant, min(num_tokens, view.max_batch_size)) * max(
            1.0, num_tokens / view.max_batch_size
        )
        return seconds + max(0, num_sequences - 1) * self._sequence_s * view.slowdown

    def largest_fit(self, variant: int, slack_s: float, num_sequences: int) -> int:
        """Return the largest number of tokens, of all sequences, of a step within the slack."""
        view = self.latency.view
        extra_s = max(0, num_sequences - 1) * self._sequence_s * view.slowdown * view.tail
        left_s = slack_s - extra_s
        return view.largest_fit(variant, left_s) if left_s > 0 else 0

    def prefill_s(self, variant: int, num_tokens: int) -> float:
        """Return the expected seconds of a prompt, computed in steps of `max_step_tokens`."""
        largest = self.max_step_tokens
        full_steps, rest = divmod(num_tokens, largest)
        rest_s = self.expected(variant, rest) if rest else 0.0
        return full_steps * self.expected(variant, largest) + rest_s

    def translation_s(self, num_tokens: int, num_planes: int) -> float:
        """Return the expected seconds of translating keys and values of `num_planes` layers."""
        return num_tokens * num_planes * self._translation_s * self.latency.view.slowdown

    def observe(self, variant: int, num_tokens: int, num_sequences: int, seconds: float) -> float:
        """Learn from one step; return its actual over its expected seconds."""
        extra_s = max(0, num_sequences - 1) * self._sequence_s * self.latency.view.slowdown
        return self.latency.observe(variant, num_tokens, max(seconds - extra_s, 0.1 * seconds))


def placeholder_profile(num_variants: int, max_step_tokens: int) -> LatencyProfile:
    """Return the profile used before measuring: 10 ms for every step of every variant.

    With equal times only the order of requests decides, not the variant.
    """
    sizes = (1, max_step_tokens) if max_step_tokens > 1 else (1,)
    same = Latency(median_s=(0.01,) * len(sizes), p99_s=(0.01,) * len(sizes))
    return LatencyProfile(
        device="unmeasured",
        threads=1,
        date="",
        versions={},
        batch_sizes=sizes,
        variants=dict.fromkeys(range(num_variants), same),
    )


MEASURED_STEP_TOKENS = (1, 8, 64)
"""Tokens of the steps that are measured, besides the largest step."""
NUM_REPEATS = 3
"""Timed runs of each step, after one run that is not timed."""
MEASURED_SEQUENCES = 8
"""Sequences of the step that measures the seconds of an additional sequence."""


async def measure_steps(group: RankGroup, max_step_tokens: int) -> StepTimes:
    """Return the step times of a group, measured with prompts of several sizes on every variant.

    One more step measures several sequences at once. The caches hold arbitrary values afterwards.
    Raises `RankLost` if a rank died.
    """
    config = group.rank_config
    sizes = (*(size for size in MEASURED_STEP_TOKENS if size < max_step_tokens), max_step_tokens)
    variants = {}
    for variant in range(len(config.paths)):
        samples = [await _time_step(group, variant, size, 1) for size in sizes]
        variants[variant] = Latency(
            median_s=tuple(min(seconds) for seconds in samples),
            p99_s=tuple(max(seconds) for seconds in samples),
        )
    num_sequences = min(MEASURED_SEQUENCES, max_step_tokens, config.blocks)
    sequence_s = 0.0
    if num_sequences > 1:
        separate_s = median(await _time_step(group, 0, 1, num_sequences))
        together_s = median(await _time_step(group, 0, num_sequences, 1))
        sequence_s = max(0.0, (separate_s - together_s) / num_sequences)
    profile = LatencyProfile(
        device=config.device,
        threads=config.threads,
        date=datetime.now(UTC).date().isoformat(),
        versions={"torch": torch.__version__},
        batch_sizes=sizes,
        variants=variants,
    )
    translation_s = await _time_translation(group, max_step_tokens)
    return StepTimes(profile, sequence_s, translation_s=translation_s)


async def _time_translation(group: RankGroup, num_tokens: int) -> float:
    """Return the seconds of translating one token for one plane of the cache; 0 without a family.

    It is the mean over both directions between the paths that have the fewest planes in common.
    """
    config = group.rank_config
    if not config.anchors:
        return 0.0
    routes, count = config.path_routes, len(config.paths)
    missing = {
        (source, target): len(config.family.missing_planes(routes[source], routes[target]))
        for source in range(count)
        for target in range(count)
    }
    pair = max(missing, key=missing.__getitem__)
    if not missing[pair]:
        return 0.0
    (prompt,) = _prompts(group, num_tokens, 1)
    lone = SequenceInput(prompt.tokens[:1], 0, prompt.blocks)
    seconds = []
    for source, target in (pair, pair[::-1]):
        await group.run(Step((prompt,), source))
        translation = Translation(prompt.tokens, 0, prompt.blocks, source, target)
        plain = await _time_repeated(group, Step((lone,), target))
        both = await _time_repeated(group, Step((lone,), target, translations=(translation,)))
        seconds.append((min(both) - min(plain)) / missing[source, target] / num_tokens)
    return max(0.0, sum(seconds) / 2)


async def _time_step(
    group: RankGroup, variant: int, num_tokens: int, num_sequences: int
) -> list[float]:
    """Return the seconds of repeated steps of `num_tokens` new tokens of each sequence."""
    return await _time_repeated(
        group, Step(tuple(_prompts(group, num_tokens, num_sequences)), variant)
    )


async def _time_repeated(group: RankGroup, step: Step) -> list[float]:
    """Return the seconds of repeated runs of a step."""
    seconds = []
    await group.run(step)  # the first run of a size is slower
    for _ in range(NUM_REPEATS):
        started = time.perf_counter()
        await group.run(step)
        seconds.append(time.perf_counter() - started)
    return seconds


def _prompts(group: RankGroup, num_tokens: int, num_sequences: int) -> Iterator[SequenceInput]:
    """Yield sequences of `num_tokens` tokens, each with blocks of its own."""
    blocks_each = -(-num_tokens // group.rank_config.block_tokens)
    for number in range(num_sequences):
        blocks = range(number * blocks_each, (number + 1) * blocks_each)
        yield SequenceInput([1] * num_tokens, 0, blocks)
