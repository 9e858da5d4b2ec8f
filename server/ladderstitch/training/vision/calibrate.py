"""Measure the quality of every stitch of a bundle, with a confidence interval, resumably."""

from __future__ import annotations

from datetime import UTC, datetime

import torch
from rich.progress import Progress
from scipy.stats import binomtest

from ladderstitch.runtime.environment import versions
from ladderstitch.scheduling.profiles import Quality, QualityTable
from ladderstitch.training.vision.idx_dataset import LabelledImages, normalise
from ladderstitch.vision.bundle import Bundle, write_table
from ladderstitch.vision.models.executor import InferenceModel

CONFIDENCE = 0.95


def calibrate(
    bundle: Bundle, images: LabelledImages, data_name: str, batch_rows: int, progress: Progress
) -> QualityTable:
    """Top-1 accuracy with its Wilson interval per stitch, on the weights as they are served.

    Written to the bundle after each stitch; a run on the same data goes on where the last stopped.
    """
    model = InferenceModel(bundle.load_model())
    table = QualityTable.model_construct(
        metric="top-1 accuracy",
        data=data_name,
        n=len(images),
        confidence=CONFIDENCE,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        stitches=_already_measured(bundle, data_name, len(images)),
    )
    todo = [stitch for stitch in model.usable if stitch not in table.stitches]
    for stitch in progress.track(todo, description="calibrate"):
        right = count_right(model, stitch, images, bundle, batch_rows)
        interval = binomtest(right, len(images)).proportion_ci(CONFIDENCE, method="wilson")
        table.stitches[stitch] = Quality(
            value=right / len(images),
            low=round(float(interval.low), 5),
            high=round(float(interval.high), 5),
        )
        write_table(bundle.path / "quality.json", table)
    return table


def count_right(
    model: InferenceModel, stitch: int, images: LabelledImages, bundle: Bundle, batch_rows: int
) -> int:
    """How many of the images the stitch classifies right."""
    preprocessing = bundle.manifest.preprocessing
    right = 0
    with torch.inference_mode():
        for start in range(0, len(images), batch_rows):
            pixels = images.pixels[start : start + batch_rows]
            inputs = normalise(pixels, preprocessing.mean, preprocessing.std)
            answers = model(inputs, stitch).argmax(1)
            right += int((answers == images.labels[start : start + batch_rows]).sum())
    return right


def _already_measured(bundle: Bundle, data_name: str, n: int) -> dict[int, Quality]:
    previous = bundle.quality
    if previous is None or (previous.data, previous.n) != (data_name, n):
        return {}
    return dict(previous.stitches)
