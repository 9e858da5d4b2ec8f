"""The oracle: the best result that a scheduler could reach if it knew the future."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ladderstitch_loadtest.load.traces import Trace
from ladderstitch_loadtest.simulation.profiles import Family

Column = NDArray[np.float64]
MAX_REQUESTS = 150
"""Longest trace that the exact program solves; a longer one takes minutes."""


@dataclass(frozen=True, slots=True)
class OracleResult:
    """The figures of the plan with the highest effective quality."""

    attainment: float
    effective_quality: float


def oracle(family: Family, trace: Trace) -> OracleResult:
    """Return the exact optimum of one non-preemptive engine whose batches take their medians.

    It is a dynamic program over the number of requests of each class that are done or given up, and
    the instant at which the engine is free. Requests of one class are interchangeable up to their
    order, so each class is first in, first out. Of the plans that lead to one state, only those
    remain that no other beats in both time and value. Raises `ValueError` for more than two budget
    classes or `MAX_REQUESTS` requests.
    """
    if len(trace.classes) > 2 or len(trace) > MAX_REQUESTS:
        raise ValueError(
            f"trace: expected at most 2 budget classes and {MAX_REQUESTS} requests, "
            f"got {len(trace.classes)} and {len(trace)}"
        )
    arrivals = [trace.arrivals_s[trace.picks == k] for k in range(len(trace.classes))]
    budgets = [c.budget_s for c in trace.classes]
    if len(arrivals) == 1:
        arrivals, budgets = [*arrivals, np.empty(0)], [*budgets, 0.0]
    value, met = _DynamicProgram(family, arrivals, budgets).solve()
    return OracleResult(met / len(trace), value / len(trace))


class _DynamicProgram:
    def __init__(self, family: Family, arrivals: list[Column], budgets: list[float]) -> None:
        self.arrivals, self.budgets = arrivals, budgets
        self.options = _efficient_options(family)
        # (i, j) -> columns of (free at, value, requests on time)
        self.plans: defaultdict[tuple[int, int], list[Column]] = defaultdict(list)

    def solve(self) -> tuple[float, int]:
        """Return the highest value and the number of requests on time."""
        first, second = (len(column) for column in self.arrivals)
        self.plans[0, 0].append(np.array([[0.0], [0.0], [0.0]]))
        for i in range(first + 1):
            for j in range(second + 1):
                plans = _keep_undominated(np.concatenate(self.plans.pop((i, j)), axis=1))
                if (i, j) == (first, second):
                    best = plans[:, np.argmax(plans[1])]
                    return float(best[1]), round(float(best[2]))
                if i < first:
                    self.plans[i + 1, j].append(plans)  # give one up
                if j < second:
                    self.plans[i, j + 1].append(plans)
                self._extend(i, j, plans)
        raise AssertionError("every plan ends in the last state")

    def _extend(self, i: int, j: int, plans: Column) -> None:
        """Add all batches of the next p requests of one class and q of the other."""
        (one, two), (short, long) = self.arrivals, self.budgets
        most = len(self.options) - 1
        for p in range(min(most, len(one) - i) + 1):
            for q in range(min(most - p, len(two) - j) + 1):
                if not p + q:
                    continue
                due = min(one[i] + short if p else np.inf, two[j] + long if q else np.inf)
                ready = max(one[i + p - 1] if p else 0.0, two[j + q - 1] if q else 0.0)
                if ready + self.options[p + q][0][0] > due:
                    break
                self.plans[i + p, j + q] += self._run_batch(plans, p + q, ready, due)

    def _run_batch(self, plans: Column, size: int, ready: float, due: float) -> list[Column]:
        """Return the plans after a batch of `size` requests, for each variant that is on time."""
        free, value, met = plans
        start = np.maximum(free, ready)
        ends = []
        for seconds, quality in self.options[size]:
            fits = start + seconds <= due
            if not fits.any():
                break
            end = np.stack([start + seconds, value + size * quality, met + size])
            ends.append(end[:, fits])
        return ends


def _efficient_options(family: Family) -> list[list[tuple[float, float]]]:
    """Return (seconds, quality) of the variants worth running, by batch size, fastest first."""
    profile = family.profile
    table: list[list[tuple[float, float]]] = [[]]
    for batch_size in range(1, profile.max_batch_size + 1):
        points: list[tuple[float, float]] = []
        options = [
            (
                float(np.interp(batch_size, profile.batch_sizes, profile.variants[v].median_s)),
                family.quality[v],
            )
            for v in family.frontier
        ]
        for seconds, quality in sorted(options):
            if not points or quality > points[-1][1]:
                points.append((seconds, quality))
        table.append(points)
    return table


def _keep_undominated(plans: Column) -> Column:
    """Return the plans that no other beats in time (row 0) and value (row 1), earliest first."""
    plans = plans[:, np.lexsort((-plans[1], plans[0]))]
    best = np.maximum.accumulate(plans[1])
    keep = np.ones(plans.shape[1], bool)
    keep[1:] = plans[1, 1:] > best[:-1] + 1e-9
    return plans[:, keep]
