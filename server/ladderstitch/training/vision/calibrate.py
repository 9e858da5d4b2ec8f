"""Measure the quality of every stitch of a bundle, with a confidence interval, resumably."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import numpy as np
import torch
from rich.progress import Progress
from scipy.stats import binomtest

from ladderstitch.runtime.device import device_name, versions
from ladderstitch.scheduling.profiles import Latency, LatencyProfile, Quality, QualityTable
from ladderstitch.training.vision.dataset import LabelledImages, normalise
from ladderstitch.vision.bundle import Bundle, write_table
from ladderstitch.vision.models.executor import StitchExecutor

CONFIDENCE = 0.95


def calibrate(
    bundle: Bundle, images: LabelledImages, data_name: str, batch_size: int, progress: Progress
) -> QualityTable:
    """Top-1 accuracy with its Wilson interval per stitch, on the weights as they are served.

    Written to the bundle after each stitch; a run on the same data goes on where the last stopped.
    """
    model = StitchExecutor(bundle.load_model())
    table = QualityTable.model_construct(
        metric="top-1 accuracy",
        data=data_name,
        n=len(images),
        confidence=CONFIDENCE,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        variants=_already_measured(bundle, data_name, len(images)),
    )
    todo = [stitch for stitch in model.usable if stitch not in table.variants]
    for stitch in progress.track(todo, description="calibrate"):
        right = count_right(model, stitch, images, bundle, batch_size)
        interval = binomtest(right, len(images)).proportion_ci(CONFIDENCE, method="wilson")
        table.variants[stitch] = Quality(
            value=right / len(images),
            low=round(float(interval.low), 5),
            high=round(float(interval.high), 5),
        )
        write_table(bundle.path / "quality.json", table)
    return table


def count_right(
    model: StitchExecutor, stitch: int, images: LabelledImages, bundle: Bundle, batch_size: int
) -> int:
    """How many of the images the stitch classifies right."""
    preprocessing = bundle.manifest.preprocessing
    right = 0
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            pixels = images.pixels[start : start + batch_size]
            inputs = normalise(pixels, preprocessing.mean, preprocessing.std)
            answers = model(inputs, stitch).argmax(1)
            right += int((answers == images.labels[start : start + batch_size]).sum())
    return right


def _already_measured(bundle: Bundle, data_name: str, n: int) -> dict[int, Quality]:
    previous = bundle.quality
    if previous is None or (previous.data, previous.n) != (data_name, n):
        return {}
    return dict(previous.variants)


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
    model = StitchExecutor(bundle.load_model(dtype).to(device))
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
        variants={
            stitch: Latency(
                median_s=tuple(_quantile(seconds[stitch, batch], 0.5) for batch in batch_sizes),
                p99_s=tuple(_quantile(seconds[stitch, batch], 0.99) for batch in batch_sizes),
            )
            for stitch in model.usable
        },
    )


def _run_once(
    model: StitchExecutor, images: torch.Tensor, stitch: int, device: torch.device
) -> float:
    started = time.perf_counter()
    with torch.inference_mode():
        model(images.to(device), stitch).cpu()
    return time.perf_counter() - started


def _quantile(seconds: list[float], q: float) -> float:
    return float(f"{np.quantile(seconds, q):.4g}")
