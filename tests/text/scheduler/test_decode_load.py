"""Tests of the share of the ranks' time, against sums that are written out."""

from __future__ import annotations

import random

import pytest

from ladderstitch.text.scheduler.decode_load import DecodeLoad, SchedulerLoad
from ladderstitch.text.scheduler.step_times import ExtraTimes, StepTimes
from tests.text.scheduler.test_planner import LADDER, PROFILE, STANDARD

BASE_S = {STANDARD: 0.049, LADDER: 0.019}
"""Seconds of steps of `PROFILE` without those of its tokens, of 1 ms each."""


def step_s(variant: int, count: int, cached_s: float = 0.0) -> float:
    """Return the seconds of a step of `count` sequences, 2 ms for each after the first."""
    return BASE_S[variant] + 0.001 * count + 0.002 * (count - 1) + cached_s * count


def test_load_changed_step_by_step_equals_the_sum_over_its_variants() -> None:
    times = StepTimes(PROFILE, ExtraTimes(sequence_s=0.002, cached_token_s=1e-4))
    periods = {STANDARD: [0.2, 0.3, 0.4], LADDER: [0.1, 0.5]}
    # 700 cached tokens are read in 70 ms, 14 ms for each of the five sequences.
    load = DecodeLoad(SchedulerLoad({v: list(p) for v, p in periods.items()}, {}, 0, 700), times)
    choice = random.Random(4)
    for _ in range(60):
        variant = choice.choice((STANDARD, LADDER))
        if periods[variant] and choice.random() < 0.5:
            period_s = choice.choice(periods[variant])
            periods[variant].remove(period_s)
            load.remove(variant, period_s)
        else:
            period_s = choice.uniform(0.05, 0.6)
            assert load.share_with(variant, period_s) == pytest.approx(
                share_of({**periods, variant: [*periods[variant], period_s]})
            )
            periods[variant].append(period_s)
            load.add(variant, period_s)
        assert load.share == pytest.approx(share_of(periods))
        rounds = [step_s(v, len(p), 0.014) for v, p in periods.items() if p]
        assert load.round_s == pytest.approx(sum(rounds))


def share_of(periods: dict[int, list[float]]) -> float:
    return sum(step_s(v, len(p), 0.014) / min(p) for v, p in periods.items() if p)


def test_a_sequence_gets_the_time_that_others_leave() -> None:
    times = StepTimes(PROFILE)
    half = DecodeLoad(SchedulerLoad({LADDER: [0.04]}), times)  # 20 ms in every 40 ms
    assert half.token_s_with(STANDARD) == pytest.approx(0.07)  # one step of each, in turns
    rare = DecodeLoad(SchedulerLoad({LADDER: [0.2]}), times)
    assert rare.token_s_with(STANDARD) == pytest.approx(0.05 / 0.9)
    full = DecodeLoad(SchedulerLoad({LADDER: [0.01]}), times)
    assert full.token_s_with(STANDARD) == pytest.approx(0.07)
    assert full.token_s_with(LADDER) == pytest.approx(0.021)


def test_no_load_needs_no_time() -> None:
    load = DecodeLoad(SchedulerLoad(), StepTimes(PROFILE))
    assert (load.share, load.round_s) == (0.0, 0.0)
    assert load.token_s_with(LADDER) == pytest.approx(0.02)
