"""The duration of steps, measured and corrected online."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from ladderstitch.scheduling.latency_model import LatencyModel
from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.messages import SequenceInput, Step, Translation
from ladderstitch.text.scheduler.gap_model import GapModel


@dataclass(frozen=True, slots=True)
class ExtraTimes:
    """The seconds that steps take in addition to those of their tokens, on any variant."""

    sequence_s: float = 0.0
    """Seconds of each sequence after the first."""
    cached_token_s: float = 0.0
    """Seconds for each token of the cache that the attention of a step reads."""
    translation_s: float = 0.0
    """Seconds of translating one token for one plane of the cache."""


class StepTimes:
    """The expected seconds of a step by variant, tokens, sequences, and cached tokens it reads.

    They are a profile over the tokens of a step plus the extra times, times the current slowdown of
    this machine, plus the pause after the step, which is learned (`GapModel`).
    """

    def __init__(
        self, profile: LatencyProfile, extra: ExtraTimes | None = None, probability: float = 0.99
    ) -> None:
        self.latency = LatencyModel(profile, probability)
        self.extra = extra or ExtraTimes()
        profiled = self.latency.view.profiled
        self._fastest = min(profiled, key=lambda variant: profiled[variant][1])
        self._gaps = GapModel()

    def copy(self) -> StepTimes:
        """Return the times as they were measured, without what has been learned since."""
        return StepTimes(self.latency.profile, self.extra, self.latency.probability)

    @property
    def max_step_tokens(self) -> int:
        """The largest number of tokens of one step."""
        return self.latency.view.max_batch_size

    @property
    def shortest_token_s(self) -> float:
        """The expected seconds of a step of one token on the fastest variant."""
        return self.expected(self._fastest, 1)

    def expected(
        self, variant: int, num_tokens: int, num_sequences: int = 1, num_cached: int = 0
    ) -> float:
        """Return the expected seconds of `num_tokens` tokens, at least 1.

        Beyond `max_step_tokens` the seconds grow in proportion to the tokens.
        """
        view = self.latency.view
        seconds = view.expected(variant, min(num_tokens, view.max_batch_size)) * max(
            1.0, num_tokens / view.max_batch_size
        )
        return (
            seconds + self._extra_s(num_sequences, num_cached) + self._gaps.expected(num_sequences)
        )

    def cached_s(self, num_cached: int) -> float:
        """Return the expected seconds of reading this number of cached tokens once."""
        return num_cached * self.extra.cached_token_s * self.latency.view.slowdown

    def _extra_s(self, num_sequences: int, num_cached: int) -> float:
        sequences_s = max(0, num_sequences - 1) * self.extra.sequence_s
        return sequences_s * self.latency.view.slowdown + self.cached_s(num_cached)

    def largest_fit(
        self, variant: int, slack_s: float, num_sequences: int, num_cached: int = 0
    ) -> int:
        """Return the largest number of tokens, of all sequences, of a step within the slack."""
        view = self.latency.view
        extra_s = self._extra_s(num_sequences, num_cached) * view.tail
        left_s = slack_s - extra_s - self._gaps.expected(num_sequences)
        return view.largest_fit(variant, left_s) if left_s > 0 else 0

    def prefill_s(self, variant: int, num_tokens: int) -> float:
        """Return the expected seconds of a prompt, computed in steps of `max_step_tokens`."""
        largest = self.max_step_tokens
        full_steps, rest = divmod(num_tokens, largest)
        rest_s = self.expected(variant, rest) if rest else 0.0
        return full_steps * self.expected(variant, largest) + rest_s

    def translation_s(self, num_tokens: int, num_planes: int) -> float:
        """Return the expected seconds of translating keys and values of `num_planes` layers."""
        return num_tokens * num_planes * self.extra.translation_s * self.latency.view.slowdown

    def observe(
        self, variant: int, num_tokens: int, num_sequences: int, num_cached: int, seconds: float
    ) -> float:
        """Learn from the compute of one step; return its actual over its expected seconds."""
        extra_s = self._extra_s(num_sequences, num_cached)
        return self.latency.observe(variant, num_tokens, max(seconds - extra_s, 0.1 * seconds))

    def observe_gap(self, num_sequences: int, seconds: float) -> None:
        """Learn the seconds between a step of `num_sequences` and the next one."""
        self._gaps.observe(num_sequences, seconds)


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
SHORT_STEP_TOKENS = 8
"""Steps of at most this number of tokens are timed more often, as noise is larger for them."""
NUM_TURNS = 4
"""Turns in which each variant's short step is timed; longer ones have one."""
NUM_REPEATS = 3
"""Timed runs of a step in a turn, after one run that is not timed."""
MEASURED_SEQUENCES = 8
"""Sequences of the step that measures the seconds of an additional sequence."""
MIN_MEASURED_CACHED = 32
"""Fewest cached tokens of a sequence whose reading can be measured."""


