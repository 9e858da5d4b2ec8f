"""The calibration of all cascades of a model, arranged for decisions within microseconds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ladderstitch.scheduling.cascades import Cascade, Shares

Needs = Mapping[float, int]
"""Numbers of images by the minimum confidence of their requests."""

MAX_ROWS = 1024
"""Confidences whose row of the table is kept, about 1 KiB each."""

Row = NDArray[np.float64]
"""At one confidence: the share that goes on of each start, then the quality of each cascade."""


class CascadeTable:
    """Cascades in order of their last variant's quality, best first, and their starts.

    A start is what cascades with one first variant have in common: that variant, and the share of
    images that go on. The figures of each confidence are computed once.
    """

    def __init__(self, cascades: Sequence[Cascade], quality: Mapping[int, float]) -> None:
        self.cascades = tuple(sorted(cascades, key=lambda cascade: -quality[cascade.last]))
        self._last_qualities = [-quality[cascade.last] for cascade in self.cascades]
        numbers: dict[tuple[int, Shares], int] = {}
        self.start_of = tuple(
            numbers.setdefault((c.first, c.go_on), len(numbers)) for c in self.cascades
        )
        """For each cascade the number of its start."""
        self._examples = tuple(self.cascades[self.start_of.index(n)] for n in numbers.values())
        self.firsts = tuple(cascade.first for cascade in self._examples)
        """The first variant of each start."""
        self._row = lru_cache(MAX_ROWS)(self._compute_row)

    def count_from(self, quality: float) -> int:
        """Return how many cascades have a last variant of this quality or a better one."""
        return bisect_right(self._last_qualities, -quality)

    def prepare(self, confidence: float) -> None:
        """Compute the row of a confidence, so that no decision has to wait for it."""
        self._row(confidence)

    def expect(self, needs: Needs) -> tuple[list[float], list[float]]:
        """Return what is expected of a batch, which has at least one image.

        For each start, these are the images that go on. For each cascade, it is the accuracy of the
        answers times their number.
        """
        (confidence, count), *others = needs.items()
        sums = self._row(confidence) * count
        for confidence, count in others:
            sums += self._row(confidence) * count
        values = sums.tolist()
        return values[: len(self.firsts)], values[len(self.firsts) :]

    def _compute_row(self, confidence: float) -> Row:
        shares = [cascade.going_on(confidence) for cascade in self._examples]
        return np.array(shares + [cascade.quality(confidence) for cascade in self.cascades])
