"""Metrics of quality: what one input contributes, and a quality in [0, 1] of sums over inputs.

Statistics of inputs are added, so that intervals come from resampled sums (the bootstrap) and no
output of the model has to be kept.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from ladderstitch.errors import ConfigError, DataError
from ladderstitch.training.vision.inputs import Target
from ladderstitch.vision.networks.outputs import OutputEntry

Output = Mapping[str, NDArray[Any]]
"""All outputs for one input, by name."""
Floats = NDArray[np.float64]
RESAMPLES = 1000
IGNORED = 255
"""Class of pixels of a mask that do not count."""


class Metric(Protocol):
    """A measure of one variant."""

    name: str

    def statistics(self, output: Output, truth: Any) -> Sequence[float] | Floats:
        """Return what one input adds to the sums.

        `truth` is the input's `Target`, or the output of the most expensive network.
        """

    def quality(self, sums: Floats) -> Floats:
        """Return the quality in [0, 1] of each row of sums [R, S]."""


def interval(metric: Metric, statistics: Floats, confidence: float) -> tuple[float, float]:
    """Return the ends of the confidence interval of a quality, from the statistics [N, S].

    Counts of successes have Wilson's interval; others have the percentiles of resampled inputs,
    with a fixed seed. The quality of one input has no interval: it is 0 to 1.
    """
    count = len(statistics)
    if isinstance(metric, Agreement | Accuracy):
        found = binomtest(round(statistics[:, 0].sum()), count).proportion_ci(
            confidence, method="wilson"
        )
        return float(found.low), float(found.high)
    if count < 2:
        return 0.0, 1.0
    rng = np.random.default_rng(0)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    values = metric.quality(weights @ statistics)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


class _Mean:
    """A metric whose quality is the mean of one number per input."""

    def quality(self, sums: Floats) -> Floats:
        """Return the mean of each row of sums, the number and the count."""
        mean: Floats = sums[:, 0] / sums[:, 1]
        return mean


class Cosine(_Mean):
    """The mean cosine between the outputs of a network and those of the most expensive one.

    Negative cosines count as 0. Outputs that are no floating-point numbers count by the share of
    equal elements. All outputs have equal weight.
    """

    def __init__(self, reference: str) -> None:
        self.name = f"cosine agreement with {reference}"

    def statistics(self, output: Output, truth: Any) -> Sequence[float]:
        """Return the mean cosine of the outputs, and 1."""
        return float(np.mean([_cosine(output[name], truth[name]) for name in output])), 1.0


def _cosine(left: NDArray[Any], right: NDArray[Any]) -> float:
    if left.dtype.kind != "f":
        return float(np.mean(left == right)) if left.size else 1.0
    x, y = (values.astype(np.float64).ravel() for values in (left, right))
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    if norms == 0:
        return float(not x.any() and not y.any())
    return min(max(float(x @ y) / norms, 0.0), 1.0)


class Agreement(_Mean):
    """The share of inputs for which a network predicts the class of the most expensive one."""

    def __init__(self, reference: str) -> None:
        self.name = f"agreement with {reference}"

    def statistics(self, output: Output, truth: Any) -> Sequence[float]:
        """Return whether the classes are equal, and 1."""
        (scores,), (expected,) = output.values(), truth.values()
        return float(scores.argmax() == expected.argmax()), 1.0


class Accuracy(_Mean):
    """The share of inputs whose label, a text or a position, has the largest score."""

    name = "top-1 accuracy"

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = {label: number for number, label in enumerate(labels)}

    def statistics(self, output: Output, truth: Target) -> Sequence[float]:
        """Return whether the class is the label, and 1; raises `DataError` for unknown labels."""
        label = str(truth.value)
        position = self.labels.get(label, int(label) if label.isdecimal() else -1)
        if not 0 <= position < len(self.labels):
            raise DataError(f"{truth.source}: expected one of the labels, got {label[:80]!r}")
        (scores,) = output.values()
        return float(scores.argmax() == position), 1.0


class MeanIou:
    """The mean over classes of intersection over union of predicted and labelled pixels.

    Classes that neither occur nor are predicted do not count, and pixels of class 255 neither.
    """

    name = "mean IoU"

    def __init__(self, outputs: Sequence[OutputEntry], crop: float | None) -> None:
        dense = [o for o in outputs if o.kind == "scores" and len(o.shape) == 3]
        if len(dense) != 1:
            raise ConfigError(
                "metric: expected one output of scores [classes, height, width] for mean-iou, got "
                f"{len(dense)}; `--labels` or `--outputs scores` of `import` states that it is one"
            )
        self.output, self.crop = dense[0], crop

    def statistics(self, output: Output, truth: Target) -> Floats:
        """Return the pixels in the intersection of each class, then those in its union."""
        classes, *size = self.output.shape
        expected = truth.read_classes((size[0], size[1]), self.crop)
        counted = expected != IGNORED
        if ((expected < 0) | (expected >= classes))[counted].any():
            raise DataError(
                f"{truth.value}: expected classes 0 to {classes - 1}, or 255 for none, got others"
            )
        predicted = output[self.output.name].argmax(axis=0)[counted]
        expected = expected[counted]
        both = np.bincount(expected[predicted == expected], minlength=classes)
        either = (
            np.bincount(predicted, minlength=classes) + np.bincount(expected, minlength=classes)
        ) - both
        pixels: Floats = np.concatenate([both, either]).astype(np.float64)
        return pixels

    def quality(self, sums: Floats) -> Floats:
        """Return the mean over the classes of each row of sums."""
        both, either = np.split(sums, 2, axis=1)
        seen = either > 0
        shares = np.divide(both, either, out=np.zeros_like(both), where=seen)
        mean: Floats = shares.sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
        return mean


class Rmse:
    """1 / (1 + e / s), where e is the RMSE and s the standard deviation of all target values.

    Predicting the mean of the targets has the quality 0.5.
    """

    name = "1 / (1 + RMSE / standard deviation of the targets)"

    def __init__(self, outputs: Sequence[OutputEntry], targets: Sequence[Target]) -> None:
        floats = [output for output in outputs if output.data_type == "FP32"]
        if len(floats) != 1:
            raise ConfigError(f"metric: expected one float output for rmse, got {len(floats)}")
        self.output = floats[0]
        count, total, squares = 0, 0.0, 0.0
        for target in targets:
            values = self._read(target)
            count += values.size
            total += float(values.sum())
            squares += float((values**2).sum())
        variance = squares / max(count, 1) - (total / max(count, 1)) ** 2
        if not variance > 0:
            raise DataError("targets: expected values that differ, got equal ones")
        self.deviation = float(np.sqrt(variance))

    def _read(self, target: Target) -> Floats:
        value = target.read()
        try:
            array = np.asarray(value, np.float64)
        except ValueError as error:
            raise DataError(
                f"{target.source}: expected a number or a .npy file: {error}"
            ) from error
        if array.size != self.output.size:
            raise DataError(
                f"{target.value}: expected {list(self.output.shape)}, got {list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise DataError(f"{target.value}: expected finite numbers, got NaN or infinity")
        return array.reshape(self.output.shape)

    def statistics(self, output: Output, truth: Target) -> Sequence[float]:
        """Return the sum of squared errors, and the number of values."""
        errors = output[self.output.name].astype(np.float64) - self._read(truth)
        return float((errors**2).sum()), float(errors.size)

    def quality(self, sums: Floats) -> Floats:
        """Return the quality of each row of sums."""
        quality: Floats = 1 / (1 + np.sqrt(sums[:, 0] / sums[:, 1]) / self.deviation)
        return quality


class Function(_Mean):
    """The mean of a user's function of the outputs and the target of one input."""

    def __init__(self, name: str) -> None:
        """Import `module:function`, also from the current folder; raises `ConfigError`."""
        self.name = name
        module, _, attribute = name.partition(":")
        if (folder := os.getcwd()) not in sys.path:
            sys.path.insert(0, folder)
        try:
            found = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # whatever the user's module raises
            raise ConfigError(f"metric: expected module:function, got {name}: {error}") from error
        if not callable(found):
            raise ConfigError(f"metric: expected a function, got {name}")
        self.function: Callable[..., Any] = found

    def statistics(self, output: Output, truth: Target) -> Sequence[float]:
        """Return the function's score, and 1; raises `DataError` for a score outside [0, 1]."""
        try:
            score = float(self.function(dict(output), truth.read()))
        except Exception as error:  # whatever the user's function raises
            raise DataError(f"{truth.source}: {self.name} failed: {error!r}") from error
        if not 0 <= score <= 1:  # NaN fails too
            raise DataError(f"{truth.source}: expected 0 to 1 from {self.name}, got {score}")
        return score, 1.0