async def measure_steps(group: RankGroup, max_step_tokens: int) -> StepTimes:
    """Return the step times of a group, measured with prompts of several sizes on every variant.

    The variants take turns, so that a disturbance of the machine affects all of them. Further steps
    measure the extra times. The caches hold arbitrary values afterwards. Raises `RankLost` if a
    rank died.
    """
    config = group.rank_config
    sizes = (*(size for size in MEASURED_STEP_TOKENS if size < max_step_tokens), max_step_tokens)
    by_size = [await _time_variants(group, size) for size in sizes]
    variants = {
        variant: Latency(
            median_s=tuple(_undisturbed(seconds[variant]) for seconds in by_size),
            p99_s=tuple(max(seconds[variant]) for seconds in by_size),
        )
        for variant in range(len(config.paths))
    }
    profile = LatencyProfile(
        device=config.device,
        threads=config.threads,
        date=datetime.now(UTC).date().isoformat(),
        versions={"torch": torch.__version__},
        batch_sizes=sizes,
        variants=variants,
    )
    return StepTimes(profile, await _time_extra(group, max_step_tokens))


async def _time_variants(group: RankGroup, num_tokens: int) -> list[list[float]]:
    """Return the seconds of repeated steps of a sequence's `num_tokens`, by variant, in turns."""
    variants = range(len(group.rank_config.paths))
    steps = [Step(tuple(_prompts(group, num_tokens, 1)), variant) for variant in variants]
    seconds: list[list[float]] = [[] for _ in variants]
    turns = NUM_TURNS if num_tokens <= SHORT_STEP_TOKENS else 1
    for _ in range(turns):
        for variant, step in enumerate(steps):
            await _time_step(group, step)  # the weights of another variant are in the CPU's caches
            seconds[variant] += [await _time_step(group, step) for _ in range(NUM_REPEATS)]
    return seconds


def _undisturbed(seconds: list[float]) -> float:
    """Return the lower quartile of repeated measurements, of which noise lengthens some."""
    return sorted(seconds)[len(seconds) // 4]


async def _time_extra(group: RankGroup, max_step_tokens: int) -> ExtraTimes:
    """Return the seconds of additional sequences, of cached tokens, and of translations.

    The first two are measured on variant 0.
    """
    config = group.rank_config
    count = min(MEASURED_SEQUENCES, max_step_tokens, config.blocks)
    sequence_s = cached_token_s = 0.0
    if count > 1:
        together_s = await _time_repeated(group, Step(tuple(_prompts(group, count, 1)), 0))
        separate_s = await _time_repeated(group, Step(tuple(_prompts(group, 1, count)), 0))
        sequence_s = max(0.0, separate_s - together_s) / (count - 1)
    longest = min(config.max_model_len, config.blocks // count * config.block_tokens)
    if longest > MIN_MEASURED_CACHED:
        start = longest - 1
        far = tuple(
            SequenceInput(prompt.tokens[-1:], start, prompt.blocks)
            for prompt in _prompts(group, longest, count)
        )
        near_s = await _time_repeated(group, Step(tuple(_prompts(group, 1, count)), 0))
        far_s = await _time_repeated(group, Step(far, 0))
        cached_token_s = max(0.0, far_s - near_s) / (count * start)
    translation_s = await _time_translation(group, max_step_tokens)
    return ExtraTimes(sequence_s, cached_token_s, translation_s)


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
        plain_s = await _time_repeated(group, Step((lone,), target))
        both_s = await _time_repeated(group, Step((lone,), target, translations=(translation,)))
        seconds.append((both_s - plain_s) / missing[source, target] / num_tokens)
    return max(0.0, sum(seconds) / 2)


async def _time_repeated(group: RankGroup, step: Step) -> float:
    """Return the seconds of a step, of which some repeated runs may be disturbed."""
    await _time_step(group, step)  # the first run of a size is slower
    short = step.num_tokens <= SHORT_STEP_TOKENS and not step.translations
    repeats = NUM_REPEATS * (NUM_TURNS if short else 1)
    return _undisturbed([await _time_step(group, step) for _ in range(repeats)])


async def _time_step(group: RankGroup, step: Step) -> float:
    """Return the seconds of one run of a step."""
    started = time.perf_counter()
    await group.run(step)
    return time.perf_counter() - started


def _prompts(group: RankGroup, num_tokens: int, num_sequences: int) -> Iterator[SequenceInput]:
    """Yield sequences of `num_tokens` tokens, each with blocks of its own."""
    blocks_each = -(-num_tokens // group.rank_config.block_tokens)
    for number in range(num_sequences):
        blocks = range(number * blocks_each, (number + 1) * blocks_each)
        yield SequenceInput([1] * num_tokens, 0, blocks)
