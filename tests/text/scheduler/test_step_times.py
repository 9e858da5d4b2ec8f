from __future__ import annotations

import itertools

import numpy as np
import pytest

from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.messages import Step, StepOutput
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.text.scheduler import step_times
from ladderstitch.text.scheduler.step_times import ExtraTimes, StepTimes, measure_steps
from tests.support.elastic_models import LARGE
from tests.text.scheduler.test_planner import LADDER, PROFILE, STANDARD

BASE_S = (1e-3, 3e-3)
TOKEN_S, SEQUENCE_S, CACHED_S = 1e-4, 2e-4, 5e-7


class TimedGroup:
    """A group on a clock of its own, whose steps take known times; every fifth one is disturbed."""

    def __init__(self) -> None:
        self.rank_config = RankConfig(
            model=LARGE.model_copy(update={"max_positions": 512}),
            paths=(ResidualScheme(), ResidualScheme(scheme="ladder")),
            max_model_len=512,
            sequences=8,
            max_batched_tokens=128,
        )
        self.now, self._calls = 0.0, itertools.count()

    async def run(self, step: Step) -> StepOutput:
        cached = sum(part.start for part in step.inputs)
        seconds = BASE_S[step.path] + TOKEN_S * (step.num_tokens - 1)
        seconds += SEQUENCE_S * (len(step.inputs) - 1) + CACHED_S * cached
        self.now += seconds * (10.0 if next(self._calls) % 5 == 4 else 1.0)
        return StepOutput(np.zeros(0, np.int64), np.zeros((0, 2), np.float32))


async def test_measured_times_are_those_of_undisturbed_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = TimedGroup()
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: group.now)
    times = await measure_steps(group, 128)  # type: ignore[arg-type] # what is used of a group
    for path, tokens in itertools.product((0, 1), (1, 8, 30, 64, 128)):
        expected = BASE_S[path] + TOKEN_S * (tokens - 1)
        assert times.expected(path, tokens) == pytest.approx(expected, rel=1e-6)
    step = BASE_S[1] + 7 * TOKEN_S + 7 * SEQUENCE_S + 3000 * CACHED_S
    assert times.expected(1, 8, 8, 3000) == pytest.approx(step, rel=1e-6)


def test_pauses_between_steps_are_part_of_the_expected_seconds() -> None:
    times = StepTimes(PROFILE, ExtraTimes(sequence_s=0.002, cached_token_s=1e-4))
    before = times.expected(LADDER, 4, 4, 100)
    for _ in range(50):
        times.observe_gap(4, 0.004)
    assert times.expected(LADDER, 4, 4, 100) == pytest.approx(before + 0.004, rel=1e-3)
    assert times.copy().expected(LADDER, 4, 4, 100) == pytest.approx(before)


def test_observed_step_of_expected_length_changes_nothing() -> None:
    times = StepTimes(PROFILE, ExtraTimes(sequence_s=0.002, cached_token_s=1e-4))
    for _ in range(20):
        times.observe(STANDARD, 8, 8, 1000, times.expected(STANDARD, 8, 8, 1000))
    assert times.latency.view.slowdown == pytest.approx(1.0)
