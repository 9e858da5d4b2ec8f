"""The live audit: when it runs, what it may cost, and when it finds that agreement has fallen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
from scipy.stats import binomtest

from ladderstitch.scheduling.cascades import CascadeSet
from ladderstitch.scheduling.requests import ImageAnswer, Pixels
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.model_metrics import VisionMetrics
from ladderstitch.vision.engine.base import EngineResult
from ladderstitch.vision.scheduler.audit import (
    IDLE_BEFORE_AUDIT_S,
    MAX_CAPACITY_SHARE,
    AgreementMonitor,
    Auditor,
)
from ladderstitch.vision.scheduler.scheduler import Scheduler
from tests.support.image_scheduling import (
    QUALITY,
    FakeClock,
    ScriptedEngine,
    make_profile,
    make_request,
)

TURNS = 20
"""Turns of the event loop in which an answer is counted and the dispatch loop waits again."""
SEEDS = range(200)
BEST = 2


def images_until_drift(agreement: float, expected: float, seed: int, most: int) -> int:
    """Return the number of audited images after which drift is found; `most` if it is not."""
    monitor = AgreementMonitor(expected)
    for count, draw in enumerate(np.random.default_rng(seed).random(most), 1):
        monitor.add(bool(draw < agreement))
        if monitor.drifted:
            return count
    return most


def test_fall_from_90_to_85_percent_is_found_within_1000_images() -> None:
    found = [images_until_drift(0.85, 0.90, seed, 1001) for seed in SEEDS]
    assert np.mean([count <= 1000 for count in found]) >= 0.95
    assert np.median(found) < 500


def test_no_drift_raises_few_alarms() -> None:
    found = [images_until_drift(0.90, 0.90, seed, 1001) for seed in SEEDS]
    assert np.mean([count <= 1000 for count in found]) <= 0.05


def test_alarm_ends_after_the_agreement_has_recovered() -> None:
    monitor = AgreementMonitor(0.90)
    for _ in range(200):
        monitor.add(False)
    assert monitor.drifted
    for count in range(1000):
        monitor.add(count % 10 != 0)
    assert not monitor.drifted


def test_interval_is_wilsons() -> None:
    monitor = AgreementMonitor(None)
    for count in range(340):
        monitor.add(count % 7 != 0)
    expected = binomtest(sum(monitor.recent), 340).proportion_ci(0.95, method="wilson")
    assert monitor.agreement[1:] == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert not monitor.drifted  # nothing was calibrated


def make_answer(variant: int) -> ImageAnswer:
    """Return an answer of class 0."""
    return ImageAnswer(np.array([[1.0, 0.0]], np.float32), variant, 0.8, 0.0, 0.0, 1)


def test_audits_take_at_most_their_share_of_the_time() -> None:
    now, auditor, cost_s = 0.0, Auditor({0: 0.9}, 0.0), 0.010
    auditor.share = 1.0
    logits = np.array([[1.0, 0.0]], np.float32)
    while now < 100.0:
        auditor.sample(make_request(), make_answer(0), BEST)
        delay_s = auditor.delay_s(cost_s, now, idle_since=now - 1.0)
        assert delay_s is not None
        now += delay_s
        if not delay_s:
            auditor.add(auditor.take(), logits, cost_s)
            now += cost_s
    assert 0.9 * MAX_CAPACITY_SHARE < auditor.seconds / now <= MAX_CAPACITY_SHARE


def test_best_variant_is_not_audited() -> None:
    auditor = Auditor({}, 0.0)
    auditor.share = 1.0
    auditor.sample(make_request(), make_answer(BEST), BEST)
    assert auditor.delay_s(0.001, 100.0, 0.0) is None


class DriftingEngine(ScriptedEngine):
    """An engine whose variant 0 predicts the best one's class for a share of images only."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.agreement, self.rng = 1.0, np.random.default_rng(0)
        self.audited = asyncio.Event()

    async def forward(self, images: Sequence[Pixels], stitch: int) -> EngineResult:
        """Return logits [B, 2] of class 0, or of class 1 if variant 0 is wrong."""
        result = await super().forward(images, stitch)
        if stitch == BEST:
            self.audited.set()
        wrong = (self.rng.random(len(result.logits)) >= self.agreement) & (stitch == 0)
        logits = np.stack([~wrong, wrong], axis=1).astype(np.float32)
        return EngineResult(logits, result.compute_s)


