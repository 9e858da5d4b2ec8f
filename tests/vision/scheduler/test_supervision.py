"""A dispatch loop that fails, for any reason, is started again, and no request waits for ever."""

from __future__ import annotations

import asyncio
import errno
import io
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ladderstitch.errors import EngineRestarting, InternalError, NonFiniteOutput, RequestError
from ladderstitch.scheduling.requests import ImageAnswer
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.model_metrics import VisionMetrics
from ladderstitch.vision.engine.base import EngineResult
from ladderstitch.vision.scheduler.scheduler import MAX_FAILURES, Scheduler
from tests.support.image_scheduling import QUALITY, FakeClock, ScriptedEngine, make_profile
from tests.vision.scheduler.test_scheduler import Bench, settle

LIMIT_S = 300.0
"""Guards against hanging only."""


async def ends(*tasks: asyncio.Task[ImageAnswer]) -> list[ImageAnswer | BaseException]:
    """Return how the requests ended; fails if one hangs."""
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LIMIT_S)


class FullDisk(io.StringIO):
    """A file whose writes fail after the first ones; `verb` is what fails."""

    def __init__(self, writes: int, verb: str = "write") -> None:
        super().__init__()
        self.writes, self.verb = writes, verb

    def write(self, text: str) -> int:
        self.writes -= 1
        if self.writes < 0 and self.verb == "write":
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)

    def flush(self) -> None:
        if self.writes < 0 and self.verb == "flush":
            raise OSError(errno.EIO, "Input/output error")
        super().flush()


