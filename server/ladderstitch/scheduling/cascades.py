"""Cascades: a cheap variant, after which only images that it is not sure of go on to a better one.

How sure a variant is, is its confidence: the largest probability of the softmax of its logits over
the variant's temperature, which `calibrate` fits on images that are not trained on.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

Confidences = NDArray[np.float64]
"""[B]: one probability for each of B images; NaN for logits that are not finite."""

THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99, 0.999, 1.0)
"""Confidences at which a cascade is measured."""
MAX_SMALL = 128
"""Values of logits up to which confidences are computed without NumPy."""
TAIL_SIGMAS = 2.33
"""Standard deviations above the mean of the 99th percentile of a normal distribution."""

Shares = tuple[float, ...]


def confidences(logits: NDArray[np.floating], temperature: float) -> Confidences:
    """Return the largest probability of each row of softmax(logits [B, K] / temperature)."""
    with np.errstate(invalid="ignore"):
        scaled = logits.astype(np.float64) / temperature
        scaled -= np.maximum.reduce(scaled, axis=1, keepdims=True)
        found: Confidences = 1.0 / np.add.reduce(np.exp(scaled), axis=1)
    return found


def row_confidences(logits: NDArray[np.floating], temperature: float) -> list[float]:
    """Return what `confidences` does as a list.

    The arithmetic of a few rows is Python's own: right after a model has run, NumPy's functions are
    in no cache, and take longer.
    """
    if logits.size > MAX_SMALL:
        return [float(value) for value in confidences(logits, temperature)]
    found = []
    for row in logits.tolist():
        largest = max(row)
        found.append(1.0 / sum([math.exp((value - largest) / temperature) for value in row]))
    return found


class Cascade(BaseModel):
    """Two variants of a cascade and what calibration found, one value for each of `THRESHOLDS`.

    `shared` is the share of the time of `last` that has passed when its route leaves that of
    `first`: 0 if it starts again from the images. `go_on` is the share of images of which `first`
    is less sure than the threshold. The qualities are accuracies: of `first` on the other images,
    and of `first` and `last` on those that go on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: int = Field(ge=0)
    last: int = Field(ge=0)
    shared: float = Field(ge=0, lt=1)
    go_on: Shares
    sure_quality: Shares
    unsure_quality: Shares
    last_quality: Shares

    @model_validator(mode="after")
    def _check_lengths(self) -> Cascade:
        for field in ("go_on", "sure_quality", "unsure_quality", "last_quality"):
            values = getattr(self, field)
            if len(values) != len(THRESHOLDS) or not all(0 <= value <= 1 for value in values):
                raise ValueError(
                    f"{field}: expected {len(THRESHOLDS)} shares from 0 to 1, got {values}"
                )
        return self

    @property
    def variants(self) -> tuple[int, int]:
        """Ids of both variants, in the order in which they run."""
        return self.first, self.last

    def going_on(self, min_confidence: float) -> float:
        """Return the expected share of images that go on, 0 to 1."""
        return _interpolate(min_confidence, self.go_on)

    def quality(self, min_confidence: float) -> float:
        """Return the accuracy of all answers if all that are not sure go on."""
        share = self.going_on(min_confidence)
        sure, last = self.part_qualities(min_confidence, complete=True)
        return (1 - share) * sure + share * last

    def part_qualities(self, min_confidence: float, *, complete: bool) -> tuple[float, float]:
        """Return the accuracy of the answers that are sure, and of the others.

        The others are answers of the last variant if the cascade is `complete`, else of the first.
        """
        others = self.last_quality if complete else self.unsure_quality
        return (
            _interpolate(min_confidence, self.sure_quality),
            _interpolate(min_confidence, others),
        )


def _interpolate(threshold: float, values: Shares) -> float:
    """Return the value at a threshold; a scheduler calls this more often than NumPy is fast."""
    place = bisect_right(THRESHOLDS, threshold)
    if place == len(THRESHOLDS):
        return values[-1]
    low, high = THRESHOLDS[place - 1], THRESHOLDS[place]
    weight = (threshold - low) / (high - low)
    return values[place - 1] + weight * (values[place] - values[place - 1])


@dataclass(frozen=True, slots=True)
class CascadeSet:
    """The cascades of a model and the temperatures of its variants, by their ids."""

    temperatures: Mapping[int, float]
    cascades: tuple[Cascade, ...] = ()

    def restricted(self, variants: Sequence[int], *, continues: bool) -> CascadeSet:
        """Return the cascades of these variants; without `continues`, all start again.

        An engine that keeps no activations does not continue.
        """
        known = [c for c in self.cascades if set(c.variants) <= set(variants)]
        if not continues:
            known = [c.model_copy(update={"shared": 0.0}) for c in known]
        temperatures = {v: t for v, t in self.temperatures.items() if v in variants}
        return replace(self, temperatures=temperatures, cascades=tuple(known))

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """First and last variant of each cascade that continues."""
        return tuple(c.variants for c in self.cascades if c.shared > 0)


NO_CASCADES = CascadeSet({})


def fill_share(mean: float, share: float) -> float:
    """Return the images that go on in 99 of 100 batches; `mean` is expected, each with `share`."""
    return mean + TAIL_SIGMAS * math.sqrt(max(0.0, mean * (1.0 - share)))
