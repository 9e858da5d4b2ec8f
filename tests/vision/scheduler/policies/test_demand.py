"""Tests of hulls against linear programs, and of demand against values computed by hand."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from ladderstitch.vision.scheduler.policies.demand import (
    CAPACITY_SCENARIOS,
    DEADLINE_MARGIN,
    Capacity,
    Demand,
    QualityHull,
    QualityHulls,
    RemainingQuality,
)
from ladderstitch.vision.scheduler.policies.forecast import ArrivalForecast
from tests.support.image_scheduling import (
    QUALITY,
    make_candidates,
    make_hulls,
    make_request,
    plain_view,
)

POINTS = [(0.001, 0.7), (0.002, 0.8), (0.006, 0.9)]


@pytest.mark.parametrize("seconds_per_image", [0.0002, 0.001, 0.0015, 0.003, 0.006, 0.02])
def test_hull_is_the_best_mix_of_variants(seconds_per_image: float) -> None:
    """The linear program has shares of variants that add up to at most 1 within the time."""
    best = linprog(
        [-q for _, q in POINTS],
        A_ub=[[cost for cost, _ in POINTS], [1.0] * len(POINTS)],
        b_ub=[seconds_per_image, 1.0],
    )
    assert QualityHull.from_points(POINTS).quality(seconds_per_image) == pytest.approx(-best.fun)


def test_smoothed_is_the_mean_over_capacity_scenarios() -> None:
    plain, smooth = QualityHull.from_points(POINTS), QualityHull.from_points(POINTS).smoothed()
    for u in np.geomspace(1e-4, 0.1, 50).tolist():
        expected = sum(weight * plain.quality(share * u) for share, weight in CAPACITY_SCENARIOS)
        assert smooth.quality(u) == pytest.approx(expected)
    assert sum(weight for _, weight in CAPACITY_SCENARIOS) == pytest.approx(1.0)


def test_hull_of_longer_batches_allows_more_quality() -> None:
    hulls = make_hulls()
    short, long = hulls.for_longest(0.0), hulls.for_longest(1.0)
    assert short.quality(0.0008) < long.quality(0.0008)
    assert hulls.efficient <= set(make_candidates().frontier)
    assert 0 in hulls.efficient
    assert QualityHulls.from_profile((0,), QUALITY, plain_view().profiled).efficient == {0}


def test_demand_counts_the_queue_and_forecast_arrivals() -> None:
    """Ten requests are due at 60 ms; 50 more arrive per second, with 40 ms each."""
    queue = [make_request(0.06) for _ in range(10)]
    forecast = ArrivalForecast(50.0, (0.04,), (0.0, 0.04))
    demand = Demand.from_queue(queue, 0, forecast, 0.0)
    due, num_images = demand.points[-1]
    assert due == pytest.approx(2.0 * 0.04 - DEADLINE_MARGIN * 0.04)
    assert num_images == pytest.approx(10 + 50 * (0.08 - 0.04))
    assert demand.min_s_per_image == pytest.approx(
        (0.06 - DEADLINE_MARGIN * 0.04) / 10
    )  # waiting requests only


def test_remaining_quality_is_that_of_the_time_left() -> None:
    """Two images are due in 2 ms and two in 14 ms: they get 1 ms and 6 ms each."""
    hull = QualityHull.from_points(POINTS)
    demand = Demand(((0.002, 2.0), (0.014, 4.0)), tight_budget_s=0.1, min_s_per_image=0.001)
    plain = RemainingQuality(demand, hull, Capacity(1.0, 1.0, 0.0))
    assert plain.after(0.0, 0) == pytest.approx(2 * 0.7 + 2 * 0.9)
    # The engine is busy for 4 ms with the first two: 10 ms are left for the other two.
    assert plain.after(0.004, 2) == pytest.approx(2 * hull.quality(0.005))
    # The engine is busy for 3 ms with none of them: those due in 2 ms are lost.
    assert plain.after(0.003, 0) == pytest.approx(2 * hull.quality(0.0055))
    assert plain.after(0.001, 4) == plain.after(0.02, 0) == 0.0
    # A machine of half the speed has half of the time in the profile's seconds.
    half = RemainingQuality(demand, hull, Capacity(0.5, 1.0, 0.0))
    assert half.after(0.0, 0) == pytest.approx(2 * hull.quality(0.0005) + 2 * hull.quality(0.003))


@given(
    st.lists(st.tuples(st.floats(0.001, 0.1), st.integers(1, 8)), min_size=1, max_size=7),
    st.floats(0.0, 0.05),
    st.floats(0.0, 20.0),
)
def test_remaining_quality_follows_the_convex_minorant(
    steps: list[tuple[float, int]], busy_s: float, done: float
) -> None:
    """The points are convex, and this searches the later ones again after each of them."""
    slopes = sorted(s for s, _ in steps)
    points = list(
        accumulate(
            ((s * n, float(n)) for s, (_, n) in zip(slopes, steps, strict=True)),
            lambda a, b: (a[0] + b[0], a[1] + b[1]),
        )
    )
    hull = QualityHull.from_points(POINTS)
    remaining = RemainingQuality(Demand(tuple(points), 0.1, 0.001), hull, Capacity(1, 1, 0.0))
    wanted, at_s, at_count, left = 0.0, busy_s, done, [p for p in points if p[1] > done]
    while left:
        due_s, count = min(left, key=lambda p: ((p[0] - at_s) / (p[1] - at_count), p[1]))
        slope = (due_s - at_s) / (count - at_count)
        if slope > 0:
            wanted += (count - at_count) * hull.quality(slope)
            at_s = due_s
        at_count, left = count, [p for p in left if p[1] > count]
    assert remaining.after(busy_s, done) == pytest.approx(wanted, rel=1e-6, abs=1e-9)