@pytest.mark.parametrize("writes", range(0, 12, 1))
@pytest.mark.parametrize("verb", ["write", "flush"])
async def test_record_that_fails_harms_no_request(
    clock: FakeClock, writes: int, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    record = FullDisk(writes, verb)
    scheduler = Scheduler(
        ScriptedEngine(clock),
        QUALITY,
        make_profile(),
        SchedulerSettings(),
        VisionMetrics(metrics, "m", QUALITY),
        clock,
        record=record,
    )
    bench = Bench(clock)
    bench.scheduler = scheduler
    for _ in range(3):
        answers = await ends(*(bench.submit(n, 0.5) for n in range(3)))
        assert all(isinstance(answer, ImageAnswer) for answer in answers)
    assert scheduler.running
    failures = metrics.registry.get_sample_value(
        "ladderstitch_telemetry_failures_total", {"model": "m"}
    )
    assert failures == 1
    assert caplog.text.count("record ended") == 1
    await scheduler.close()


async def test_closed_record_harms_no_request(clock: FakeClock) -> None:
    record = io.StringIO()
    metrics = VisionMetrics(Metrics(), "m", QUALITY)
    bench = Bench(clock)
    bench.scheduler = Scheduler(
        bench.engine, QUALITY, make_profile(), SchedulerSettings(), metrics, clock, record=record
    )
    record.close()
    (answer,) = await ends(bench.submit(1))
    assert isinstance(answer, ImageAnswer)
    await bench.scheduler.close()


OBSERVERS = ("observe_dispatch", "observe_batch", "observe_completion", "set_queue_length")


@pytest.mark.parametrize("name", OBSERVERS)
async def test_observer_that_fails_harms_no_request(
    clock: FakeClock, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(clock)

    def fail(*args: object, **fields: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(bench.scheduler.metrics, name, fail)
    for _ in range(2):
        answers = await ends(*(bench.submit(n) for n in range(3)))
        assert all(isinstance(answer, ImageAnswer) for answer in answers)
    await settle()
    assert bench.count("telemetry_failures_total", model="m") > 0
    assert bench.count("dispatch_restarts_total", model="m") == 0
    await bench.scheduler.close()


async def test_observer_of_rejections_that_fails_ends_all_expired(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(clock)
    bench.engine.gate = asyncio.Event()
    first = bench.submit(0)
    await settle()
    queued = [bench.submit(n, 0.05, hard=True) for n in range(3)]
    await settle()

    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(bench.scheduler.metrics, "observe_rejection", fail)
    clock.now += 1.0
    assert all(isinstance(end, RequestError) for end in await ends(*queued))
    bench.engine.gate.set()
    assert isinstance((await ends(first))[0], ImageAnswer)
    await bench.scheduler.close()


def fail_times(times: int, error: BaseException, inner: Callable[..., object]) -> Callable:
    """Return a function that raises an error a number of times, and then is `inner`."""
    left = iter(range(times))

    def call(*args: object, **fields: object) -> object:
        if next(left, None) is not None:
            raise error
        return inner(*args, **fields)

    return call


PLACES: dict[str, Callable[[Scheduler], tuple[object, str]]] = {
    "before a batch": lambda s: (s.planner, "remove_expired"),
    "decision": lambda s: (s, "_decide"),
    "batch": lambda s: (s.batch_runner, "run"),
    "collecting": lambda s: (s, "_collect"),
    "engine idle": lambda s: (s.planner, "on_engine_idle"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "error", [OSError(28, "full"), MemoryError(), RuntimeError("x"), asyncio.CancelledError()]
)
async def test_dispatch_that_fails_once_goes_on(
    clock: FakeClock,
    place: str,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(clock)
    target, name = PLACES[place](bench.scheduler)
    monkeypatch.setattr(target, name, fail_times(1, error, getattr(target, name)))
    for end in await ends(*(bench.submit(n) for n in range(3))):
        assert isinstance(end, ImageAnswer | InternalError)
    (later,) = await ends(bench.submit(7))
    assert isinstance(later, ImageAnswer)
    assert later.logits[0, 1] == 7
    assert bench.scheduler.running
    assert bench.count("dispatch_restarts_total", model="m") == 1
    assert "the dispatch loop failed" in caplog.text
    await asyncio.wait_for(bench.scheduler.drain(), LIMIT_S)
    await bench.scheduler.close()


async def test_dispatch_that_fails_keeps_waiting_requests(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(clock)
    runner = bench.scheduler.batch_runner
    bench.engine.gate = asyncio.Event()
    first = bench.submit(0)
    await settle()
    waiting = [bench.submit(n) for n in (1, 2)]
    await settle()
    on_idle = bench.scheduler.planner.on_engine_idle
    failing = fail_times(1, OSError("full"), on_idle)
    monkeypatch.setattr(bench.scheduler.planner, "on_engine_idle", failing)
    bench.engine.gate.set()
    answers = await ends(first, *waiting)
    assert [a.logits[0, 1] for a in answers if isinstance(a, ImageAnswer)] == [0, 1, 2]
    assert runner.running == []
    await bench.scheduler.close()


async def test_dispatch_that_always_fails_stops_and_rejects(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(clock)
    error = OSError(errno.EMFILE, "Too many open files")
    monkeypatch.setattr(bench.scheduler, "_collect", fail_times(10**6, error, lambda: None))
    ended: list[ImageAnswer | BaseException] = []
    while bench.scheduler.running:
        ended += await ends(*(bench.submit(n) for n in range(2)))
        await asyncio.sleep(0)
    assert all(isinstance(end, RequestError) for end in ended)
    assert bench.count("dispatch_restarts_total", model="m") == MAX_FAILURES
    (rejected,) = await ends(bench.submit(0))
    assert isinstance(rejected, EngineRestarting)
    assert [r.levelno for r in caplog.records if "has to be replaced" in r.message] == [
        logging.CRITICAL
    ]
    await asyncio.wait_for(bench.scheduler.drain(), LIMIT_S)
    await bench.scheduler.close()


async def test_cancelled_dispatch_task_fails_all_and_rejects(clock: FakeClock) -> None:
    bench = Bench(clock)
    bench.engine.gate = asyncio.Event()
    tasks = [bench.submit(0)]
    await settle()
    tasks += [bench.submit(n, 1.0, hard=True) for n in (1, 2)]
    await settle()
    for task in asyncio.all_tasks():
        if task.get_name() == "dispatch":
            task.cancel()
    assert all(isinstance(end, EngineRestarting) for end in await ends(*tasks))
    assert not bench.scheduler.running
    assert isinstance((await ends(bench.submit(3)))[0], EngineRestarting)
    await bench.scheduler.close()


def poison(marks: set[int], value: float) -> Callable[[EngineResult], EngineResult]:
    """Return a change of results by which images with these marks have a logit of `value`."""

    def change(result: EngineResult) -> EngineResult:
        logits = result.logits.copy()
        logits[np.isin(logits[:, 1], list(marks)), 0] = value
        return replace(result, logits=logits)

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_non_finite_logits_fail_their_request_only(clock: FakeClock, value: float) -> None:
    bench = Bench(clock)
    bench.engine.gate = asyncio.Event()
    tasks = [bench.submit(0)]
    await settle()
    tasks += [bench.submit(n, num_images=n % 3 + 1) for n in range(1, 6)]
    await settle()
    bench.engine.result = poison({2, 4}, value)
    bench.engine.gate.set()
    answers = await ends(*tasks)
    assert [n for n, a in enumerate(answers) if isinstance(a, NonFiniteOutput)] == [2, 4]
    for mark, answer in enumerate(answers):
        if isinstance(answer, ImageAnswer):
            assert set(answer.logits[:, 1].tolist()) == {mark}
            assert np.isfinite(answer.logits).all()
    assert bench.count("non_finite_outputs_total", model="m") == 2
    labels = {"model": "m", "variant": "none", "code": "OUT_OF_RANGE"}
    assert bench.count("requests_total", **labels) == 2
    assert "got NaN or infinity for 3 of 3 images" in str(answers[2])
    await bench.scheduler.close()


async def test_one_non_finite_image_fails_a_request_of_several(clock: FakeClock) -> None:
    bench = Bench(clock)

    def change(result: EngineResult) -> EngineResult:
        logits = result.logits.copy()
        logits[1] = np.nan
        return replace(result, logits=logits)

    bench.engine.result = change
    (end,) = await ends(bench.submit(1, num_images=3))
    assert isinstance(end, NonFiniteOutput)
    assert "for 1 of 3 images (1)" in str(end)
    await bench.scheduler.close()
