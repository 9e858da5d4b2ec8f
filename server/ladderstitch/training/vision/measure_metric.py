"""Measure all variants of a bundle by a metric, in one pass over the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from ladderstitch.errors import ConfigError, DataError
from ladderstitch.runtime.device import versions
from ladderstitch.scheduling.profiles import Quality, QualityTable
from ladderstitch.scheduling.requests import Logits, Pixels
from ladderstitch.training.vision.inputs import InputKind, Target, find_targets, read_pairs
from ladderstitch.training.vision.metrics import (
    Accuracy,
    Agreement,
    Cosine,
    Floats,
    Function,
    MeanIou,
    Metric,
    Output,
    Rmse,
    interval,
)
from ladderstitch.vision.bundle import VisionBundle, VisionManifest, write_table
from ladderstitch.vision.engine.startup import open_executor
from ladderstitch.vision.frontier import variant_costs
from ladderstitch.vision.networks.outputs import OutputEntry, split_rows

CONFIDENCE = 0.95
METRICS = ("accuracy", "agreement", "cosine", "mean-iou", "rmse")
RELATIVE = ("agreement", "cosine")
"""Metrics that need no targets: they compare with the most expensive network."""


def input_kind(manifest: VisionManifest) -> InputKind:
    """Return what the model of a bundle takes."""
    return InputKind(manifest.config.inputs.shape, manifest.image_preprocessing)


def most_expensive(bundle: VisionBundle) -> int:
    """Return the variant with the most multiply-accumulates."""
    costs = variant_costs(bundle)
    return max(costs, key=lambda variant: (costs[variant].macs, -variant))


def default_metric(manifest: VisionManifest, *, has_targets: bool) -> str:
    """Return the metric of a bundle for which the user names none."""
    if manifest.outputs:
        return "cosine"
    return "accuracy" if has_targets else "agreement"


def outputs_of(manifest: VisionManifest) -> tuple[OutputEntry, ...]:
    """Return the outputs of a bundle; class scores are the output `logits`."""
    logits = OutputEntry(name="logits", shape=(len(manifest.labels),), kind="scores")
    return manifest.outputs or (logits,)


def calibrate_by_metric(
    bundle: VisionBundle,
    metric: str | None,
    data: Path | None,
    images: Path | None,
    targets: Path | None,
    name: str | None,
    batch_size: int,
    progress: Progress,
) -> QualityTable:
    """Write the qualities of all variants by a metric of `METRICS` or by `module:function`.

    Inputs and targets are the lines of the CSV file `data`, or the files in the folder `images` and
    those of the same names in `targets`. Raises `ConfigError` for data that do not suit the metric,
    and `DataError` for files that cannot be used.
    """
    manifest = bundle.manifest
    kind = input_kind(manifest)
    metric = metric or default_metric(manifest, has_targets=data is not None)
    if metric not in METRICS and ":" not in metric:
        raise ConfigError(f"metric: expected one of {METRICS} or module:function, got {metric}")
    found: list[Target] | None = None
    if metric in RELATIVE:
        if images is None or data is not None or targets is not None:
            raise ConfigError(f"images: expected a folder of inputs, and only that, for {metric}")
        files, source = kind.find(images), images
    elif data is not None:
        if images is not None or targets is not None or data.is_dir():
            raise ConfigError(f"data: expected a CSV file of path,target alone for {metric}")
        (files, found), source = read_pairs(data), data
    elif images is not None and targets is not None:
        files, source = kind.find(images), images
        found = find_targets(files, targets)
    else:
        raise ConfigError(
            f"data: expected a CSV file of path,target, or --images and --targets, for {metric}"
        )
    name = name or f"{len(files)} inputs of {source.name}"
    chosen = _make_metric(metric, bundle, found)
    batches = kind.batches(files, batch_size)
    return measure(bundle, batches, len(files), chosen, found, name, progress)


def relative_metric(bundle: VisionBundle, metric: str) -> Metric:
    """Return the metric `agreement` or `cosine` with the most expensive network."""
    names = {variant.id: variant.name for variant in bundle.manifest.variants()}
    reference = names[most_expensive(bundle)]
    return Agreement(reference) if metric == "agreement" else Cosine(reference)


def _make_metric(metric: str, bundle: VisionBundle, targets: Sequence[Target] | None) -> Metric:
    manifest = bundle.manifest
    if metric in ("accuracy", "agreement") and manifest.outputs:
        raise ConfigError(
            f"metric: expected another one for outputs that are tensors, got {metric}"
        )
    if metric in RELATIVE:
        return relative_metric(bundle, metric)
    if metric == "accuracy":
        return Accuracy(manifest.labels)
    if metric == "mean-iou":
        images = manifest.image_preprocessing
        return MeanIou(outputs_of(manifest), None if images is None else images.crop)
    if metric == "rmse":
        return Rmse(outputs_of(manifest), targets or ())
    return Function(metric)


def measure(
    bundle: VisionBundle,
    batches: Iterable[Pixels],
    count: int,
    metric: Metric,
    targets: Sequence[Target] | None,
    data_name: str,
    progress: Progress,
) -> QualityTable:
    """Return the quality of each variant on `count` inputs, which is written to the bundle.

    Without `targets`, the truth is the output of the most expensive network.
    """
    executor = open_executor(bundle, torch.get_num_threads(), lambda done, total: None)
    outputs = outputs_of(bundle.manifest)
    usable = [variant.id for variant in bundle.manifest.variants() if variant.usable]
    reference = most_expensive(bundle)
    statistics: dict[int, list[Floats]] = {variant: [] for variant in usable}
    task = progress.add_task("calibrate", total=count)
    done = 0
    for batch in batches:
        expected = _outputs_by_input(executor(batch, reference), outputs)
        truths: Sequence[Target | Output] = expected
        if targets is not None:
            truths = targets[done : done + len(batch)]
        for variant in usable:
            rows = expected
            if variant != reference:
                rows = _outputs_by_input(executor(batch, variant), outputs)
            for row, truth in zip(rows, truths, strict=True):
                statistics[variant].append(np.asarray(metric.statistics(row, truth), np.float64))
        done += len(batch)
        progress.update(task, completed=done)
    table = QualityTable(
        metric=metric.name,
        data=data_name,
        n=done,
        confidence=CONFIDENCE,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        variants={variant: _quality(metric, np.stack(s)) for variant, s in statistics.items()},
    )
    write_table(bundle.path / "quality.json", table)
    return table


def _outputs_by_input(rows: Logits, outputs: Sequence[OutputEntry]) -> list[Output]:
    """Return all outputs of each input; raises `DataError` if one is not finite."""
    if not np.isfinite(rows).all():
        raise DataError("outputs: expected finite numbers, got NaN or infinity for some inputs")
    split = split_rows(rows, outputs)
    return [{name: values[i] for name, values in split.items()} for i in range(len(rows))]


def _quality(metric: Metric, statistics: Floats) -> Quality:
    value = float(metric.quality(statistics.sum(axis=0, keepdims=True))[0])
    low, high = interval(metric, statistics, CONFIDENCE)
    value = min(max(value, 0.0), 1.0)
    return Quality(
        value=value,
        low=round(min(max(low, 0.0), value), 5),
        high=round(max(min(high, 1.0), value), 5),
    )
