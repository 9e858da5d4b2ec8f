"""Measure the quality (with confidence intervals) and the latency of every stitch of a bundle."""

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
from ladderstitch.vision.bundle import VisionBundle, write_table
from ladderstitch.vision.models.executor import StitchExecutor

CONFIDENCE = 0.95


def calibrate(
    bundle: VisionBundle,
    images: LabelledImages,
    data_name: str,
    batch_size: int,
    progress: Progress,
) -> QualityTable:
    """Return the top-1 accuracy and its Wilson interval per stitch, measured on the served weights.

    The table is written to the bundle after each stitch. A run on the same data (equal name and
    number of images) continues after the last stitch measured.
    """
    model = StitchExecutor(bundle.load_model())
    table = QualityTable.model_construct(
        metric="top-1 accuracy",
        data=data_name,
        n=len(images),
        confidence=CONFIDENCE,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        variants=_read_measured(bundle, data_name, len(images)),
    )
    todo = [stitch for stitch in model.usable if stitch not in table.variants]
    for stitch in progress.track(todo, description="calibrate"):
        correct = count_correct(model, stitch, images, bundle, batch_size)
        interval = binomtest(correct, len(images)).proportion_ci(CONFIDENCE, method="wilson")
        table.variants[stitch] = Quality(
            value=correct / len(images),
            low=round(float(interval.low), 5),
            high=round(float(interval.high), 5),
        )
        write_table(bundle.path / "quality.json", table)
    return table


def count_correct(
    model: StitchExecutor,
    stitch: int,
    images: LabelledImages,
    bundle: VisionBundle,
    batch_size: int,
) -> int:
    """Return the number of images that the stitch classifies correctly."""
    preprocessing = bundle.manifest.preprocessing
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            pixels = images.pixels[start : start + batch_size]
            inputs = normalise(pixels, preprocessing.mean, preprocessing.std)
            predicted = model(inputs, stitch).argmax(1)
            correct += int((predicted == images.labels[start : start + batch_size]).sum())
    return correct


def _read_measured(bundle: VisionBundle, data_name: str, n: int) -> dict[int, Quality]:
    """Return the qualities in the bundle if they were measured on the same data."""
    previous = bundle.quality
    if previous is None or (previous.data, previous.n) != (data_name, n):
        return {}
    return dict(previous.variants)


BATCH_SIZES = (1, 2, 4, 8, 16, 32)
"""Batch sizes that `ladderstitch profile` measures."""


def profile(
    bundle: VisionBundle,
    *,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    rounds: int,
    batch_sizes: tuple[int, ...],
    progress: Progress,
) -> LatencyProfile:
    """Return the median and the 99th percentile of `rounds` runs per (stitch, batch size).

    The pairs take turns, so that a disturbance of the machine affects all of them equally. A pair
    runs twice per turn, and only the second run counts: the first one includes cache misses that
    depend on the previous pair (0.1 ms for a small stitch).
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
            if turn:  # the first round is warm-up
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
    """Return the seconds of one batch, including the copies to and from the device."""
    started = time.perf_counter()
    with torch.inference_mode():
        model(images.to(device), stitch).cpu()
    return time.perf_counter() - started


def _quantile(seconds: list[float], q: float) -> float:
    """Return the quantile with four significant digits."""
    return float(f"{np.quantile(seconds, q):.4g}")
