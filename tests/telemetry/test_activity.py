"""The record of a model's last minutes: answers, budgets, quality and queue by the clock."""

from __future__ import annotations

import numpy as np
import pytest

from ladderstitch.scheduling.generation import GenerationInfo, GenerationUsage, TokenSpan
from ladderstitch.scheduling.profiles import Quality
from ladderstitch.scheduling.requests import Deadlines, ImageAnswer, Request
from ladderstitch.telemetry.activity import (
    BUCKET_S,
    MAX_ANSWERS,
    NUM_BUCKETS,
    RecentActivity,
    RecentAnswer,
)
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.model_metrics import VisionMetrics
from ladderstitch.telemetry.text_metrics import TextMetrics
from tests.support.image_scheduling import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def activity(clock: FakeClock) -> RecentActivity:
    return RecentActivity(clock)


def answer(quality: float | None = 0.9, met: bool | None = True) -> RecentAnswer:
    return RecentAnswer(3, quality, 0.004, met, 0.005)


def test_answers_budgets_and_quality_are_summed(activity: RecentActivity) -> None:
    for quality, met in ((0.8, True), (0.9, True), (None, False), (1.0, None)):
        activity.add(answer(quality, met))
    activity.add_rejection(is_missed=True)
    activity.add_rejection(is_missed=False)
    total = activity.total()
    assert (total.answered, total.rejected, total.met, total.missed) == (4, 2, 2, 2)
    assert total.attainment == 0.5
    assert total.quality == pytest.approx(0.9)
    assert [a.number for a in activity.answers] == [1, 2, 3, 4]


def test_nothing_measured_is_none_rather_than_zero(activity: RecentActivity) -> None:
    assert activity.total().attainment is None
    assert activity.total().quality is None
    assert len(activity.buckets()) == NUM_BUCKETS


def test_buckets_follow_the_clock_and_idle_times_are_empty(
    activity: RecentActivity, clock: FakeClock
) -> None:
    activity.add(answer())
    clock.now += 3 * BUCKET_S
    activity.add(answer(met=False))
    assert [b.answered for b in activity.buckets()[-4:]] == [1, 0, 0, 1]
    assert [b.attainment for b in activity.buckets()[-4:]] == [1.0, None, None, 0.0]
    clock.now += (NUM_BUCKETS - 1) * BUCKET_S
    assert (activity.total().met, activity.total().missed) == (0, 1)
    clock.now += BUCKET_S
    assert activity.total().answered == 0


def test_record_has_a_bounded_size(activity: RecentActivity, clock: FakeClock) -> None:
    for _ in range(3 * MAX_ANSWERS):
        activity.add(answer())
        clock.now += BUCKET_S
    assert len(activity.answers) == MAX_ANSWERS
    assert activity.answers[-1].number == activity.num_answers == 3 * MAX_ANSWERS
    assert len(activity._buckets) == NUM_BUCKETS


def test_queue_that_waits_for_long_is_in_every_bucket(
    activity: RecentActivity, clock: FakeClock
) -> None:
    activity.set_queue_length(7)
    activity.set_queue_length(4)
    clock.now += BUCKET_S
    activity.add(answer())  # the queue did not change meanwhile
    activity.set_queue_length(0)
    assert [b.longest_queue for b in activity.buckets()[-2:]] == [7, 4]
    assert activity.queue_length == 0
    assert activity.total().longest_queue == 7


def test_metrics_record_image_answers_where_a_page_shows_them() -> None:
    metrics = VisionMetrics(Metrics(keeps_activity=True), "m", range(3))
    assert VisionMetrics(Metrics(), "m", range(3)).activity is None
    images, logits = np.zeros((1, 1, 2, 2), np.float32), np.zeros((1, 4), np.float32)
    request = Request("r", images, 10.0, Deadlines(10.005))
    completion = ImageAnswer(logits, 2, 0.75, 0.001, 0.002, 1)
    metrics.observe_completion(request, completion, now=10.004)
    metrics.observe_completion(request, completion, now=10.006)
    metrics.observe_rejection("DEADLINE_EXCEEDED", request)
    metrics.observe_rejection("INVALID_ARGUMENT", request)
    assert metrics.activity is not None
    total = metrics.activity.total()
    assert (total.answered, total.met, total.missed, total.rejected) == (2, 1, 2, 2)
    first = metrics.activity.answers[0]
    assert (first.variant, first.quality, first.met) == (2, 0.75, True)
    assert (first.seconds, first.budget_s) == (pytest.approx(0.004), pytest.approx(0.005))


def test_metrics_record_texts_with_their_tokens_by_path() -> None:
    metrics = TextMetrics(Metrics(keeps_activity=True), "m", range(2))
    spans = (TokenSpan(0, "small", 3), TokenSpan(1, "large", 4))
    info = GenerationInfo(spans, Quality(value=0.2, low=0.1, high=0.3, perplexity=90.0), 0.0, 0)
    metrics.observe_completion(info, GenerationUsage(5, 7, 0.0, 0.01, 0.07, None, False, None))
    assert metrics.activity is not None
    (found,) = metrics.activity.answers
    assert (found.spans, found.met, found.budget_s) == (spans, False, None)
    assert found.token_s == pytest.approx(0.01)
    assert metrics.activity.total().missed == 1
