"""Measure the quality (with confidence intervals) and the latency of every stitch of a bundle."""

from __future__ import annotations

from datetime import UTC, datetime

import torch
from rich.progress import Progress
from scipy.stats import binomtest

from ladderstitch.runtime.device import versions
from ladderstitch.scheduling.profiles import LatencyProfile, Quality, QualityTable
from ladderstitch.training.vision.dataset import LabelledImages, normalise
from ladderstitch.vision.bundle import VisionBundle, write_table
from ladderstitch.vision.engine.base import EngineConfig
from ladderstitch.vision.engine.startup import measure_profile, open_engine
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


async def profile(
    bundle: VisionBundle, config: EngineConfig, rounds: int, progress: Progress
) -> LatencyProfile:
    """Return the median and the 99th percentile of `rounds` runs of the served networks.

    Stitches that are not on the frontier are measured twice.
    """
    task = progress.add_task("profile")

    def report(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)

    engine = await open_engine(bundle, config, 0.0, report)
    stitches = [s.id for s in bundle.manifest.config.stitches() if s.usable]
    try:
        return await measure_profile(
            engine, stitches, bundle.quality, config, BATCH_SIZES, rounds, report
        )
    finally:
        engine.close()
