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
from ladderstitch.vision.engine.compiled import CompiledExecutor
from ladderstitch.vision.engine.startup import (
    measure_profile,
    open_engine,
    open_executor,
    served_variants,
)

CONFIDENCE = 0.95


def calibrate(
    bundle: VisionBundle,
    images: LabelledImages,
    data_name: str,
    batch_size: int,
    progress: Progress,
) -> QualityTable:
    """Return the top-1 accuracy and its Wilson interval per variant, measured as it is served.

    The table is written to the bundle after each variant. A run on the same data (equal name and
    number of images) continues after the last variant measured.
    """
    executor = open_executor(bundle, torch.get_num_threads(), lambda done, total: None)
    table = QualityTable.model_construct(
        metric="top-1 accuracy",
        data=data_name,
        n=len(images),
        confidence=CONFIDENCE,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        variants=_read_measured(bundle, data_name, len(images)),
    )
    usable = [variant.id for variant in bundle.manifest.variants() if variant.usable]
    todo = [variant for variant in usable if variant not in table.variants]
    for variant in progress.track(todo, description="calibrate"):
        correct = count_correct(executor, variant, images, bundle, batch_size)
        interval = binomtest(correct, len(images)).proportion_ci(CONFIDENCE, method="wilson")
        table.variants[variant] = Quality(
            value=correct / len(images),
            low=round(float(interval.low), 5),
            high=round(float(interval.high), 5),
        )
        write_table(bundle.path / "quality.json", table)
    return table


def count_correct(
    executor: CompiledExecutor,
    variant: int,
    images: LabelledImages,
    bundle: VisionBundle,
    batch_size: int,
) -> int:
    """Return the number of images that the variant classifies correctly."""
    preprocessing = bundle.manifest.preprocessing
    correct = 0
    for start in range(0, len(images), batch_size):
        pixels = images.pixels[start : start + batch_size]
        inputs = normalise(pixels, preprocessing.mean, preprocessing.std)
        predicted = executor(inputs.numpy(), variant).argmax(1)
        correct += int((predicted == images.labels[start : start + batch_size].numpy()).sum())
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
    stitches = [variant.id for variant in served_variants(bundle, config) if variant.usable]
    try:
        return await measure_profile(
            engine, stitches, bundle.quality, config, BATCH_SIZES, rounds, report
        )
    finally:
        engine.close()
