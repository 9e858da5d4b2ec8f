"""Prices and demand: hulls against linear programs, minorants by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from ladderstitch.vision.scheduler.policies.demand import GUARD, ArrivalForecast, Demand
from ladderstitch.vision.scheduler.policies.quality_hull import TURNS_OUT, QualityHull, QualityHulls
from tests.support.image_scheduling import (
    QUALITY,
    make_candidates,
    make_hulls,
    make_request,
    plain_view,
)

POINTS = [(0.001, 0.7), (0.002, 0.8), (0.006, 0.9)]


@pytest.mark.parametrize("seconds_per_row", [0.0002, 0.001, 0.0015, 0.003, 0.006, 0.02])
def test_a_hull_is_the_best_mix(seconds_per_row: float) -> None:
    """Against the linear program: shares of variants, at most 1, within the time."""
    best = linprog(
        [-q for _, q in POINTS],
        A_ub=[[cost for cost, _ in POINTS], [1.0] * len(POINTS)],
        b_ub=[seconds_per_row, 1.0],
    )
    assert QualityHull.over(POINTS).quality(seconds_per_row) == pytest.approx(-best.fun)


def test_smoothing_is_the_mean_over_what_may_turn_out() -> None:
    plain, smooth = QualityHull.over(POINTS), QualityHull.over(POINTS).smoothed()
    for u in np.geomspace(1e-4, 0.1, 50).tolist():
        expected = sum(weight * plain.quality(share * u) for share, weight in TURNS_OUT)
        assert smooth.quality(u) == pytest.approx(expected)
    assert sum(weight for _, weight in TURNS_OUT) == pytest.approx(1.0)


def test_a_long_spell_allows_cheaper_rows() -> None:
    prices = make_hulls()
    short, long = prices.hull(0.0), prices.hull(1.0)
    assert short.quality(0.0008) < long.quality(0.0008)
    assert prices.efficient <= set(make_candidates().frontier)
    assert 0 in prices.efficient
    assert QualityHulls.of((0,), QUALITY, plain_view().profiled).efficient == {0}


def test_demand_counts_the_queue_and_those_to_come() -> None:
    """Ten requests due at 60 ms; 50 a second more, each with 40 ms."""
    queue = [make_request(0.06) for _ in range(10)]
    forecast = ArrivalForecast(50.0, (0.04,), (0.0, 0.04))
    demand = Demand.of(queue, queue, 0, forecast, 0.0)
    due, rows = demand.points[-1]
    assert due == pytest.approx(2.0 * 0.04 - GUARD * 0.04)
    assert rows == pytest.approx(10 + 50 * (0.08 - 0.04))
    assert demand.each_s == pytest.approx((0.06 - GUARD * 0.04) / 10)  # of those who wait only


def test_earnings_give_each_row_the_time_that_its_deadline_leaves() -> None:
    """Two rows due in 2 ms and two in 14: the first get 1 ms each, the others 6."""
    hull = QualityHull.over(POINTS)
    demand = Demand(((0.002, 2.0), (0.014, 4.0)), impatient_s=0.1, each_s=0.001)
    assert demand.earnings(hull, 0.0, 0, 1.0) == pytest.approx(2 * 0.7 + 2 * 0.9)
    # Busy for 4 ms with the first two: 10 ms are left for two rows.
    assert demand.earnings(hull, 0.004, 2, 1.0) == pytest.approx(2 * hull.quality(0.005))
    # Busy for 3 ms with none of them: who is due in 2 ms is lost.
    assert demand.earnings(hull, 0.003, 0, 1.0) < 2 * 0.9 + 0.7
    # A machine that is twice as slow: half of the time in the profile's seconds.
    assert demand.earnings(hull, 0.0, 0, 0.5) == pytest.approx(
        2 * hull.quality(0.0005) + 2 * hull.quality(0.003)
    )
