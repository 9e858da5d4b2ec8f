"""A batch that does not return ends the scheduler, so that the replica is replaced."""

from __future__ import annotations

import asyncio

import pytest

from ladderstitch.errors import EngineRestarting
from ladderstitch.scheduling.requests import ImageAnswer
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.model_metrics import VisionMetrics
from ladderstitch.vision.scheduler.batch_runner import HangLimits
from ladderstitch.vision.scheduler.scheduler import Scheduler
from tests.support.image_scheduling import QUALITY, FakeClock, ScriptedEngine, make_profile
from tests.vision.scheduler.test_scheduler import Bench, settle
from tests.vision.scheduler.test_supervision import ends

HASTY = HangLimits(floor_s=0.05, factor=0.0, interval_s=0.01)


def make_bench(clock: FakeClock, limits: HangLimits) -> Bench:
    """Return a bench whose engine waits for its gate, and whose batches have limits."""
    bench = Bench(clock)
    bench.engine = ScriptedEngine(clock)
    bench.engine.gate = asyncio.Event()
    bench.metrics = Metrics()
    bench.scheduler = Scheduler(
        bench.engine,
        QUALITY,
        make_profile(),
        SchedulerSettings.model_validate({"policy": "max_quality"}),
        VisionMetrics(bench.metrics, "m", QUALITY),
        clock,
        hang_limits=limits,
    )
    return bench


@pytest.mark.parametrize("num_waiting", [0, 3])
async def test_batch_that_hangs_fails_all_requests_and_stops_scheduler(
    clock: FakeClock, num_waiting: int, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench(clock, HASTY)
    running = bench.submit(0)
    await settle()
    waiting = [bench.submit(1 + n) for n in range(num_waiting)]
    for end in await ends(running, *waiting):
        assert isinstance(end, EngineRestarting)
        assert end.code == "UNAVAILABLE"
    assert not bench.scheduler.running
    (late,) = await ends(bench.submit(9))
    assert isinstance(late, EngineRestarting)
    assert bench.count("batch_hangs_total", model="m") == 1
    assert "batch hangs requests=1 limit_s=0.1" in caplog.text
    await asyncio.wait_for(bench.scheduler.drain(), 300)
    await bench.scheduler.close()


async def test_batch_within_its_limit_is_answered_although_many_run(clock: FakeClock) -> None:
    bench = make_bench(clock, HangLimits(floor_s=1e6, factor=0.0, interval_s=0.001))
    first = bench.submit(0)
    await asyncio.sleep(0.05)  # many checks
    assert bench.engine.gate is not None
    bench.engine.gate.set()
    answers = await ends(first, *(bench.submit(n) for n in range(5)))
    assert all(isinstance(answer, ImageAnswer) for answer in answers)
    assert bench.scheduler.running
    assert bench.count("batch_hangs_total", model="m") == 0
    await bench.scheduler.close()


async def test_batches_one_after_another_do_not_add_up(clock: FakeClock) -> None:
    bench = make_bench(clock, HangLimits(floor_s=0.5, factor=0.0, interval_s=0.1))
    assert bench.engine.gate is not None
    bench.engine.gate.set()
    loop = asyncio.get_running_loop()
    end = loop.time() + 1.0
    while loop.time() < end:
        (answer,) = await ends(bench.submit(0))
        assert isinstance(answer, ImageAnswer)
    assert bench.count("batch_hangs_total", model="m") == 0
    await bench.scheduler.close()


def test_limit_grows_with_the_expected_time_of_a_batch() -> None:
    limits = HangLimits()
    assert limits.limit_s(0.001) == 10.0
    assert limits.limit_s(0.5) == 25.0


async def test_clock_that_jumps_does_not_end_a_batch(clock: FakeClock) -> None:
    bench = make_bench(clock, HangLimits(floor_s=30.0, factor=0.0, interval_s=0.001))
    request = bench.submit(0)
    await asyncio.sleep(0.02)
    clock.now += 3600.0  # the process was stopped
    await asyncio.sleep(0.02)
    assert bench.engine.gate is not None
    bench.engine.gate.set()
    (answer,) = await ends(request)
    assert isinstance(answer, ImageAnswer)
    await bench.scheduler.close()
