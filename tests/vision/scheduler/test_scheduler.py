"""Tests of the scheduler on a fake clock and engine: every request ends exactly once."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from ladderstitch.errors import (
    BudgetInfeasible,
    Draining,
    EngineRestarting,
    ExpiredInCompute,
    ExpiredInQueue,
    InternalError,
    InvalidArgument,
    Overloaded,
    QualityUnavailable,
    RequestError,
    VariantNotFound,
)
from ladderstitch.scheduling.requests import ImageAnswer, Pixels
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.model_metrics import VisionMetrics
from ladderstitch.vision.engine.base import EngineDied, EngineResult
from ladderstitch.vision.scheduler.policies.base import Decision
from ladderstitch.vision.scheduler.scheduler import MAX_COLLECTING_S, Scheduler
from tests.support.image_scheduling import (
    QUALITY,
    FakeClock,
    ScriptedEngine,
    make_profile,
    make_request,
)


class Bench:
    """A scheduler with its engine and clock; the first pixel of a request is its mark."""

    def __init__(self, clock: FakeClock, **settings: object) -> None:
        self.clock = clock
        self.engine = ScriptedEngine(clock)
        self.metrics = Metrics()
        self.scheduler = Scheduler(
            self.engine,
            QUALITY,
            make_profile(),
            SchedulerSettings.model_validate({"policy": "max_quality"} | settings),
            VisionMetrics(self.metrics, "m", QUALITY),
            clock,
        )

    def submit(
        self, mark: int, budget_s: float = math.inf, *, hard: bool = False, **fields: object
    ) -> asyncio.Task[ImageAnswer]:
        now = self.clock.now
        request = make_request(
            now + budget_s, arrival=now, hard=now + budget_s if hard else math.inf, **fields
        )
        request.images[:, 0, 0, 0] = mark
        return asyncio.create_task(self.scheduler.submit(request))

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"ladderstitch_{name}", labels) or 0.0


async def settle() -> None:
    """Let the event loop run until tasks have started or ended."""
    for _ in range(10):
        await asyncio.sleep(0)


async def submit_in_turns(bench: Bench, count: int, seconds_per_turn: float) -> list[int]:
    """Submit requests one per turn of the event loop, like gRPC; return their batch sizes."""
    tasks = []
    for mark in range(count):
        tasks.append(bench.submit(mark))
        await asyncio.sleep(0)
        bench.clock.now += seconds_per_turn
    return [answer.batch_size for answer in await asyncio.gather(*tasks)]


async def test_batch_waits_for_requests_that_have_arrived(clock: FakeClock) -> None:
    bench = Bench(clock)
    first = await asyncio.gather(*(bench.submit(i) for i in range(4)))
    assert [answer.batch_size for answer in first] == [4] * 4
    assert await submit_in_turns(bench, 4, seconds_per_turn=0.0) == [4] * 4


async def test_single_caller_does_not_wait_for_others(clock: FakeClock) -> None:
    bench = Bench(clock)
    assert (await bench.submit(0)).batch_size == 1
    assert (await submit_in_turns(bench, 4, seconds_per_turn=0.0))[0] == 1


async def test_batch_waits_for_arrivals_only_briefly(clock: FakeClock) -> None:
    bench = Bench(clock)
    await asyncio.gather(*(bench.submit(i) for i in range(8)))
    sizes = await submit_in_turns(bench, 8, seconds_per_turn=MAX_COLLECTING_S)
    assert sizes[0] <= 3


async def test_submit_returns_the_logits_of_its_own_images(clock: FakeClock) -> None:
    bench = Bench(clock)
    bench.engine.gate = asyncio.Event()
    tasks = [bench.submit(0)]
    await settle()  # it runs alone on the engine
    tasks += [bench.submit(i, num_images=i) for i in (1, 2, 3)]
    await settle()
    bench.engine.gate.set()
    answers = await asyncio.gather(*tasks)
    assert [answer.logits[:, 1].tolist() for answer in answers] == [[0], [1], [2, 2], [3, 3, 3]]
    assert [answer.batch_size for answer in answers[1:]] == [6, 6, 6]
    assert {answer.quality for answer in answers} == {0.9}
    await bench.scheduler.close()


@pytest.mark.parametrize(
    ("fields", "error", "metadata"),
    [
        ({"num_images": 9}, InvalidArgument, {"field": "images"}),
        ({"variant": 77}, VariantNotFound, {"variant_id": "77"}),
        ({"min_quality": 0.95}, QualityUnavailable, {"max_quality": "0.900000"}),
        ({"variant": 0, "min_quality": 0.8}, QualityUnavailable, {"max_quality": "0.700000"}),
        ({"budget_s": 0.0004, "hard": True}, BudgetInfeasible, {"min_feasible_us": "1700"}),
        (
            {"budget_s": 0.005, "hard": True, "min_quality": 0.9},
            BudgetInfeasible,
            {"min_feasible_us": "10100"},
        ),
    ],
)
async def test_submit_infeasible_request_is_rejected_at_once(
    clock: FakeClock,
    fields: dict[str, object],
    error: type[RequestError],
    metadata: dict[str, str],
) -> None:
    bench = Bench(clock)
    with pytest.raises(error) as rejected:
        await bench.submit(0, **fields)  # type: ignore[arg-type] # passed through
    assert rejected.value.metadata == metadata
    assert bench.engine.calls == []
    assert bench.count("requests_total", model="m", variant="none", code=error.code) == 1
    await bench.scheduler.close()


async def test_submit_infeasible_soft_budget_is_answered_late(clock: FakeClock) -> None:
    bench = Bench(clock)
    answer = await bench.submit(0, 0.0001)
    assert answer.variant == 0
    assert bench.count("slo_requests_total", model="m", met="false") == 1
    await bench.scheduler.close()


async def test_submit_under_load_rejects_with_a_time_to_retry(clock: FakeClock) -> None:
    bench = Bench(clock)
    bench.engine.gate = asyncio.Event()
    running = [bench.submit(i) for i in range(30)]
    await settle()
    with pytest.raises(Overloaded) as rejected:
        await bench.submit(99, 0.004, hard=True)
    assert rejected.value.retry_after_s > 0
    relaxed = bench.submit(98, 5.0, hard=True)
    await settle()
    bench.engine.gate.set()
    assert len(await asyncio.gather(*running, relaxed)) == 31
    await bench.scheduler.close()


async def test_submit_to_a_full_queue_is_rejected(clock: FakeClock) -> None:
    bench = Bench(clock, queue_limit_requests=3)
    bench.engine.gate = asyncio.Event()
    first = bench.submit(0)
    await settle()
    waiting = [bench.submit(i) for i in range(3)]
    await settle()
    with pytest.raises(Overloaded, match="queue is full"):
        await bench.submit(9)
    bench.engine.gate.set()
    await asyncio.gather(first, *waiting)
    await bench.scheduler.close()


async def test_hard_deadlines_expire_in_queue_and_in_compute(clock: FakeClock) -> None:
    bench = Bench(clock)
    bench.engine.gate = asyncio.Event()
    first = bench.submit(0, 0.012, hard=True)
    await settle()
    queued = bench.submit(1, 0.03, hard=True)
    await settle()
    clock.now += 0.05
    bench.engine.gate.set()
    with pytest.raises(ExpiredInCompute):
        await first
    with pytest.raises(ExpiredInQueue):
        await queued
    assert len(bench.engine.calls) == 1
    await bench.scheduler.close()


async def test_cancelled_caller_leaves_the_queue(clock: FakeClock) -> None:
    bench = Bench(clock)
    bench.engine.gate = asyncio.Event()
    running, queued = bench.submit(0), bench.submit(1)
    await settle()
    queued2 = bench.submit(2)
    await settle()
    for task in (running, queued2):
        task.cancel()
    await settle()
    assert len(bench.scheduler.planner.queue) <= 1
    bench.engine.gate.set()
    assert (await queued).logits[0, 1] == 1
    await bench.scheduler.drain()
    assert sum(batch_size for _, batch_size in bench.engine.calls) <= 2
    assert bench.count("requests_total", model="m", variant="none", code="CANCELLED") == 2
    await bench.scheduler.close()


async def test_engine_death_is_retried_once(clock: FakeClock) -> None:
    bench = Bench(clock)
    deaths = iter([True, False])

    def die_once(images: Sequence[Pixels], variant: int) -> None:
        if next(deaths, False):
            raise EngineDied("killed")

    bench.engine.script = die_once
    assert (await bench.submit(7)).logits[0, 1] == 7
    assert len(bench.engine.calls) == 2

    def die_always(images: Sequence[Pixels], variant: int) -> None:
        raise EngineDied("killed")

    bench.engine.script = die_always
    with pytest.raises(EngineRestarting):
        await bench.submit(8)
    assert bench.scheduler.running
    assert bench.count("engine_restarts_total", model="m") == 3
    await bench.scheduler.close()


async def test_hard_deadlines_expire_while_the_engine_hangs(clock: FakeClock) -> None:
    bench = Bench(clock)
    bench.engine.gate = asyncio.Event()
    running = bench.submit(0, 0.02, hard=True)
    await settle()
    queued, relaxed = bench.submit(1, 0.1, hard=True), bench.submit(2)
    await settle()
    clock.now += 1.0
    with pytest.raises(ExpiredInCompute):
        await running
    with pytest.raises(ExpiredInQueue):
        await queued
    bench.engine.gate.set()
    assert (await relaxed).logits[0, 1] == 2
    await bench.scheduler.close()


async def test_check_budget_after_a_fast_batch_has_no_wait(clock: FakeClock) -> None:
    bench = Bench(clock)
    bench.engine.slowdown = 0.01
    await bench.submit(0)
    assert bench.scheduler.check_budget(None).wait_s == 0.0
    await bench.scheduler.close()


async def test_slow_period_does_not_reject_for_ever(clock: FakeClock) -> None:
    bench = Bench(clock)
    bench.engine.slowdown = 10.0
    for mark in range(20):
        await bench.submit(mark)
    bench.engine.slowdown = 1.0
    with pytest.raises(BudgetInfeasible):
        await bench.submit(0, 0.004, hard=True)
    answers = 0
    for mark in range(600):
        try:
            answers += (await bench.submit(mark, 0.004, hard=True)).logits[0, 1] == mark
        except BudgetInfeasible:
            assert answers == 0, "rejected again after it was admitted"
    assert answers > 200
    await bench.scheduler.close()


async def test_policy_error_fails_only_the_first_request(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(clock)
    good, calls = bench.scheduler.planner.policy, iter(range(10))

    def broken(*state: Any) -> Decision:
        if next(calls) == 0:
            raise ZeroDivisionError
        return good(*state)

    bench.scheduler.planner.policy = broken
    first, second = bench.submit(0, 1.0), bench.submit(1, 2.0)
    with pytest.raises(InternalError):
        await first
    assert (await second).logits[0, 1] == 1
    assert "ZeroDivisionError" in caplog.text
    await bench.scheduler.close()


async def test_logits_of_the_wrong_length_fail_the_request(clock: FakeClock) -> None:
    bench = Bench(clock)
    bench.engine.result = lambda result: replace(result, logits=result.logits[1:])
    with pytest.raises(InternalError):
        await bench.submit(0)
    assert bench.scheduler.running
    await bench.scheduler.close()


async def test_engine_death_then_failed_batch_answers_all(
    clock: FakeClock,
) -> None:
    bench = Bench(clock)
    bench.engine.gate = asyncio.Event()
    troubles = iter([None, EngineDied("killed"), InternalError("bad batch")])

    def trouble(images: Sequence[Pixels], variant: int) -> None:
        error = next(troubles, None)
        if error is not None:
            raise error

    bench.engine.script = trouble
    tasks = [bench.submit(0)]
    await settle()
    tasks += [bench.submit(i) for i in (1, 2, 3)]
    await settle()
    bench.engine.gate.set()
    answers = await asyncio.gather(*tasks)
    assert [answer.logits[0, 1] for answer in answers] == [0, 1, 2, 3]
    assert bench.engine.calls == [(2, 1), (2, 3), (2, 3), (0, 1), (0, 1), (0, 1)]
    await bench.scheduler.close()


async def test_fixed_variant_determines_the_feasible_budget(clock: FakeClock) -> None:
    bench = Bench(clock, policy="fixed", fixed_variant=2)
    with pytest.raises(BudgetInfeasible) as rejected:
        await bench.submit(0, 0.004, hard=True)
    assert rejected.value.metadata == {"min_feasible_us": "10100"}
    assert bench.scheduler.check_budget(0.004).idle_variant is None
    assert bench.scheduler.check_budget(0.02).idle_variant == 2
    await bench.scheduler.close()


async def test_cancel_just_before_dispatch_is_not_computed(clock: FakeClock) -> None:
    bench = Bench(clock)
    bench.engine.gate = asyncio.Event()
    running = bench.submit(0)
    await settle()
    queued = bench.submit(1)
    await settle()
    bench.engine.gate.set()  # the dispatch loop runs before the cancelled caller
    queued.cancel()
    await running
    await bench.scheduler.drain()
    assert bench.engine.calls == [(2, 1)]
    await bench.scheduler.close()


async def test_cancel_in_the_turn_of_the_answer_counts_once(
    clock: FakeClock,
) -> None:
    bench = Bench(clock)
    task = bench.submit(0)

    def leave(result: EngineResult) -> EngineResult:
        asyncio.get_running_loop().call_soon(task.cancel)  # after the answer was set
        return result

    bench.engine.result = leave
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.count("requests_total", model="m", variant="2", code="OK") == 1
    assert bench.count("requests_total", model="m", variant="none", code="CANCELLED") == 0
    await bench.scheduler.close()


async def test_bad_request_fails_alone(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(clock)
    bench.engine.gate = asyncio.Event()

    def poisoned(images: Sequence[Pixels], variant: int) -> None:
        if any(request[0, 0, 0, 0] == 13 for request in images):
            raise InternalError("bad batch")

    bench.engine.script = poisoned
    tasks = [bench.submit(0)]
    await settle()
    tasks += [bench.submit(i) for i in (11, 12, 13, 14)]
    await settle()
    bench.engine.gate.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(answers[3], InternalError)
    assert answers[3].metadata["error_id"] in caplog.text
    others = [a.logits[0, 1] for i, a in enumerate(answers) if isinstance(a, ImageAnswer)]
    assert others == [0, 11, 12, 14]
    await bench.scheduler.close()


async def test_configure_between_batches_loses_no_request(clock: FakeClock) -> None:
    bench = Bench(clock)
    bench.engine.gate = asyncio.Event()
    tasks = [bench.submit(0)]
    await settle()
    tasks += [bench.submit(i) for i in range(1, 20)]
    await settle()
    bench.scheduler.configure(SchedulerSettings(policy="fixed", fixed_variant=0))
    bench.engine.gate.set()
    answers = await asyncio.gather(*tasks)
    assert Counter(answer.variant for answer in answers) == {2: 1, 0: 19}
    bench.scheduler.configure(SchedulerSettings(pinned_variant=3))
    assert (await bench.submit(0)).variant == 3
    bench.scheduler.configure(SchedulerSettings(min_quality=0.8))
    assert (await bench.submit(0, 0.0001)).variant == 1
    await bench.scheduler.close()


@pytest.mark.parametrize(
    "fields",
    [{"pinned_variant": 9}, {"policy": "fixed", "fixed_variant": 9}, {"min_quality": 0.99}],
)
async def test_configure_unsuitable_settings_is_rejected(
    clock: FakeClock, fields: dict[str, object]
) -> None:
    bench = Bench(clock)
    before = bench.scheduler.planner.settings
    with pytest.raises(InvalidArgument):
        bench.scheduler.configure(SchedulerSettings.model_validate(fields))
    assert bench.scheduler.planner.settings is before
    await bench.scheduler.close()


async def test_configure_higher_floor_answers_waiting_requests(
    clock: FakeClock,
) -> None:
    bench = Bench(clock)
    bench.engine.gate = asyncio.Event()
    tasks = [bench.submit(0), bench.submit(1, variant=0)]
    await settle()
    bench.scheduler.configure(SchedulerSettings(policy="max_quality", min_quality=0.9))
    bench.engine.gate.set()
    assert len(await asyncio.gather(*tasks)) == 2
    await bench.scheduler.close()


async def test_drain_answers_accepted_and_rejects_new_requests(clock: FakeClock) -> None:
    bench = Bench(clock)
    bench.engine.gate = asyncio.Event()
    tasks = [bench.submit(i) for i in range(12)]
    await settle()
    drained = asyncio.create_task(bench.scheduler.drain())
    await settle()
    with pytest.raises(Draining):
        await bench.submit(99)
    assert not drained.done()
    bench.engine.gate.set()
    await drained
    assert all(task.done() and not task.exception() for task in tasks)
    await bench.scheduler.close()


async def test_close_fails_the_remaining_requests(clock: FakeClock) -> None:
    bench = Bench(clock)
    bench.engine.gate = asyncio.Event()
    tasks = [bench.submit(i) for i in range(3)]
    await settle()
    await bench.scheduler.close()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ends} == {Draining}


async def test_check_budget_includes_the_load(clock: FakeClock) -> None:
    bench = Bench(clock)
    idle = bench.scheduler.check_budget(0.0045, 0.0)
    assert (idle.now_variant, idle.idle_variant, idle.wait_s) == (1, 1, 0.0)
    assert bench.scheduler.check_budget(0.0045, 0.85).now_variant is None
    assert bench.scheduler.check_budget(None, 0.85).smallest_idle_s == pytest.approx(0.0101)
    with pytest.raises(QualityUnavailable):
        bench.scheduler.check_budget(1.0, 0.95)
    bench.engine.gate = asyncio.Event()
    tasks = [bench.submit(i) for i in range(17)]
    await settle()
    busy = bench.scheduler.check_budget(0.0045, 0.0)
    assert busy.now_variant is None
    assert busy.idle_variant == 1
    assert busy.smallest_now_s > busy.smallest_idle_s
    bench.engine.gate.set()
    await asyncio.gather(*tasks)
    await bench.scheduler.close()


@pytest.mark.parametrize("name", ["max_quality", "max_batch", "slackfit", "adaptive"])
@pytest.mark.parametrize("seed", range(4))
async def test_random_events_end_every_request_once(clock: FakeClock, name: str, seed: int) -> None:
    """Random arrivals, deadlines, cancellations, deaths, failures and reconfigurations."""
    rng = random.Random(seed)
    bench = Bench(clock, policy=name)

    def trouble(images: Sequence[Pixels], variant: int) -> None:
        dice = rng.random()
        if dice < 0.05:
            raise EngineDied("killed")
        if dice < 0.08:
            raise InternalError("bad luck")

    bench.engine.script = trouble
    tasks = []
    for mark in range(300):
        budget = rng.choice([0.0005, 0.004, 0.02, 0.2, math.inf])
        tasks.append(
            bench.submit(mark, budget, hard=rng.random() < 0.4, num_images=rng.randint(1, 3))
        )
        if rng.random() < 0.1:
            rng.choice(tasks).cancel()
        if rng.random() < 0.05:
            pinned = rng.choice([None, 1, 4])
            bench.scheduler.configure(SchedulerSettings(policy=name, pinned_variant=pinned))  # type: ignore[arg-type] # parametrised
        if rng.random() < 0.4:
            clock.now += rng.random() * 0.003
            await settle()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    await bench.scheduler.drain()
    for mark, end in enumerate(ends):
        if isinstance(end, ImageAnswer):
            assert set(end.logits[:, 1].tolist()) == {mark}
        else:
            assert isinstance(end, RequestError | asyncio.CancelledError)
    assert sum(isinstance(end, ImageAnswer) for end in ends) > 100
    assert len(bench.scheduler.planner.queue) == 0
    ended = sum(
        sample.value
        for metric in bench.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "ladderstitch_requests_total"
    )
    never_ran = sum(isinstance(end, asyncio.CancelledError) for end in ends) - bench.count(
        "requests_total", model="m", variant="none", code="CANCELLED"
    )
    assert never_ran >= 0  # tasks cancelled before their first step, so never submitted
    assert ended == len(ends) - never_ran
    await bench.scheduler.close()
