"""Tests of arrival processes: rates, variation, seeds, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ladderstitch_loadtest.load.traces import (
    BudgetClass,
    Trace,
    gamma,
    ramp,
    read_arrivals,
    replay,
    step,
)


@pytest.mark.parametrize("cv2", [0.0, 1.0, 2.0, 8.0])
def test_gamma_gaps_have_their_mean_and_variation(cv2: float) -> None:
    times = gamma(200.0, cv2, 200.0, np.random.default_rng(1))
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    assert times[-1] < 200.0
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.08)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(cv2, rel=0.1, abs=1e-9)
    assert np.array_equal(times, gamma(200.0, cv2, 200.0, np.random.default_rng(1)))


def test_gamma_short_bursty_traces_have_the_mean_rate() -> None:
    counts = [len(gamma(100.0, 8.0, 0.5, np.random.default_rng(seed))) for seed in range(600)]
    assert np.mean(counts) == pytest.approx(50, rel=0.1)


def test_ramp_and_step_follow_their_rates() -> None:
    rng = np.random.default_rng(2)
    up = ramp(100.0, 900.0, 40.0, rng)
    assert len(up) == pytest.approx(500 * 40, rel=0.03)
    assert np.sum(up < 5) == pytest.approx(5 * 200, rel=0.12)  # the mean of 100 and 300
    assert np.sum((up > 15) & (up < 25)) == pytest.approx(10 * 800, rel=0.05)  # 700 to 900 and back
    burst = step(50.0, 1000.0, 2.0, 4.0, 8.0, rng)
    assert np.sum((burst >= 2) & (burst < 4)) == pytest.approx(2000, rel=0.07)
    assert np.sum(burst < 2) == pytest.approx(100, rel=0.35)
    assert burst[-1] <= 8.0


def test_read_arrivals_parses_both_formats_or_names_the_line(tmp_path: Path) -> None:
    azure, plain = tmp_path / "azure.csv", tmp_path / "plain.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:05.0319600,3180,8\n"
    )
    plain.write_text("3.5\n1.0\n2.0\n")
    assert read_arrivals(azure) == pytest.approx([0.0, 1.052])
    assert read_arrivals(plain) == pytest.approx([0.0, 1.0, 2.5])
    plain.write_text("1.0\nsoon\n")
    with pytest.raises(ValueError, match=r"plain\.csv:2: expected seconds, got \['soon'\]"):
        read_arrivals(plain)
    plain.write_text("")
    with pytest.raises(ValueError, match="at least one arrival"):
        read_arrivals(plain)


def test_replay_keeps_the_pattern_at_another_rate() -> None:
    recorded = np.cumsum(np.random.default_rng(3).gamma(0.5, 2.0, 5000))
    played = replay(recorded, rate=500.0, seconds=4.0)
    assert len(played) == pytest.approx(2000, rel=0.01)
    stretch = np.diff(played) / np.diff(recorded[: len(played)])
    assert stretch.max() == pytest.approx(stretch.min())


def test_draw_gives_budgets_by_share() -> None:
    rng = np.random.default_rng(4)
    classes = [BudgetClass("tight", 0.008, 30), BudgetClass("relaxed", 0.1, 70)]
    trace = Trace.draw("t", gamma(100.0, 1.0, 100.0, rng), classes, rng)
    assert (trace.budgets_s == 0.008).mean() == pytest.approx(0.3, abs=0.02)
