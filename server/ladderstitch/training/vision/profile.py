"""Measure the latency of every (stitch, batch size) of a bundle on this device."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import numpy as np
import torch
from rich.progress import Progress

from ladderstitch.runtime.environment import device_name, versions
from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch.vision.bundle import Bundle
from ladderstitch.vision.models.executor import InferenceModel

BATCH_SIZES = (1, 2, 4, 8, 16, 32)


def profile(
    bundle: Bundle,
    *,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    rounds: int,
    batch_sizes: tuple[int, ...],
    progress: Progress,
) -> LatencyProfile:
    """Median and 99th percentile of `rounds` runs of each pair.

    The pairs take turns, so that a disturbance of the machine spreads over all of them instead of
    spoiling one. At its turn a pair runs twice and the second counts: the first pays for the caches
    that its predecessor left cold, which depends on who that was (0.1 ms for a small stitch).
    """
    torch.set_num_threads(threads)
    model = InferenceModel(bundle.load_model(dtype).to(device))
    inputs = bundle.manifest.config.inputs
    images = torch.randn(batch_sizes[-1], inputs.in_channels, inputs.image_size, inputs.image_size)
    pairs = [(stitch, batch) for batch in batch_sizes for stitch in model.usable]
    seconds: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
    task = progress.add_task("profile", total=(rounds + 1) * len(pairs))
    for turn in range(rounds + 1):
        for stitch, batch in pairs:
            _run_once(model, images[:batch], stitch, device)
            elapsed = _run_once(model, images[:batch], stitch, device)
            if turn:  # the first is warm-up
                seconds[stitch, batch].append(elapsed)
            progress.advance(task)
    return LatencyProfile(
        device=device_name(device),
        threads=threads,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        batch_sizes=batch_sizes,
        stitches={
            stitch: Latency(
                median_s=tuple(_quantile(seconds[stitch, batch], 0.5) for batch in batch_sizes),
                p99_s=tuple(_quantile(seconds[stitch, batch], 0.99) for batch in batch_sizes),
            )
            for stitch in model.usable
        },
    )


def _run_once(
    model: InferenceModel, images: torch.Tensor, stitch: int, device: torch.device
) -> float:
    started = time.perf_counter()
    with torch.inference_mode():
        model(images.to(device), stitch).cpu()
    return time.perf_counter() - started


def _quantile(seconds: list[float], q: float) -> float:
    return float(f"{np.quantile(seconds, q):.4g}")
