"""The latency table: interpolation, and the correction by what the machine does."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladderstitch.scheduling.latency_model import DispatchOverhead, LatencyModel
from tests.support.image_scheduling import ALONE_MS, make_profile, plain_view


def test_profiled_sizes_are_kept_and_those_between_interpolated() -> None:
    profile, view = make_profile(), LatencyModel(make_profile()).view
    for variant, latency in profile.variants.items():
        for rows, seconds in zip(profile.batch_sizes, latency.median_s, strict=True):
            assert view.expected(variant, rows) == pytest.approx(seconds)
        # The made-up profile is linear in rows, so every interpolated value is known.
        for rows in range(1, 9):
            wanted = ALONE_MS[variant] * 1e-3 * (0.6 + 0.4 * rows)
            assert view.expected(variant, rows) == pytest.approx(wanted)


def test_a_dip_in_the_profile_does_not_make_larger_batches_faster() -> None:
    profile = make_profile()
    dipped = profile.variants[0].model_copy(update={"median_s": (0.001, 0.003, 0.002, 0.004)})
    view = LatencyModel(profile.model_copy(update={"variants": {0: dipped}})).view
    seconds = [view.expected(0, rows) for rows in range(1, 9)]
    assert seconds == sorted(seconds)


@given(st.integers(0, 4), st.floats(0, 0.1), st.sampled_from([1.0, 1.7]))
def test_largest_fit_is_the_largest_that_fits(variant: int, slack: float, tail: float) -> None:
    view = plain_view(tail)
    fits = [rows for rows in range(1, 9) if view.seconds(variant, rows) <= slack]
    got = view.largest_fit(variant, slack)
    assert abs(got - max(fits, default=0)) <= (
        abs(slack - view.seconds(variant, max(got, 1))) < 1e-9
    )


def test_before_any_observation_the_tail_is_the_profiles() -> None:
    view = LatencyModel(make_profile()).view
    assert view.slowdown == 1.0
    assert view.tail == pytest.approx(1.2)
    assert view.seconds(1, 1) == pytest.approx(1.2 * view.expected(1, 1))


def test_a_hog_starts_and_stops() -> None:
    table, rng = LatencyModel(make_profile()), random.Random(5)

    def run(batches: int, slowdown: float) -> None:
        for _ in range(batches):
            variant, rows = rng.choice(list(ALONE_MS)), rng.randint(1, 8)
            actual = table.view.profiled[variant][rows] * slowdown * rng.uniform(0.97, 1.05)
            table.observe(variant, rows, actual)

    run(50, 1.0)
    assert table.view.slowdown == pytest.approx(1.0, abs=0.05)
    run(5, 2.5)
    assert table.view.slowdown == pytest.approx(2.5, abs=0.15)
    run(5, 1.0)
    assert table.view.slowdown == pytest.approx(1.0, abs=0.05)


def test_single_outliers_do_not_move_the_slowdown_but_the_tail_learns_them() -> None:
    table = LatencyModel(make_profile(), probability=0.95)
    for i in range(400):
        spike = 3.0 if i % 10 == 0 else 1.0
        table.observe(1, 4, table.view.profiled[1][4] * spike)
        assert table.view.slowdown == 1.0 or i < 7
    assert table.view.tail == pytest.approx(3.0)
    assert table.view.seconds(1, 4) == pytest.approx(3 * table.view.expected(1, 4))


def test_a_view_is_a_snapshot() -> None:
    table = LatencyModel(make_profile())
    before = table.view
    expected = before.expected(2, 1)
    table.observe(2, 1, 10 * expected)
    assert before.expected(2, 1) == expected
    assert table.view.expected(2, 1) > expected


@pytest.mark.parametrize("spell", [20.0, 1.0])
def test_refusals_without_other_work_bring_the_correction_back(spell: float) -> None:
    table = LatencyModel(make_profile())
    for _ in range(300):
        table.observe(0, 1, spell * table.view.profiled[0][1])
    before, refused = table.view, 0
    while table.view.seconds(0, 1) > 0.7 * table.view.profiled[0][1]:
        table.decay_after_idle_rejection()
        refused += 1
    assert before.seconds(0, 1) >= spell * before.profiled[0][1]
    assert refused < 300
    for _ in range(1000):
        table.decay_after_idle_rejection()
    assert table.view.slowdown == 0.5
    table.observe(0, 1, table.view.profiled[0][1])
    assert table.view.slowdown == pytest.approx(1.0)  # the probe counts alone
    assert table.view.tail < 1.3


def test_doubt_does_not_slow_a_fast_machine() -> None:
    table = LatencyModel(make_profile())
    for _ in range(10):
        table.observe(0, 1, 0.3 * table.view.profiled[0][1])
    table.decay_after_idle_rejection()
    assert table.view.slowdown == pytest.approx(0.3)


def test_a_lower_probability_counts_at_once() -> None:
    table = LatencyModel(make_profile(), probability=0.99)
    for i in range(320):
        table.observe(1, 4, table.view.profiled[1][4] * (2.0 if i % 20 == 0 else 1.0))
    assert table.view.tail == pytest.approx(2.0)
    table.set_probability(0.9)
    assert table.view.tail == pytest.approx(1.0)


def test_transit_is_the_95th_percentile_of_what_is_not_compute() -> None:
    transit = DispatchOverhead()
    assert transit.seconds == 0.0
    for i in range(200):
        transit.observe(0.003 if i % 10 == 0 else 0.0005)
    assert transit.seconds == 0.003
    for _ in range(64):
        transit.observe(-1e-9)  # clocks of two processes
    assert transit.seconds == 0.0


def test_the_chance_to_be_in_time_is_the_share_of_recent_batch_runner() -> None:
    view = replace(plain_view(slowdown=2.0), residuals=(0.9, 1.0, 1.1, 1.5))
    expected_s = view.expected(1, 4)
    assert [view.chance(1, 4, share * expected_s) for share in (0.5, 0.95, 1.1, 2.0)] == [
        0.0,
        0.25,
        0.75,
        1.0,
    ]
