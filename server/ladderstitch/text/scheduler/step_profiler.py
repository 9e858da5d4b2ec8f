"""How long steps take on this machine, measured on the ranks before the first call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from statistics import median

import torch

from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.scheduler.step_times import StepTimes
from ladderstitch.text.step import Run, Step

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
    stitches = {}
    for path in range(len(job.paths)):
        samples = [await _seconds(group, path, size, 1) for size in sizes]
        stitches[path] = Latency(
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
        stitches=stitches,
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


def _runs(group: RankGroup, tokens: int, sequences: int) -> Iterator[Run]:
    each = -(-tokens // group.job.block_tokens)
    for sequence in range(sequences):
        yield Run([1] * tokens, 0, range(sequence * each, (sequence + 1) * each))
