"""Warm-up: run and time every (stitch, batch size) before a replica reports that it is ready."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from statistics import median

import numpy as np
import torch

from ladderstitch.runtime.device import device_name, versions
from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch.scheduling.requests import Pixels
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.base import Engine, WorkerConfig

ASSUMED_TAIL = 1.3
"""Ratio of p99 to median that is assumed after a few warm-up runs; it is corrected online."""
STEADY_S = 0.02
"""Runs of at least this duration vary little, so that one timed run is enough."""


def batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """Return the powers of two below the largest batch size, and that size itself."""
    sizes = [
        1 << power for power in range(max_batch_size.bit_length()) if 1 << power < max_batch_size
    ]
    return (*sizes, max_batch_size)


async def warm_up(
    engine: Engine,
    bundle: VisionBundle,
    config: WorkerConfig,
    on_progress: Callable[[int, int], None],
) -> LatencyProfile:
    """Run every (stitch, batch size) and return the latency profile of this machine.

    `on_progress` is called with the number of finished runs and of all runs. If the bundle has a
    profile, it keeps its shape and is scaled by the median ratio of this machine to it, which
    varies less than a few runs per pair. Without a profile, the result consists of the runs' times.
    """
    sizes = batch_sizes(config.max_batch_size)
    shipped = bundle.latency if _covers(bundle.latency, sizes) else None
    images = np.zeros((config.max_batch_size, *config.image_shape), np.float32)
    stitches = [s.id for s in bundle.manifest.config.stitches() if s.usable]
    pairs = [(stitch, size) for size in sizes for stitch in stitches]
    seconds = await _time_runs(engine, images, pairs, 2 if shipped else 5, on_progress)
    medians = {pair: median(times) for pair, times in seconds.items()}
    if shipped is not None:
        return _scale_profile(shipped, medians, sizes)
    return LatencyProfile(
        device=device_name(torch.device(config.device)),
        threads=config.threads,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        batch_sizes=sizes,
        variants={
            stitch: Latency(
                median_s=tuple(medians[stitch, size] for size in sizes),
                p99_s=tuple(ASSUMED_TAIL * medians[stitch, size] for size in sizes),
            )
            for stitch in stitches
        },
    )


async def _time_runs(
    engine: Engine,
    images: Pixels,
    pairs: Sequence[tuple[int, int]],
    rounds: int,
    on_progress: Callable[[int, int], None],
) -> dict[tuple[int, int], list[float]]:
    """Return seconds of compute of every round but the first, by (stitch, batch size)."""
    seconds: dict[tuple[int, int], list[float]] = defaultdict(list)
    done = 0
    for turn in range(rounds):
        for stitch, size in pairs:
            runs = seconds[stitch, size]
            if turn < 2 or runs[-1] < STEADY_S:
                result = await engine.forward([images[:size]], stitch)
                if turn:  # the first round includes allocation and kernel selection
                    runs.append(result.compute_s)
            done += 1
            on_progress(done, rounds * len(pairs))
    return seconds


def _covers(profile: LatencyProfile | None, sizes: tuple[int, ...]) -> bool:
    """Return whether the profile has all these batch sizes."""
    return profile is not None and set(sizes) <= set(profile.batch_sizes)


def _scale_profile(
    profile: LatencyProfile, medians: dict[tuple[int, int], float], sizes: tuple[int, ...]
) -> LatencyProfile:
    """Return the profile at these batch sizes, times the median of measured over profiled times."""
    index = [profile.batch_sizes.index(size) for size in sizes]
    factor = median(
        seconds / profile.variants[stitch].median_s[profile.batch_sizes.index(size)]
        for (stitch, size), seconds in medians.items()
    )
    return profile.model_copy(
        update={
            "batch_sizes": sizes,
            "variants": {
                stitch: Latency(
                    median_s=tuple(factor * latency.median_s[i] for i in index),
                    p99_s=tuple(factor * latency.p99_s[i] for i in index),
                )
                for stitch, latency in profile.variants.items()
            },
        }
    )
