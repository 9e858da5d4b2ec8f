"""Tests of hulls against linear programs, and of demand against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from ladderstitch.vision.scheduler.policies.demand import (
    CAPACITY_SCENARIOS,
    DEADLINE_MARGIN,
    Capacity,
    Demand,
    QualityHull,
    QualityHulls,
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


def test_quality_after_gives_images_their_remaining_time() -> None:
    """Two images are due in 2 ms and two in 14 ms: they get 1 ms and 6 ms each."""
    hull = QualityHull.from_points(POINTS)
    plain, half = Capacity(1.0, 1.0, 0.0), Capacity(0.5, 1.0, 0.0)
    demand = Demand(((0.002, 2.0), (0.014, 4.0)), tight_budget_s=0.1, min_s_per_image=0.001)
    assert demand.quality_after(hull, 0.0, 0, plain) == pytest.approx(2 * 0.7 + 2 * 0.9)
    # The engine is busy for 4 ms with the first two: 10 ms are left for the other two.
    assert demand.quality_after(hull, 0.004, 2, plain) == pytest.approx(2 * hull.quality(0.005))
    # The engine is busy for 3 ms with none of them: those due in 2 ms are lost.
    assert demand.quality_after(hull, 0.003, 0, plain) < 2 * 0.9 + 0.7
    # A machine of half the speed has half of the time in the profile's seconds.
    assert demand.quality_after(hull, 0.0, 0, half) == pytest.approx(
        2 * hull.quality(0.0005) + 2 * hull.quality(0.003)
    )
