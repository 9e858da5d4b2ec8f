"""Differences of paired runs, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the mean of `first` minus `second`, and the half width of its 95 % interval.

    Run i of both had the same arrivals. The interval is Student's; with one pair it is 0.
    """
    gaps = np.asarray(first) - np.asarray(second)
    error = float(stats.sem(gaps)) if len(gaps) > 1 else 0.0
    half_width = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1)) if error else 0.0
    return float(gaps.mean()), half_width
