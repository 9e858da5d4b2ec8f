"""Tests of the latency model: interpolation, and the correction by observed batches."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladderstitch.scheduling.latency_model import DispatchOverhead, LatencyModel
from tests.support.image_scheduling import ALONE_MS, make_profile, plain_view


def test_view_interpolates_between_profiled_batch_sizes() -> None:
    profile, view = make_profile(), LatencyModel(make_profile()).view
    for variant, latency in profile.variants.items():
        for batch_size, seconds in zip(profile.batch_sizes, latency.median_s, strict=True):
            assert view.expected(variant, batch_size) == pytest.approx(seconds)
        # The synthetic profile is linear in the batch size, so every value is known.
        for batch_size in range(1, 9):
            wanted = ALONE_MS[variant] * 1e-3 * (0.6 + 0.4 * batch_size)
            assert view.expected(variant, batch_size) == pytest.approx(wanted)


def test_view_with_a_dip_in_the_profile_never_falls() -> None:
    profile = make_profile()
    dipped = profile.variants[0].model_copy(update={"median_s": (0.001, 0.003, 0.002, 0.004)})
    view = LatencyModel(profile.model_copy(update={"variants": {0: dipped}})).view
    seconds = [view.expected(0, batch_size) for batch_size in range(1, 9)]
    assert seconds == sorted(seconds)


@given(st.integers(0, 4), st.floats(0, 0.1), st.sampled_from([1.0, 1.7]))
def test_largest_fit_is_the_largest_batch_within_slack(
    variant: int, slack: float, tail: float
) -> None:
    view = plain_view(tail)
    fits = [batch_size for batch_size in range(1, 9) if view.seconds(variant, batch_size) <= slack]
    got = view.largest_fit(variant, slack)
    assert abs(got - max(fits, default=0)) <= (
        abs(slack - view.seconds(variant, max(got, 1))) < 1e-9
    )


def test_tail_before_observations_is_the_profiles() -> None:
    view = LatencyModel(make_profile()).view
    assert view.slowdown == 1.0
    assert view.tail == pytest.approx(1.2)
    assert view.seconds(1, 1) == pytest.approx(1.2 * view.expected(1, 1))


def test_slowdown_follows_a_noisy_neighbour() -> None:
    model, rng = LatencyModel(make_profile()), random.Random(5)

    def run(batches: int, slowdown: float) -> None:
        for _ in range(batches):
            variant, batch_size = rng.choice(list(ALONE_MS)), rng.randint(1, 8)
            actual = model.view.profiled[variant][batch_size] * slowdown * rng.uniform(0.97, 1.05)
            model.observe(variant, batch_size, actual)

    run(50, 1.0)
    assert model.view.slowdown == pytest.approx(1.0, abs=0.05)
    run(5, 2.5)
    assert model.view.slowdown == pytest.approx(2.5, abs=0.15)
    run(5, 1.0)
    assert model.view.slowdown == pytest.approx(1.0, abs=0.05)


def test_outliers_move_the_tail_but_not_the_slowdown() -> None:
    model = LatencyModel(make_profile(), probability=0.95)
    for i in range(400):
        spike = 3.0 if i % 10 == 0 else 1.0
        model.observe(1, 4, model.view.profiled[1][4] * spike)
        assert model.view.slowdown == 1.0 or i < 7
    assert model.view.tail == pytest.approx(3.0)
    assert model.view.seconds(1, 4) == pytest.approx(3 * model.view.expected(1, 4))


def test_view_does_not_change_when_the_model_observes() -> None:
    model = LatencyModel(make_profile())
    before = model.view
    expected = before.expected(2, 1)
    model.observe(2, 1, 10 * expected)
    assert before.expected(2, 1) == expected
    assert model.view.expected(2, 1) > expected


@pytest.mark.parametrize("period", [20.0, 1.0])
def test_idle_rejections_decay_the_slowdown(period: float) -> None:
    model = LatencyModel(make_profile())
    for _ in range(300):
        model.observe(0, 1, period * model.view.profiled[0][1])
    before, rejected = model.view, 0
    while model.view.seconds(0, 1) > 0.7 * model.view.profiled[0][1]:
        model.decay_after_idle_rejection()
        rejected += 1
    assert before.seconds(0, 1) >= period * before.profiled[0][1]
    assert rejected < 300
    for _ in range(1000):
        model.decay_after_idle_rejection()
    assert model.view.slowdown == 0.5
    model.observe(0, 1, model.view.profiled[0][1])
    assert model.view.slowdown == pytest.approx(1.0)  # only the latest batch counts
    assert model.view.tail < 1.3


def test_idle_rejections_do_not_slow_a_fast_machine() -> None:
    model = LatencyModel(make_profile())
    for _ in range(10):
        model.observe(0, 1, 0.3 * model.view.profiled[0][1])
    model.decay_after_idle_rejection()
    assert model.view.slowdown == pytest.approx(0.3)


def test_set_probability_changes_the_tail_at_once() -> None:
    model = LatencyModel(make_profile(), probability=0.99)
    for i in range(320):
        model.observe(1, 4, model.view.profiled[1][4] * (2.0 if i % 20 == 0 else 1.0))
    assert model.view.tail == pytest.approx(2.0)
    model.set_probability(0.9)
    assert model.view.tail == pytest.approx(1.0)


def test_dispatch_overhead_is_the_95th_percentile() -> None:
    overhead = DispatchOverhead()
    assert overhead.seconds == 0.0
    for i in range(200):
        overhead.observe(0.003 if i % 10 == 0 else 0.0005)
    assert overhead.seconds == 0.003
    for _ in range(64):
        overhead.observe(-1e-9)  # the clocks of two processes differ
    assert overhead.seconds == 0.0


def test_expected_misses_are_the_shares_of_residuals_above_the_slacks() -> None:
    view = replace(plain_view(slowdown=2.0), residuals=(0.9, 1.0, 1.1, 1.5))
    expected_s = view.expected(1, 4)
    slacks_s = [share * expected_s for share in (0.5, 0.95, 1.1, 2.0)]
    assert [view.expected_misses(1, 4, [slack]) for slack in slacks_s] == [1.0, 0.75, 0.25, 0.0]
    assert view.expected_misses(1, 4, slacks_s) == 2.0
    assert view.expected_misses(1, 4, []) == 0.0
