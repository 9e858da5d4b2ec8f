"""Run every (stitch, batch size) before a replica calls itself ready, and time them meanwhile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median

import numpy as np
import torch

from ladderstitch.runtime.device import device_name, versions
from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch.vision.bundle import Bundle
from ladderstitch.vision.engine.base import Engine, WorkerConfig

MEASURED_TAIL = 1.3
"""p99 over median assumed where only a few warm-up runs were timed; corrected online."""


def batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """Powers of two up to the largest batch, which is always among them."""
    sizes = [
        1 << power for power in range(max_batch_size.bit_length()) if 1 << power < max_batch_size
    ]
    return (*sizes, max_batch_size)


STEADY_S = 0.02
"""Runs as long as this vary little from one to the next: one of them is enough."""


async def warm_up(
    engine: Engine, bundle: Bundle, config: WorkerConfig, advance: Callable[[int, int], None]
) -> LatencyProfile:
    """Latency of each pair on this machine; `advance` is told how many of how many runs are done.

    A profile that came with the bundle keeps its shape and is scaled by the median ratio of this
    machine to it, which is steadier than a handful of runs per pair; without one the runs are all
    there is.
    """
    sizes = batch_sizes(config.max_batch_size)
    shipped = bundle.latency if covers(bundle.latency, sizes) else None
    rounds = 2 if shipped else 5
    images = np.zeros((config.max_batch_size, *config.image_shape), np.float32)
    stitches = [s.id for s in bundle.manifest.config.stitches() if s.usable]
    seconds: dict[tuple[int, int], list[float]] = defaultdict(list)
    done = 0
    for turn in range(rounds):
        for size in sizes:
            for stitch in stitches:
                runs = seconds[stitch, size]
                if turn < 2 or runs[-1] < STEADY_S:
                    result = await engine.forward([images[:size]], stitch)
                    if turn:  # the first pays for allocation and kernel selection
                        runs.append(result.compute_s)
                done += 1
                advance(done, rounds * len(stitches) * len(sizes))
    measured = {pair: median(times) for pair, times in seconds.items()}
    if shipped is not None:
        return scaled_to(shipped, measured, sizes)
    return LatencyProfile(
        device=device_name(torch.device(config.device)),
        threads=config.threads,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        batch_sizes=sizes,
        variants={
            stitch: Latency(
                median_s=tuple(measured[stitch, size] for size in sizes),
                p99_s=tuple(MEASURED_TAIL * measured[stitch, size] for size in sizes),
            )
            for stitch in stitches
        },
    )


def covers(profile: LatencyProfile | None, sizes: tuple[int, ...]) -> bool:
    return profile is not None and set(sizes) <= set(profile.batch_sizes)


def scaled_to(
    profile: LatencyProfile, measured: dict[tuple[int, int], float], sizes: tuple[int, ...]
) -> LatencyProfile:
    """The profile at these batch sizes, times the median of measured over profiled medians."""
    index = [profile.batch_sizes.index(size) for size in sizes]
    factor = median(
        seconds / profile.variants[stitch].median_s[profile.batch_sizes.index(size)]
        for (stitch, size), seconds in measured.items()
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
