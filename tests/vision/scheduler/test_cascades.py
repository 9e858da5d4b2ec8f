"""Cascades in the scheduler: who goes on, what is answered, and which deadlines are kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from ladderstitch.errors import InvalidArgument, NonFiniteOutput
from ladderstitch.scheduling.cascades import THRESHOLDS, Cascade, CascadeSet
from ladderstitch.scheduling.requests import ImageAnswer, Pixels, Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.model_metrics import VisionMetrics
from ladderstitch.vision.engine.base import EngineResult
from ladderstitch.vision.scheduler.planner import Planner
from ladderstitch.vision.scheduler.policies.base import Decision
from ladderstitch.vision.scheduler.scheduler import Scheduler
from ladderstitch_loadtest.simulation.replay import replay
from tests.support.image_scheduling import (
    QUALITY,
    FakeClock,
    ScriptedEngine,
    make_profile,
    make_request,
    plain_view,
)

MARGIN = 4.0
"""Difference of the two logits of a sure row: the confidence is 1 / (1 + exp(-4)) = 0.982."""

NOT_FINITE = 9.0
"""Value of an image whose logits are NaN."""


def make_cascade(first: int, last: int, shared: float = 0.0, go_on: float = 0.3) -> Cascade:
    """Return a cascade of the synthetic family in which a share goes on at any threshold."""
    count = len(THRESHOLDS)
    return Cascade(
        first=first,
        last=last,
        shared=shared,
        go_on=(0.0, *[go_on] * (count - 2), 1.0),
        sure_quality=(0.95,) * count,
        unsure_quality=(0.3,) * count,
        last_quality=(0.9,) * count,
    )


CASCADES = CascadeSet(dict.fromkeys(QUALITY, 1.0), (make_cascade(0, 2), make_cascade(3, 2)))


class HalfSureEngine(ScriptedEngine):
    """An engine whose variant 2 is sure of all images, and the others of positive ones only."""

    async def forward(self, images: Sequence[Pixels], stitch: int) -> EngineResult:
        """Return logits [B, 2] that say which image and which variant they come from."""
        result = await super().forward(images, stitch)
        first = np.concatenate([request[:, 0, 0, 0] for request in images])
        sure = (first > 0) | (stitch == 2)
        logits = np.stack([np.where(sure, MARGIN, 0.1), np.zeros(len(first))], axis=1)
        logits[first == NOT_FINITE] = np.nan
        return EngineResult(logits.astype(np.float32), result.compute_s)


def image(*values: float, confidence: float = 0.9, soft: float = float("inf")) -> Request:
    """Return a request with one image [1, 2, 2] of each value."""
    request = make_request(soft, arrival=100.0, num_images=len(values), min_confidence=confidence)
    request.images[:] = np.array(values, np.float32)[:, None, None, None]
    return request


@pytest.fixture
def engine(clock: FakeClock) -> HalfSureEngine:
    """An engine on the fake clock."""
    return HalfSureEngine(clock)


@pytest.fixture
async def scheduler(
    engine: HalfSureEngine, clock: FakeClock, tmp_path: Path
) -> AsyncIterator[Scheduler]:
    """A scheduler of the synthetic family with cascades, which records its decisions."""
    metrics = VisionMetrics(Metrics(), "m", QUALITY)
    with (tmp_path / "record.jsonl").open("w") as record:
        made = Scheduler(
            engine,
            QUALITY,
            make_profile(),
            SchedulerSettings(),
            metrics,
            clock,
            record=record,
            cascades=CASCADES,
        )
        yield made
        await made.close()


async def test_sure_image_stops_after_the_first_variant(
    scheduler: Scheduler, engine: HalfSureEngine
) -> None:
    answer = await scheduler.submit(image(1.0))
    assert engine.calls == [(0, 1)]
    assert answer.variant == 0
    assert answer.certainty is not None
    assert answer.certainty.stages == (0,)
    assert answer.certainty.end == "sure"
    assert answer.certainty.confidence[0] == pytest.approx(1 / (1 + np.exp(-MARGIN)))


async def test_unsure_image_goes_on_to_the_last_variant(
    scheduler: Scheduler, engine: HalfSureEngine
) -> None:
    answer = await scheduler.submit(image(-1.0))
    assert engine.calls == [(0, 1), (2, 1)]
    assert answer.variant == 2
    assert answer.quality == QUALITY[2]
    assert answer.certainty is not None
    assert answer.certainty.stages == (0, 2)
    view = plain_view()
    assert answer.compute_s == pytest.approx(view.expected(0, 1) + view.expected(2, 1))


async def test_only_unsure_rows_of_a_request_go_on(
    scheduler: Scheduler, engine: HalfSureEngine
) -> None:
    answer = await scheduler.submit(image(1.0, -1.0, 1.0))
    assert engine.calls == [(0, 3), (2, 1)]
    assert answer.certainty is not None
    assert answer.certainty.variants == (0, 2, 0)
    assert answer.logits[:, 0].tolist() == pytest.approx([MARGIN] * 3)
    assert answer.quality == pytest.approx((2 * QUALITY[0] + QUALITY[2]) / 3)


async def test_sure_requests_are_answered_before_the_last_variant_ends(
    scheduler: Scheduler, engine: HalfSureEngine
) -> None:
    plain = asyncio.create_task(scheduler.submit(make_request(arrival=100.0)))
    await asyncio.sleep(0)  # both of the others are in the next batch
    sure = asyncio.create_task(scheduler.submit(image(1.0)))
    unsure = asyncio.create_task(scheduler.submit(image(-1.0)))
    order: list[str] = []
    sure.add_done_callback(lambda _: order.append("sure"))
    unsure.add_done_callback(lambda _: order.append("unsure"))
    await asyncio.gather(plain, sure, unsure)
    assert order == ["sure", "unsure"]


async def test_answer_stops_early_if_time_runs_out(
    scheduler: Scheduler, engine: HalfSureEngine, clock: FakeClock
) -> None:
    first_s = plain_view().expected(0, 1)

    def stall(images: Sequence[Pixels], variant: int) -> None:
        clock.now += 0.02 if variant == 0 else 0.0

    engine.script = stall  # the first variant takes 20 ms more than planned
    answer = await scheduler.submit(image(-1.0, soft=100.025 + first_s))
    assert engine.calls == [(0, 1)]
    assert answer.variant == 0
    assert answer.certainty is not None
    assert answer.certainty.end == "time"
    assert answer.certainty.confidence[0] < 0.9


async def test_short_budget_gets_no_cascade(scheduler: Scheduler, engine: HalfSureEngine) -> None:
    answer = await scheduler.submit(image(-1.0, soft=100.0 + 0.0105))
    assert engine.calls == [(2, 1)]  # 8 ms fit, 1 ms and 8 ms with their tails do not
    assert answer.certainty is not None
    assert answer.certainty.stages == (2,)


async def test_request_without_minimum_gets_no_confidence(
    scheduler: Scheduler, engine: HalfSureEngine
) -> None:
    answer = await scheduler.submit(make_request(arrival=100.0))
    assert engine.calls == [(2, 1)]
    assert answer.certainty is None


async def test_quality_floor_holds_for_the_first_variant(
    scheduler: Scheduler, engine: HalfSureEngine
) -> None:
    request = make_request(arrival=100.0, min_confidence=0.9, min_quality=0.72)
    await scheduler.submit(request)
    assert engine.calls[0] == (3, 1)  # variant 0 has a quality of 0.70


async def test_named_variant_runs_alone(scheduler: Scheduler, engine: HalfSureEngine) -> None:
    answer = await scheduler.submit(make_request(arrival=100.0, min_confidence=0.9, variant=1))
    assert engine.calls == [(1, 1)]
    assert answer.certainty is not None


async def test_non_finite_rows_fail_alone(scheduler: Scheduler, engine: HalfSureEngine) -> None:
    tasks = [asyncio.create_task(scheduler.submit(image(value))) for value in (1.0, NOT_FINITE)]
    good, bad = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(good, ImageAnswer)
    assert isinstance(bad, NonFiniteOutput)


async def test_model_without_temperatures_rejects_a_minimum(
    engine: HalfSureEngine, clock: FakeClock
) -> None:
    metrics = VisionMetrics(Metrics(), "m", QUALITY)
    made = Scheduler(engine, QUALITY, make_profile(), SchedulerSettings(), metrics, clock)
    with pytest.raises(InvalidArgument, match="min_confidence: expected none"):
        await made.submit(image(1.0))
    await made.close()


async def test_replay_repeats_recorded_cascades(
    scheduler: Scheduler, engine: HalfSureEngine, tmp_path: Path
) -> None:
    for value in (1.0, -1.0, 1.0):
        await scheduler.submit(image(value))
    await asyncio.sleep(0)
    await scheduler.close()
    path = tmp_path / "record.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert [event[4] for event in events if event[0] == "decide"] == [0, 0, 0]
    assert replay(path).exact


def decide(*requests: Request, cascades: CascadeSet = CASCADES) -> Decision:
    """Return the decision of a planner whose queue holds these requests."""
    planner = Planner(QUALITY, make_profile(), SchedulerSettings(), cascades=cascades)
    for request in requests:
        planner.add(request)
    choice = planner.decide(100.0)
    assert isinstance(choice, Decision)
    return choice


def test_the_cascade_of_least_expected_time_is_chosen() -> None:
    slow, fast = make_cascade(3, 2, go_on=0.5), make_cascade(0, 2, go_on=0.3)
    chosen = decide(image(1.0), cascades=CascadeSet(dict.fromkeys(QUALITY, 1.0), (slow, fast)))
    assert chosen.cascade == fast
    # 1 ms + 0.9 * 8 ms exceeds 8 ms
    useless = make_cascade(0, 2, go_on=0.9)
    alone = decide(image(1.0), cascades=CascadeSet(dict.fromkeys(QUALITY, 1.0), (useless,)))
    assert (alone.cascade, alone.variant) == (None, 2)


def test_shared_activations_make_a_cascade_cheaper() -> None:
    restart, shared = make_cascade(0, 2, go_on=0.4), make_cascade(3, 2, shared=0.2, go_on=0.4)
    both = CascadeSet(dict.fromkeys(QUALITY, 1.0), (restart, shared))
    assert decide(image(1.0), cascades=both).cascade == restart  # 4.2 against 4.6 ms
    most = make_cascade(3, 2, shared=0.9, go_on=0.4)
    both = CascadeSet(dict.fromkeys(QUALITY, 1.0), (restart, most))
    assert decide(image(1.0), cascades=both).cascade == most
    again = both.restricted([0, 2, 3], continues=False)  # an engine that keeps no activations
    assert decide(image(1.0), cascades=again).cascade == restart
    assert again.pairs == ()


def test_plain_requests_stay_in_the_queue_of_a_cascade() -> None:
    planner = Planner(QUALITY, make_profile(), SchedulerSettings(), cascades=CASCADES)
    sure, plain = image(1.0, soft=101.0), make_request(101.5, arrival=100.0)
    planner.add(sure)
    planner.add(plain)
    choice = planner.decide(100.0)
    assert isinstance(choice, Decision)
    assert choice.cascade is not None
    assert choice.requests == (sure,)
    assert list(planner.queue.view) == [plain]
