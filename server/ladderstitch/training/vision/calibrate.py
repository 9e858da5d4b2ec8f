"""Measure the quality (with confidence intervals) and the latency of every stitch of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from scipy.stats import binomtest
from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.runtime.device import versions
from ladderstitch.scheduling.cascades import Cascade
from ladderstitch.scheduling.profiles import LatencyProfile, Quality, QualityTable
from ladderstitch.scheduling.requests import Logits
from ladderstitch.training.vision.confidence import (
    MIN_IMAGES,
    Confidence,
    find_cascades,
    fit_confidence,
)
from ladderstitch.training.vision.dataset import (
    LabelledImages,
    is_idx_folder,
    load_idx_folder,
    normalise,
)
from ladderstitch.training.vision.image_files import find_images, load_labelled, load_pixels
from ladderstitch.training.vision.measure_metric import calibrate_by_metric, most_expensive
from ladderstitch.training.vision.recalibrate import needs_statistics, recalibrate
from ladderstitch.vision.bundle import VisionBundle, write_table
from ladderstitch.vision.engine.base import EngineConfig
from ladderstitch.vision.engine.compiled_executor import CompiledExecutor
from ladderstitch.vision.engine.startup import (
    measure_profile,
    open_engine,
    open_executor,
    served_variants,
)
from ladderstitch.vision.frontier import variant_costs

CONFIDENCE = 0.95
IDX_NAME = "Fashion-MNIST test"
"""Name of IDX files whose name the user does not state."""
RESUMED_BATCH = 100
"""Images of a batch of a variant that an interrupted run has measured."""
ACCURACY = "top-1 accuracy"


def calibrate(
    bundle: VisionBundle,
    images: LabelledImages,
    data_name: str,
    batch_size: int,
    progress: Progress,
    metric: str = ACCURACY,
) -> QualityTable:
    """Return the top-1 accuracy and its Wilson interval per variant, measured as it is served.

    The table is written to the bundle after each variant. A run on the same data (equal name and
    number of images) continues after the last variant measured. `metric` names what the score is if
    the labels are predictions. From `MIN_IMAGES` on, the table has temperatures and cascades, too.
    """
    executor = open_executor(bundle, torch.get_num_threads(), lambda done, total: None)
    table = QualityTable.model_construct(
        metric=metric,
        data=data_name,
        n=len(images),
        confidence=CONFIDENCE,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        variants=_read_measured(bundle, metric, data_name, len(images)),
    )
    usable = [variant.id for variant in bundle.manifest.variants() if variant.usable]
    todo = [variant for variant in usable if variant not in table.variants]
    labels, known = images.labels.numpy(), {}
    for variant in progress.track(todo, description="calibrate"):
        logits = compute_logits(executor, variant, images, bundle, batch_size)
        correct = int((logits.argmax(axis=1) == labels).sum())
        found = None
        if len(images) >= MIN_IMAGES:
            found = known[variant] = fit_confidence(logits, labels)
        interval = binomtest(correct, len(images)).proportion_ci(CONFIDENCE, method="wilson")
        table.variants[variant] = Quality(
            value=correct / len(images),
            low=round(float(interval.low), 5),
            high=round(float(interval.high), 5),
            temperature=None if found is None else found.temperature,
            calibration_error=None if found is None else found.calibration_error,
        )
        write_table(bundle.path / "quality.json", table)
    if len(images) >= MIN_IMAGES:
        _measure_again(bundle, executor, table, known, images)
        table = _with_agreements(table, known)
        cascades = _measure_cascades(bundle, executor, table, known, images)
        table = table.model_copy(update={"cascades": cascades})
        write_table(bundle.path / "quality.json", table)
    return table


def _measure_again(
    bundle: VisionBundle,
    executor: CompiledExecutor,
    table: QualityTable,
    known: dict[int, Confidence],
    images: LabelledImages,
) -> None:
    """Add the variants that an interrupted run has measured to `known`."""
    for variant in table.variants.keys() - known.keys():
        logits = compute_logits(executor, variant, images, bundle, RESUMED_BATCH)
        temperature = table.variants[variant].temperature
        known[variant] = fit_confidence(logits, images.labels.numpy(), temperature)


def _with_agreements(table: QualityTable, known: Mapping[int, Confidence]) -> QualityTable:
    """Return the table with the temperatures of `known`, and with agreements with the best one."""
    best = max(known, key=lambda variant: table.value(variant))
    variants = {
        variant: quality.model_copy(
            update={
                "temperature": known[variant].temperature,
                "calibration_error": known[variant].calibration_error,
                "agreement": float((known[variant].classes == known[best].classes).mean()),
            }
        )
        for variant, quality in table.variants.items()
    }
    return table.model_copy(update={"variants": variants})


def _measure_cascades(
    bundle: VisionBundle,
    executor: CompiledExecutor,
    table: QualityTable,
    known: dict[int, Confidence],
    images: LabelledImages,
) -> tuple[Cascade, ...]:
    """Return the cascades of a measured table.

    Costs are latencies if the bundle has them, and multiply-accumulates otherwise.
    """
    costs = {variant: float(cost.macs) for variant, cost in variant_costs(bundle).items()}
    if bundle.latency is not None and table.variants.keys() <= bundle.latency.variants.keys():
        costs = {variant: bundle.latency.alone_s(variant) for variant in table.variants}
    quality = {variant: q.value for variant, q in table.variants.items()}
    scaling = bundle.manifest.preprocessing
    image = normalise(images.pixels[:1], scaling.mean, scaling.std).numpy()
    return find_cascades(executor, known, quality, costs, image)


def calibrate_files(
    bundle: VisionBundle,
    data: Path | None,
    images: Path | None,
    split: str,
    name: str | None,
    batch_size: int,
    progress: Progress,
    metric: str | None = None,
    targets: Path | None = None,
) -> QualityTable:
    """Return the quality on labelled `data`, or else the agreement on unlabelled `images`.

    `data` is a folder of IDX files, of which `split` is measured, a folder with one subfolder per
    class, or a CSV file. Models that take or return tensors, and other metrics than accuracy, are
    measured by `calibrate_by_metric`. Raises `ConfigError` without one of both, and `DataError` for
    files that cannot be read.
    """
    manifest = bundle.manifest
    classifies = manifest.takes_images and not manifest.outputs
    if not classifies or metric not in (None, "accuracy" if data is not None else "agreement"):
        return calibrate_by_metric(
            bundle, metric, data, images, targets, name, batch_size, progress
        )
    if targets is not None:
        raise ConfigError("targets: expected none for accuracy, whose labels are in --data")
    if data is None and images is None:
        raise ConfigError("data: expected labelled images, or --images, got none")
    if data is None:
        assert images is not None
        pixels = load_pixels(find_images(images), manifest.preprocessing)
        recalibrate(bundle, pixels, progress)
        name = name or f"{len(pixels)} images of {images.name}"
        reference = most_expensive(bundle)
        return calibrate_agreement(bundle, pixels, name, batch_size, progress, reference)
    if is_idx_folder(data):
        inputs = manifest.preprocessing
        shape = (inputs.channels, inputs.height, inputs.width)
        labelled = load_idx_folder(data, split, shape, len(manifest.labels))
        known = IDX_NAME
        if needs_statistics(bundle):
            trained = load_idx_folder(data, "train", shape, len(manifest.labels))
            recalibrate(bundle, trained.pixels, progress)
    else:
        labelled = load_labelled(data, manifest.labels, manifest.preprocessing)
        recalibrate(bundle, labelled.pixels, progress)
        known = f"{len(labelled)} labelled images of {data.name}"
    return calibrate(bundle, labelled, name or known, batch_size, progress)


def calibrate_agreement(
    bundle: VisionBundle,
    pixels: Tensor,
    data_name: str,
    batch_size: int,
    progress: Progress,
    reference: int,
) -> QualityTable:
    """Return the share of images on which each variant predicts the class of a reference variant.

    `pixels` is uint8 [N, C, H, W], without labels. The table is written as `calibrate` does.
    """
    executor = open_executor(bundle, torch.get_num_threads(), lambda done, total: None)
    scaling = bundle.manifest.preprocessing
    labels = [
        executor(normalise(part, scaling.mean, scaling.std).numpy(), reference).argmax(1)
        for part in torch.split(pixels, batch_size)
    ]
    images = LabelledImages(pixels, torch.from_numpy(np.concatenate(labels)))
    names = {variant.id: variant.name for variant in bundle.manifest.variants()}
    metric = f"agreement with {names[reference]}"
    return calibrate(bundle, images, data_name, batch_size, progress, metric)


def compute_logits(
    executor: CompiledExecutor,
    variant: int,
    images: LabelledImages,
    bundle: VisionBundle,
    batch_size: int,
) -> Logits:
    """Return the logits [N, K] of a variant for all images."""
    scaling = bundle.manifest.preprocessing
    parts = [
        executor(normalise(pixels, scaling.mean, scaling.std).numpy(), variant)
        for pixels in torch.split(images.pixels, batch_size)
    ]
    return np.concatenate(parts)


def _read_measured(bundle: VisionBundle, metric: str, data_name: str, n: int) -> dict[int, Quality]:
    """Return the qualities in the bundle if they were measured on the same data."""
    previous = bundle.quality
    same = previous is not None and (previous.metric, previous.data, previous.n)
    if previous is None or same != (metric, data_name, n):
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