@pytest.fixture
def engine(clock: FakeClock) -> DriftingEngine:
    """An engine on the fake clock."""
    return DriftingEngine(clock)


@pytest.fixture
def metrics() -> Metrics:
    """Metrics of their own."""
    return Metrics()


@pytest.fixture
async def scheduler(
    engine: DriftingEngine, clock: FakeClock, metrics: Metrics
) -> AsyncIterator[Scheduler]:
    """A scheduler that audits all answers of variant 0, whose agreement was 0.90."""
    made = Scheduler(
        engine,
        QUALITY,
        make_profile(),
        SchedulerSettings(audit_share=1.0),
        VisionMetrics(metrics, "m", QUALITY),
        clock,
        cascades=CascadeSet(dict.fromkeys(QUALITY, 1.0)),
        agreements={0: 0.90},
    )
    yield made
    await made.close()


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """Return the value of a series; 0 if there is none."""
    labels = {"model": "m", "variant": "0"} | labels
    return metrics.registry.get_sample_value(f"ladderstitch_{name}", labels) or 0.0


async def answer_and_audit(scheduler: Scheduler, clock: FakeClock, engine: DriftingEngine) -> None:
    """Answer one request on variant 0, and let time pass until it has been audited."""
    await scheduler.submit(make_request(arrival=clock.now, variant=0))
    engine.audited.clear()
    for _ in range(TURNS):
        await asyncio.sleep(0)
    clock.now += 1.0  # earns 20 ms of audits
    await asyncio.wait_for(engine.audited.wait(), 60)
    assert engine.calls[-1] == (BEST, 1)


async def test_planted_drift_is_found_by_the_real_scheduler(
    scheduler: Scheduler, engine: DriftingEngine, clock: FakeClock, metrics: Metrics
) -> None:
    engine.agreement = 0.90
    for _ in range(100):
        await answer_and_audit(scheduler, clock, engine)
    await asyncio.sleep(0.01)
    assert value(metrics, "audit_drift") == 0
    engine.agreement, count = 0.70, 0
    while not value(metrics, "audit_drift"):
        await answer_and_audit(scheduler, clock, engine)
        count += 1
        assert count < 200
    low, high = (value(metrics, "audit_agreement", end=end) for end in ("low", "high"))
    assert low < value(metrics, "audit_agreement", end="mean") < high
    audited = sum(
        value(metrics, "audited_images_total", agrees=agrees) for agrees in ("true", "false")
    )
    assert audited == pytest.approx(100 + count, abs=2)


async def test_no_audit_runs_while_requests_wait(
    scheduler: Scheduler, engine: DriftingEngine, clock: FakeClock
) -> None:
    clock.now += 10.0
    tasks = [
        asyncio.create_task(scheduler.submit(make_request(arrival=clock.now, variant=0)))
        for _ in range(50)
    ]
    await asyncio.gather(*tasks)
    assert {variant for variant, _ in engine.calls} == {0}


async def test_audit_is_off_unless_the_operator_sets_a_share(
    scheduler: Scheduler, engine: DriftingEngine, clock: FakeClock
) -> None:
    assert SchedulerSettings().audit_share == 0
    scheduler.configure(SchedulerSettings())
    await scheduler.submit(make_request(arrival=clock.now, variant=0))
    clock.now += 10.0
    await asyncio.sleep(4 * IDLE_BEFORE_AUDIT_S)
    assert engine.calls == [(0, 1)]
