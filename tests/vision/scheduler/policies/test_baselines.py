"""Policies against brute-force restatements of their definitions, and what holds for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.vision.scheduler.policies import make_policy
from ladderstitch.vision.scheduler.policies.base import Decision, Policy
from ladderstitch.vision.scheduler.policies.baselines import slackfit_buckets
from ladderstitch.vision.scheduler.policies.demand import ArrivalForecast
from ladderstitch.vision.scheduler.queue import DeadlineQueue
from tests.support.image_scheduling import (
    QUALITY,
    make_candidates,
    make_hulls,
    make_request,
    plain_view,
)

NOW = 50.0
NAMES = ("fixed", "max_quality", "max_batch", "slackfit", "adaptive")


def policy(name: str, candidates: CandidateFilter, **fields: object) -> Policy:
    variant = {"fixed_variant": 1} if name == "fixed" else {}
    if name == "fixed":
        candidates = replace(candidates, fixed=1)
    chosen = SchedulerSettings.model_validate(
        {"policy": name, "overhead_s": 0.0, "slackfit_buckets": 16} | variant | fields
    )
    return make_policy(chosen, candidates, ArrivalForecast(), make_hulls())


def ordered(requests: list[Request]) -> Sequence[Request]:
    queue = DeadlineQueue(priority_window_s=0.0)
    for request in requests:
        queue.add(request)
    return queue.view


@st.composite
def queues(draw: st.DrawFn) -> list[Request]:
    return [
        make_request(
            NOW + draw(st.sampled_from([-0.01, 0.0005, 0.002, 0.004, 0.009, 0.02, 0.1, 5.0])),
            rows=draw(st.integers(1, 3)),
            min_quality=draw(st.sampled_from([0.0, 0.0, 0.75, 0.9])),
            variant=draw(st.sampled_from([None, None, None, 4, 0])),
        )
        for _ in range(draw(st.integers(1, 14)))
    ]


@pytest.mark.parametrize("name", NAMES)
@given(requests=queues(), tail=st.sampled_from([1.0, 1.5]), pinned=st.sampled_from([None, 3]))
@settings(max_examples=60, deadline=None)
def test_what_holds_for_every_decision(
    name: str, requests: list[Request], tail: float, pinned: int | None
) -> None:
    candidates, view = make_candidates(pinned_variant=pinned), plain_view(tail)
    queue, before = ordered(requests), list(ordered(requests))
    decide = policy(name, candidates)
    got = decide(queue, view, NOW)
    assert got == decide(queue, view, NOW)
    assert list(queue) == before
    if name != "adaptive":  # which may let those that are late anyway wait
        assert got.requests[0] is queue[0]
    positions = [before.index(request) for request in got.requests]
    assert positions == sorted(set(positions))
    assert sum(request.num_images for request in got.requests) <= view.max_batch_size
    for request in got.requests:
        if request.variant is not None:
            assert got.variant == request.variant
        else:
            assert QUALITY[got.variant] >= request.min_quality


@pytest.mark.parametrize("name", ["max_quality", "max_batch", "slackfit", "adaptive"])
@given(requests=queues())
@settings(max_examples=60, deadline=None)
def test_the_head_is_on_time_whenever_it_can_be(name: str, requests: list[Request]) -> None:
    candidates, view, queue = make_candidates(), plain_view(), ordered(requests)
    got = policy(name, candidates)(queue, view, NOW)
    head, rows = queue[0], sum(request.num_images for request in got.requests)
    possible = (
        NOW + view.seconds(candidates.for_request(head)[0], head.num_images) <= head.deadlines.soft
    )
    if name == "adaptive":  # where not all can be in time, it may give up the head for others
        possible = one_by_one(queue, candidates, view)
    if possible:
        assert NOW + view.seconds(got.variant, rows) <= head.deadlines.soft + 1e-12


def one_by_one(queue: Sequence[Request], candidates: CandidateFilter, view: LatencyView) -> bool:
    """Whether even without batches all are in time, each on the fastest variant that it takes."""
    now = NOW
    for request in queue:
        now += view.seconds(candidates.for_request(request)[0], request.num_images)
        if now > request.deadlines.soft:
            return False
    return True


def plain_queue(targets_ms: list[float]) -> list[Request]:
    return [make_request(NOW + ms / 1e3) for ms in targets_ms]


targets = st.lists(st.floats(1.01, 60), min_size=1, max_size=12)


def brute_max_quality(
    queue: Sequence[Request], candidates: CandidateFilter, view: LatencyView
) -> tuple[int, int]:
    slack = queue[0].deadlines.soft - NOW
    variant = max(
        (s for s in candidates.frontier if view.seconds(s, 1) <= slack), key=QUALITY.__getitem__
    )
    rows = max(b for b in range(1, 9) if view.seconds(variant, b) <= slack)
    return variant, min(rows, len(queue))


def brute_max_batch(
    queue: Sequence[Request], candidates: CandidateFilter, view: LatencyView
) -> tuple[int, int]:
    slack = queue[0].deadlines.soft - NOW
    rows = max(b for b in range(1, 9) if view.seconds(candidates.frontier[0], b) <= slack)
    rows = min(rows, len(queue))
    fitting = [s for s in candidates.frontier if view.seconds(s, rows) <= slack]
    return max(fitting, key=QUALITY.__getitem__), rows


def brute_slackfit(
    queue: Sequence[Request], candidates: CandidateFilter, view: LatencyView, count: int
) -> tuple[int, int]:
    """The definition, without a table: enumerate every pair for every bucket."""
    slack = queue[0].deadlines.soft - NOW
    low = view.expected(candidates.frontier[0], 1)
    high = max(view.expected(s, 8) for s in candidates.frontier)
    edges = [low + (high - low) * i / count for i in range(count + 1)]
    for index in reversed(range(count)):
        inside = [
            (b, QUALITY[s], s)
            for s in candidates.frontier
            for b in range(1, 9)
            if edges[index] <= view.expected(s, b) < edges[index + 1]
            or (index == count - 1 and view.expected(s, b) == high)
        ]
        if inside and edges[index + 1] <= slack:
            rows, _, variant = max(inside)
            return variant, min(rows, len(queue))
    fitting = [b for b in range(1, 9) if view.expected(candidates.frontier[0], b) <= slack]
    return candidates.frontier[0], min(max(fitting), len(queue))


@given(targets)
def test_max_quality_is_its_definition(targets_ms: list[float]) -> None:
    queue, candidates, view = ordered(plain_queue(targets_ms)), make_candidates(), plain_view()
    got = policy("max_quality", candidates)(queue, view, NOW)
    assert (got.variant, len(got.requests)) == brute_max_quality(queue, candidates, view)


@given(targets)
def test_max_batch_is_its_definition(targets_ms: list[float]) -> None:
    queue, candidates, view = ordered(plain_queue(targets_ms)), make_candidates(), plain_view()
    got = policy("max_batch", candidates)(queue, view, NOW)
    assert (got.variant, len(got.requests)) == brute_max_batch(queue, candidates, view)


@given(targets, st.sampled_from([1, 5, 13, 64]))
def test_slackfit_is_its_definition(targets_ms: list[float], count: int) -> None:
    queue, candidates, view = ordered(plain_queue(targets_ms)), make_candidates(), plain_view()
    got = policy("slackfit", candidates, slackfit_buckets=count)(queue, view, NOW)
    assert (got.variant, len(got.requests)) == brute_slackfit(queue, candidates, view, count)


def test_slackfit_scales_with_the_machine() -> None:
    """Twice as slow with twice the slack is the same choice: the table need not be rebuilt."""
    candidates = make_candidates()
    decide = policy("slackfit", candidates)
    for ms in (1.5, 4.0, 11.0, 30.0):
        normal = decide(ordered(plain_queue([ms] * 9)), plain_view(), NOW)
        slow = decide(ordered(plain_queue([2 * ms] * 9)), plain_view(slowdown=2.0), NOW)
        assert (normal.variant, len(normal.requests)) == (slow.variant, len(slow.requests))


def test_slackfit_buckets_ascend_and_end_at_the_slowest() -> None:
    buckets = slackfit_buckets(make_candidates().frontier, plain_view(), 32)
    assert [b.upper_s for b in buckets] == sorted({b.upper_s for b in buckets})
    assert (buckets[-1].variant, buckets[-1].batch_size) == (2, 8)


@pytest.mark.parametrize("name", ["max_quality", "max_batch", "slackfit", "adaptive"])
def test_a_hopeless_head_does_not_drag_relaxed_requests_down(name: str) -> None:
    late, relaxed = make_request(NOW - 1), make_request(NOW + 10)
    got = policy(name, make_candidates())(ordered([relaxed, late]), plain_view(), NOW)
    assert got == Decision((late,), 0)


@pytest.mark.parametrize("name", ["max_quality", "max_batch", "slackfit", "adaptive"])
def test_the_late_run_together(name: str) -> None:
    late = [make_request(NOW - 1 + i / 100) for i in range(20)]
    got = policy(name, make_candidates())(ordered(late), plain_view(), NOW)
    assert got == Decision(tuple(late[:8]), 0)


@pytest.mark.parametrize("name", NAMES)
def test_no_deadline_means_the_best(name: str) -> None:
    got = policy(name, make_candidates())([make_request()], plain_view(), NOW)
    assert got.variant == (1 if name == "fixed" else 2)


@pytest.mark.parametrize("name", ["max_quality", "max_batch", "slackfit", "adaptive"])
def test_a_head_that_waited_long_does_not_make_a_tight_request_late(name: str) -> None:
    """Without a deadline it comes first by age, but the batch is planned for the tighter one."""
    aged, tight = make_request(arrival=NOW - 2), make_request(NOW + 0.005)
    queue = ordered([tight, aged])
    assert list(queue) == [aged, tight]
    got = policy(name, make_candidates())(queue, plain_view(), NOW)
    assert got.requests == (aged, tight)
    assert NOW + plain_view().seconds(got.variant, 2) <= tight.deadlines.soft


@pytest.mark.parametrize("name", ["max_quality", "max_batch", "slackfit", "adaptive"])
def test_a_tight_request_that_cannot_join_in_time_does_not_hurt_the_head(name: str) -> None:
    aged, hopeless = make_request(arrival=NOW - 2), make_request(NOW + 0.0012)
    got = policy(name, make_candidates())(ordered([hopeless, aged]), plain_view(), NOW)
    assert got.variant == 2


def test_slackfit_gives_a_large_request_the_highest_bucket_that_holds_it() -> None:
    candidates, view = make_candidates(), plain_view()
    buckets = slackfit_buckets(candidates.frontier, view, 16)
    for slack in (0.004, 0.008, 0.013, 0.02, 0.03):
        for rows in range(1, 9):
            got = policy("slackfit", candidates)([make_request(NOW + slack, rows=rows)], view, NOW)
            fitting = [b.variant for b in buckets if b.upper_s <= slack and b.batch_size >= rows]
            assert got.variant == (fitting[-1] if fitting else candidates.frontier[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_pin_holds_for_all_but_those_it_would_wrong(name: str) -> None:
    candidates = make_candidates(pinned_variant=3)
    for wishes, variant in (({}, 3), ({"variant": 4}, 4), ({"min_quality": 0.85}, 2)):
        got = policy(name, candidates)([make_request(NOW + 5, **wishes)], plain_view(), NOW)
        assert got.variant == variant


@pytest.mark.parametrize("name", NAMES)
def test_the_operators_floor_holds(name: str) -> None:
    candidates = make_candidates(min_quality=0.78)
    got = policy(name, candidates)([make_request(NOW + 0.0035)], plain_view(), NOW)
    assert QUALITY[got.variant] >= 0.78


@pytest.mark.parametrize("name", NAMES)
def test_a_long_queue_is_not_scanned(name: str) -> None:
    class Counting(list[Request]):
        touched = 0

        def __getitem__(self, index: object) -> object:  # type: ignore[override] # counts
            found = super().__getitem__(index)  # type: ignore[index] # either kind
            Counting.touched += len(found) if isinstance(found, list) else 1
            return found

    queue = Counting(plain_queue([9.0 + i / 1000 for i in range(1000)]))
    policy(name, make_candidates())(queue, plain_view(), NOW)
    assert Counting.touched < 100
