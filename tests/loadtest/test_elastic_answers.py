"""Tests of the comparison of answers that change their stitch with answers that keep it."""

from __future__ import annotations

import asyncio
import time

import pytest

from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.scheduler.step_times import ExtraTimes, StepTimes
from ladderstitch_loadtest.benchmarks.elastic_answers import (
    SETTINGS,
    Workload,
    simulated_scheduler,
    summarise,
)
from ladderstitch_loadtest.benchmarks.elastic_plans import PLANS, Scenario
from ladderstitch_loadtest.simulation.virtual_time import run_simulated
from tests.support.elastic_models import write_elastic

SECONDS = (0.001, 0.00135, 0.0017, 0.00205, 0.0024, 0.0025, 0.0025, 0.0025)
CHUNK_SECONDS = (0.004, 0.007, 0.01, 0.013, 0.016, 0.02, 0.02, 0.02)
"""Of steps of 1 and of 64 tokens, for each path."""


def test_simulated_time_passes_without_waiting() -> None:
    async def program() -> list[float]:
        started = time.monotonic()
        await asyncio.gather(asyncio.sleep(1000), asyncio.sleep(2000))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 500)
        return [started, time.monotonic()]

    started = time.monotonic()
    first, last = run_simulated(program())
    assert last - first == pytest.approx(2500)
    assert time.monotonic() - started < 500


def test_simulated_program_that_never_ends_raises() -> None:
    async def program() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="waits for an event that never comes"):
        run_simulated(program())


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    bundle = TextBundle.load(write_elastic(tmp_path_factory.mktemp("models") / "elastic"))
    config = RankConfig.of(bundle, max_model_len=512, kv_cache_tokens=8192)
    profile = LatencyProfile(
        device="none",
        threads=1,
        date="",
        versions={},
        batch_sizes=(1, 64),
        variants={
            v: Latency(median_s=pair, p99_s=pair)
            for v, pair in enumerate(zip(SECONDS, CHUNK_SECONDS, strict=True))
        },
    )
    times = StepTimes(profile, ExtraTimes(sequence_s=2e-4, translation_s=3e-6))
    tokenizer, quality = bundle.tokenizer(), bundle.quality
    assert quality is not None
    return Workload(
        list(range(200)),
        lambda: simulated_scheduler(config, times, tokenizer, quality, None, seed=3),
    )


@pytest.mark.parametrize("scenario", PLANS)
def test_changing_meets_more_budgets_or_gives_more_quality(
    workload: Workload, scenario: Scenario
) -> None:
    stitches = run_simulated(workload.stitches())
    plan = PLANS[scenario](workload.prompts, stitches, 6.0, 1)
    found = {
        name: run_simulated(workload.run(plan, settings)) for name, settings in SETTINGS.items()
    }
    again = run_simulated(workload.run(plan, SETTINGS["changed"]))
    assert again == found["changed"]  # the same seed gives the same run
    num_counted = sum(arrival.request.budget.is_set for arrival in plan)
    assert {len(outcomes) for outcomes in found.values()} == {num_counted}
    assert all(outcome.changes == 0 for outcome in found["kept"])
    assert any(outcome.changes for outcome in found["changed"])
    figures = summarise([found])
    gain = figures["effective_quality_difference"]
    assert isinstance(gain, dict)
    assert gain["mean"] > 0
