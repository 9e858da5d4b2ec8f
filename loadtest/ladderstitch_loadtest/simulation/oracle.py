"""The best that any scheduler could have done, with the future known: the limit of a comparison."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ladderstitch_loadtest.load.traces import Trace
from ladderstitch_loadtest.simulation.profiles import Family

Column = NDArray[np.float64]
MOST_REQUESTS = 150
"""Beyond this the exact program takes minutes."""


@dataclass(frozen=True, slots=True)
class Best:
    """Of the plan with the highest effective quality."""

    attainment: float
    effective_quality: float


def oracle(family: Family, trace: Trace) -> Best:
    """Exact, for one engine without preemption whose batches take their median times.

    Dynamic program over (how many of each class are done or given up, when the engine is free):
    requests of one class are interchangeable up to their order, so each class goes first in, first
    out. Of the plans that lead to one place only those that no other beats in both time and value
    are kept. Raises `ValueError` for more than two classes or `MOST_REQUESTS` requests.
    """
    if len(trace.classes) > 2 or len(trace) > MOST_REQUESTS:
        raise ValueError(
            f"expected at most 2 budget classes and {MOST_REQUESTS} requests, "
            f"got {len(trace.classes)} and {len(trace)}"
        )
    arrivals = [trace.arrivals_s[trace.picks == k] for k in range(len(trace.classes))]
    budgets = [c.budget_s for c in trace.classes]
    if len(arrivals) == 1:
        arrivals, budgets = [*arrivals, np.empty(0)], [*budgets, 0.0]
    value, met = _Program(family, arrivals, budgets).solve()
    return Best(met / len(trace), value / len(trace))


class _Program:
    def __init__(self, family: Family, arrivals: list[Column], budgets: list[float]) -> None:
        self.arrivals, self.budgets = arrivals, budgets
        self.seconds = _batch_runner(family)
        # (i, j) -> columns of (free at, value, requests in time)
        self.open: defaultdict[tuple[int, int], list[Column]] = defaultdict(list)

    def solve(self) -> tuple[float, int]:
        first, second = (len(column) for column in self.arrivals)
        self.open[0, 0].append(np.array([[0.0], [0.0], [0.0]]))
        for i in range(first + 1):
            for j in range(second + 1):
                plans = _undominated(np.concatenate(self.open.pop((i, j)), axis=1))
                if (i, j) == (first, second):
                    best = plans[:, np.argmax(plans[1])]
                    return float(best[1]), round(float(best[2]))
                if i < first:
                    self.open[i + 1, j].append(plans)  # give one up
                if j < second:
                    self.open[i, j + 1].append(plans)
                self._run(i, j, plans)
        raise AssertionError("every path ends at the last place")

    def _run(self, i: int, j: int, plans: Column) -> None:
        """All batches that take the next p of one class and q of the other."""
        (one, two), (short, long) = self.arrivals, self.budgets
        free, value, met = plans
        most = len(self.seconds) - 1
        for p in range(min(most, len(one) - i) + 1):
            for q in range(min(most - p, len(two) - j) + 1):
                if not p + q:
                    continue
                due = min(one[i] + short if p else np.inf, two[j] + long if q else np.inf)
                ready = max(one[i + p - 1] if p else 0.0, two[j + q - 1] if q else 0.0)
                start = np.maximum(free, ready)
                if ready + self.seconds[p + q][0][0] > due:
                    break
                for seconds, quality in self.seconds[p + q]:
                    fits = start + seconds <= due
                    if not fits.any():
                        break
                    n = p + q
                    end = np.stack([start + seconds, value + n * quality, met + n])
                    self.open[i + p, j + q].append(end[:, fits])


def _batch_runner(family: Family) -> list[list[tuple[float, float]]]:
    """By batch size, (seconds, quality) of the variants worth running, fastest first."""
    profile = family.profile
    table: list[list[tuple[float, float]]] = [[]]
    for rows in range(1, profile.max_batch + 1):
        points: list[tuple[float, float]] = []
        options = [
            (
                float(np.interp(rows, profile.batch_sizes, profile.variants[s].median_s)),
                family.quality[s],
            )
            for s in family.frontier
        ]
        for seconds, quality in sorted(options):
            if not points or quality > points[-1][1]:
                points.append((seconds, quality))
        table.append(points)
    return table


def _undominated(plans: Column) -> Column:
    """Those that no other beats in time (row 0) and value (row 1); earliest first."""
    plans = plans[:, np.lexsort((-plans[1], plans[0]))]
    best = np.maximum.accumulate(plans[1])
    keep = np.ones(plans.shape[1], bool)
    keep[1:] = plans[1, 1:] > best[:-1] + 1e-9
    return plans[:, keep]
