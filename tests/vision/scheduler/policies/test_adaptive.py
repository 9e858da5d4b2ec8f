"""Tests of the adaptive policy and of its arrival forecast."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladderstitch.scheduling.requests import Request
from ladderstitch.vision.scheduler.policies.adaptive import Adaptive
from ladderstitch.vision.scheduler.policies.forecast import (
    ARRIVAL_WINDOW,
    ArrivalForecast,
    Arrivals,
)
from tests.support.image_scheduling import make_candidates, make_hulls, make_request, plain_view

NOW = 50.0


NO_FORECAST = ArrivalForecast()


def decide(requests: list[Request], forecast: ArrivalForecast = NO_FORECAST) -> tuple[int, int]:
    """Return the variant and the number of requests of the next batch."""
    got = Adaptive(make_candidates(), 0.0, forecast, make_hulls())(requests, plain_view(), NOW)
    return got.variant, len(got.requests)


def forecast_of(budgets_s: list[float], rate: float) -> ArrivalForecast:
    """Return the forecast at `NOW` after regular arrivals with these budgets in turn."""
    arrivals = Arrivals()
    for i in range(ARRIVAL_WINDOW):
        at = NOW - (ARRIVAL_WINDOW - i) / rate
        arrivals.add(make_request(at + budgets_s[i % len(budgets_s)], arrival=at))
    return arrivals.forecast


def test_decision_for_one_request_is_the_best_that_fits() -> None:
    for slack_ms, variant in ((1.1, 0), (2.5, 3), (5.0, 1), (9.0, 2), (1000.0, 2)):
        assert decide([make_request(NOW + slack_ms / 1e3)]) == (variant, 1)


def test_decision_leaves_time_for_many_tight_arrivals() -> None:
    relaxed = [make_request(NOW + 1.0)]
    rare, common = forecast_of([0.004, 1.0], rate=1.0), forecast_of([0.004, 1.0], rate=200.0)
    assert decide(relaxed, NO_FORECAST) == (2, 1)
    assert NO_FORECAST.expected_late(1.0, 0.001) == 0.0
    assert decide(relaxed, rare) == (2, 1)
    assert decide(relaxed, common) == (1, 1)  # after 3 ms, a budget of 4 ms still leaves 1 ms


def test_decision_does_not_make_the_next_request_late() -> None:
    variant, size = decide([make_request(NOW + 0.0083), make_request(NOW + 0.0086)])
    assert (variant, size) != (2, 1)  # 8 ms for the first alone would leave 0.6 ms
    view = plain_view()
    seconds = view.seconds(variant, size)
    assert size == 2 or seconds + view.seconds(0, 1) <= 0.0086


def test_max_batch_size_of_one_leaves_time_for_the_next() -> None:
    """Two waiting requests are two batches; the first leaves the second enough time."""
    view = plain_view()
    single = type(view)({s: times[:2] for s, times in view.profiled.items()}, 1, 1.0, 1.0)
    waiting = [make_request(NOW + 0.0083), make_request(NOW + 0.0086)]
    got = Adaptive(make_candidates(), 0.0, NO_FORECAST, make_hulls())(waiting, single, NOW)
    assert len(got.requests) == 1
    assert single.seconds(got.variant, 1) + single.seconds(0, 1) <= 0.0086


def test_recent_overruns_lower_the_variant() -> None:
    """The best variant fits by the median, but one of three recent batches took 30 % longer."""
    view = plain_view()
    careful = type(view)(view.profiled, 8, 1.0, tail=1.3, residuals=(1.0, 1.0, 1.3))
    request = [make_request(NOW + 0.0085)]
    assert (
        Adaptive(make_candidates(), 0.0, NO_FORECAST, make_hulls())(request, view, NOW).variant == 2
    )
    assert (
        Adaptive(make_candidates(), 0.0, NO_FORECAST, make_hulls())(request, careful, NOW).variant
        == 1
    )


def test_late_request_does_not_delay_those_on_time() -> None:
    late, tight = make_request(NOW - 0.001), make_request(NOW + 0.0015)
    decision = Adaptive(make_candidates(), 0.0, NO_FORECAST, make_hulls())(
        [late, tight], plain_view(), NOW
    )
    assert decision.requests == (tight,)


def test_requests_without_deadlines_get_the_best_variant() -> None:
    forecast = forecast_of([float("inf"), 0.02], rate=20.0)
    assert decide([make_request()], forecast) == (2, 1)
    assert decide([make_request()]) == (2, 1)
    tight = make_request(NOW + 0.0015)
    got = Adaptive(make_candidates(), 0.0, forecast, make_hulls())(
        [tight, make_request()], plain_view(), NOW
    )
    assert got.requests[0] is tight
    assert plain_view().seconds(got.variant, len(got.requests)) <= 0.0015


def test_late_request_is_served_within_bounded_time() -> None:
    """A late request gets its turn although new requests that can be on time keep arriving."""
    late = make_request(NOW - 0.001)
    policy, served, now = Adaptive(make_candidates(), 0.0, NO_FORECAST, make_hulls()), 0.0, NOW
    while not served and now < NOW + 60:
        others = [make_request(now + 0.004 + i / 1e4, arrival=now) for i in range(8)]
        decision = policy([late, *others], plain_view(), now)
        served = now if late in decision.requests else 0.0
        now += plain_view().seconds(decision.variant, len(decision.requests))
    assert 0 < served - NOW < 10


def test_overload_prefers_a_full_batch_to_one_urgent_request() -> None:
    """The first takes 1 of its 1.2 ms alone; eight of the others take 3.8 ms together."""
    head = make_request(NOW + 0.0012)
    others = [make_request(NOW + 0.0041 + i / 1e6) for i in range(200)]
    decision = Adaptive(make_candidates(), 0.0, NO_FORECAST, make_hulls())(
        [head, *others], plain_view(), NOW
    )
    assert decision.variant == 0
    assert len(decision.requests) == 8
    assert head not in decision.requests


@given(
    st.lists(st.floats(0.001, 0.1), min_size=1, max_size=20),
    st.floats(0.0005, 0.2),
    st.floats(0.0001, 0.01),
)
def test_expected_late_matches_its_definition(
    budgets_s: list[float], busy_s: float, fastest_s: float
) -> None:
    ordered = sorted(budgets_s)
    sums = [sum(ordered[:i]) for i in range(len(ordered) + 1)]
    forecast = ArrivalForecast(100.0, tuple(ordered), tuple(sums))
    periods = [max(0.0, busy_s + fastest_s - b) for b in ordered if b >= fastest_s]
    wanted = 100.0 * sum(periods) / len(ordered)
    assert forecast.expected_late(busy_s, fastest_s) == pytest.approx(wanted, abs=1e-9)


def test_forecast_follows_the_rate_of_recent_arrivals() -> None:
    arrivals, rng, now = Arrivals(), random.Random(1), 0.0
    for rate in (50.0, 500.0):
        for _ in range(2 * ARRIVAL_WINDOW):
            now += rng.expovariate(rate)
            arrivals.add(make_request(now + 0.01, arrival=now))
        assert arrivals.forecast.rate == pytest.approx(rate, rel=0.25)
        assert len(arrivals.forecast.budgets_s) == ARRIVAL_WINDOW


def test_forecast_falls_with_the_silence_since_the_last_arrival() -> None:
    """Gaps are 10 ms and the traffic is 2.56 s old."""
    forecast = forecast_of([0.01], rate=100.0)
    rates = [forecast.at(NOW + silence_s).rate for silence_s in (-0.01, 0.0, 0.05, 0.5, 5.0)]
    assert rates[0] == pytest.approx(100.0)
    assert rates == sorted(rates, reverse=True)
    assert rates[1] > 99
    assert rates[2] > 50
    assert rates[3] < 5


def test_waiting_requests_precede_forecast_arrivals() -> None:
    """More arrivals are forecast than can be served, but all waiting requests can be on time."""
    forecast = forecast_of([0.004, 0.1], rate=10_000.0)
    head = make_request(NOW + 0.004)
    others = [make_request(NOW + 0.1 + i / 1e6) for i in range(60)]
    policy = Adaptive(make_candidates(), 0.0, forecast, make_hulls())
    assert head in policy([head, *others], plain_view(), NOW).requests
