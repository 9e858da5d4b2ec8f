"""Calibrated confidences of variants, and the cascades that they make possible.

A temperature is fitted on every second image, by the likelihood of the labels. The expected
calibration error and the figures of cascades come from the other images.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from ladderstitch.scheduling.cascades import THRESHOLDS, Cascade, confidences
from ladderstitch.scheduling.profiles import frontier
from ladderstitch.scheduling.requests import Logits, Pixels
from ladderstitch.vision.engine.compiled_executor import CompiledExecutor

MIN_IMAGES = 100
"""Smallest number of images from which confidences are calibrated."""
NUM_BINS = 15
"""Bins of equal width of the expected calibration error."""
LOG_TEMPERATURES = (-4.0, 4.0)
"""Natural logarithms of the smallest and the largest temperature."""
RESTARTS = 2
"""Cascades without shared activations that are kept for each last variant, cheapest first."""
KEPT_AT = (0.7, 0.9, 0.97)
"""Confidences at which the cost of cascades is compared."""
TIMED_BATCH, TIMED_RUNS = 8, 15
"""Images of a batch, and runs, by which the share of a stitch point is timed."""

Labels = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Confidence:
    """The temperature of a variant, and its confidence, class and whether it is right, all [N]."""

    temperature: float
    calibration_error: float
    confidence: NDArray[np.float64]
    classes: Labels
    right: Flags


def held_out(num_images: int) -> Flags:
    """Return which of N images temperatures are not fitted on: every second one."""
    odd: Flags = np.arange(num_images) % 2 == 1
    return odd


def fit_confidence(logits: Logits, labels: Labels, temperature: float | None = None) -> Confidence:
    """Return how sure a variant is, from logits [N, K] and labels [N] of N images.

    A known `temperature` is not fitted again.
    """
    judged = held_out(len(labels))
    if temperature is None:
        temperature = fit_temperature(logits[~judged], labels[~judged])
    confidence = confidences(logits, temperature)
    classes = logits.argmax(axis=1)
    right = classes == labels
    error = calibration_error(confidence[judged], right[judged])
    return Confidence(temperature, error, confidence, classes, right)


def fit_temperature(logits: Logits, labels: Labels) -> float:
    """Return the temperature at which softmax(logits / temperature) makes labels most likely."""
    exact = logits.astype(np.float64)
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        scaled = exact * np.exp(-log_temperature)
        scaled -= scaled.max(axis=1, keepdims=True)
        return float((np.log(np.exp(scaled).sum(axis=1)) - scaled[rows, labels]).mean())

    found = minimize_scalar(loss, bounds=LOG_TEMPERATURES, method="bounded")
    return round(float(np.exp(found.x)), 4)


def calibration_error(confidence: NDArray[np.float64], right: Flags) -> float:
    """Return the mean over images of |confidence - accuracy| of their bin, 0 to 1."""
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, confidence - right, minlength=NUM_BINS)
    return round(float(np.abs(gaps).sum() / len(right)), 5)


def find_cascades(
    executor: CompiledExecutor,
    known: Mapping[int, Confidence],
    quality: Mapping[int, float],
    cost: Mapping[int, float],
    image: Pixels,
) -> tuple[Cascade, ...]:
    """Return the cascades that pay, in order of their variants.

    They are pairs of variants on the frontier of `quality` over `cost`. All pairs that share
    activations are kept if the second one is cheaper from the stitch on than from the images, and
    for each last variant those that start again at the least expected cost. `image` [1, C, H, W] is
    what the shared part is timed on.
    """
    chosen = {v: quality[v] for v in known}
    points = [point.variant for point in frontier(chosen, cost)]
    pairs = [
        measure_cascade(known[a], known[b], a, b, measure_shared(executor, a, b, image))
        for a, b in combinations(points, 2)
    ]
    kept: dict[tuple[int, int], Cascade] = {c.variants: c for c in pairs if c.shared > 0}
    for last in points:
        ending = [c for c in pairs if c.last == last]
        for confidence in KEPT_AT:
            ending.sort(key=lambda c: _expected_cost(c, cost, confidence))
            kept |= {c.variants: c for c in ending[:RESTARTS]}
    paying = [
        c for c in kept.values() if min(_expected_cost(c, cost, t) for t in KEPT_AT) < cost[c.last]
    ]
    return tuple(sorted(paying, key=lambda c: c.variants))


def _expected_cost(cascade: Cascade, cost: Mapping[int, float], confidence: float) -> float:
    tail = (1 - cascade.shared) * cost[cascade.last]
    return cost[cascade.first] + cascade.going_on(confidence) * tail


def measure_cascade(
    one: Confidence, other: Confidence, first: int, last: int, shared: float
) -> Cascade:
    """Return the cascade of two variants, measured on the images that were held out."""
    judged = held_out(len(one.right))
    confidence = one.confidence[judged]
    early, late = one.right[judged], other.right[judged]
    unsure = [confidence < threshold for threshold in THRESHOLDS]
    return Cascade(
        first=first,
        last=last,
        shared=shared,
        go_on=tuple(round(float(u.mean()), 5) for u in unsure),
        sure_quality=tuple(_share(early, ~u) for u in unsure),
        unsure_quality=tuple(_share(early, u) for u in unsure),
        last_quality=tuple(_share(late, u) for u in unsure),
    )


def _share(right: Flags, among: Flags) -> float:
    """Return the share that is right among some images; among all if there are none."""
    return round(float(right[among].mean() if among.any() else right.mean()), 5)


def measure_shared(executor: CompiledExecutor, first: int, last: int, image: Pixels) -> float:
    """Return the share of the time of `last` after which its route leaves that of `first`.

    It is 0 if the routes share nothing, and is timed as the least of some runs.
    """
    if not executor.num_shared(first, last):
        return 0.0
    images = np.ascontiguousarray(np.repeat(image, TIMED_BATCH, axis=0))
    whole_s, tail_s = [], []
    _, kept = executor.run_first(images, first, last)
    for _ in range(TIMED_RUNS):
        started = time.perf_counter()
        executor(images, last)
        middle = time.perf_counter()
        executor.run_last(kept, first, last)
        whole_s.append(middle - started)
        tail_s.append(time.perf_counter() - middle)
    return round(min(max(0.0, 1 - min(tail_s) / min(whole_s)), 0.99), 3)
