"""Tests of policies against brute-force definitions, and of the properties of all policies."""

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
from ladderstitch.vision.scheduler.policies.forecast import ArrivalForecast
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


def build_policy(name: str, candidates: CandidateFilter, **fields: object) -> Policy:
    variant = {"fixed_variant": 1} if name == "fixed" else {}
    if name == "fixed":
        candidates = replace(candidates, fixed=1)
    chosen = SchedulerSettings.model_validate(
        {"policy": name, "overhead_s": 0.0, "slackfit_buckets": 16} | variant | fields
    )
    return make_policy(chosen, candidates, ArrivalForecast(), make_hulls())


def in_deadline_order(requests: list[Request]) -> Sequence[Request]:
    queue = DeadlineQueue(priority_window_s=0.0)
    for request in requests:
        queue.add(request)
    return queue.view


@st.composite
def queues(draw: st.DrawFn) -> list[Request]:
    return [
        make_request(
            NOW + draw(st.sampled_from([-0.01, 0.0005, 0.002, 0.004, 0.009, 0.02, 0.1, 5.0])),
            num_images=draw(st.integers(1, 3)),
            min_quality=draw(st.sampled_from([0.0, 0.0, 0.75, 0.9])),
            variant=draw(st.sampled_from([None, None, None, 4, 0])),
        )
        for _ in range(draw(st.integers(1, 14)))
    ]


@pytest.mark.parametrize("name", NAMES)
@given(requests=queues(), tail=st.sampled_from([1.0, 1.5]), pinned=st.sampled_from([None, 3]))
@settings(max_examples=60)
def test_every_decision_is_pure_and_admissible(
    name: str, requests: list[Request], tail: float, pinned: int | None
) -> None:
    candidates, view = make_candidates(pinned_variant=pinned), plain_view(tail)
    queue, before = in_deadline_order(requests), list(in_deadline_order(requests))
    decide = build_policy(name, candidates)
    got = decide(queue, view, NOW)
    assert got == decide(queue, view, NOW)
    assert list(queue) == before
    if name != "adaptive":  # which may defer requests that are late on every variant
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
@settings(max_examples=60)
def test_first_request_is_on_time_if_possible(name: str, requests: list[Request]) -> None:
    candidates, view, queue = make_candidates(), plain_view(), in_deadline_order(requests)
    got = build_policy(name, candidates)(queue, view, NOW)
    head, batch_size = queue[0], sum(request.num_images for request in got.requests)
    possible = (
        NOW + view.seconds(candidates.for_request(head)[0], head.num_images) <= head.deadlines.soft
    )
    if name == "adaptive":  # it may sacrifice the first request if not all can be on time
        possible = fits_one_by_one(queue, candidates, view)
    if possible:
        assert NOW + view.seconds(got.variant, batch_size) <= head.deadlines.soft + 1e-12


def fits_one_by_one(
    queue: Sequence[Request], candidates: CandidateFilter, view: LatencyView
) -> bool:
    """Return whether all requests are on time one by one, each on its fastest variant."""
    now = NOW
    for request in queue:
        now += view.seconds(candidates.for_request(request)[0], request.num_images)
        if now > request.deadlines.soft:
            return False
    return True


def requests_due(deadlines_ms: list[float]) -> list[Request]:
    return [make_request(NOW + ms / 1e3) for ms in deadlines_ms]


deadlines = st.lists(st.floats(1.01, 60), min_size=1, max_size=12)


def brute_max_quality(
    queue: Sequence[Request], candidates: CandidateFilter, view: LatencyView
) -> tuple[int, int]:
    slack = queue[0].deadlines.soft - NOW
    variant = max(
        (s for s in candidates.frontier if view.seconds(s, 1) <= slack), key=QUALITY.__getitem__
    )
    batch_size = max(b for b in range(1, 9) if view.seconds(variant, b) <= slack)
    return variant, min(batch_size, len(queue))


def brute_max_batch(
    queue: Sequence[Request], candidates: CandidateFilter, view: LatencyView
) -> tuple[int, int]:
    slack = queue[0].deadlines.soft - NOW
    batch_size = max(b for b in range(1, 9) if view.seconds(candidates.frontier[0], b) <= slack)
    batch_size = min(batch_size, len(queue))
    fitting = [s for s in candidates.frontier if view.seconds(s, batch_size) <= slack]
    return max(fitting, key=QUALITY.__getitem__), batch_size


def brute_slackfit(
    queue: Sequence[Request], candidates: CandidateFilter, view: LatencyView, count: int
) -> tuple[int, int]:
    """Enumerate every pair of variant and batch size for every bucket."""
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
            batch_size, _, variant = max(inside)
            return variant, min(batch_size, len(queue))
    fitting = [b for b in range(1, 9) if view.expected(candidates.frontier[0], b) <= slack]
    return candidates.frontier[0], min(max(fitting), len(queue))


@given(deadlines)
def test_max_quality_matches_its_definition(deadlines_ms: list[float]) -> None:
    queue, candidates, view = (
        in_deadline_order(requests_due(deadlines_ms)),
        make_candidates(),
        plain_view(),
    )
    got = build_policy("max_quality", candidates)(queue, view, NOW)
    assert (got.variant, len(got.requests)) == brute_max_quality(queue, candidates, view)


@given(deadlines)
def test_max_batch_matches_its_definition(deadlines_ms: list[float]) -> None:
    queue, candidates, view = (
        in_deadline_order(requests_due(deadlines_ms)),
        make_candidates(),
        plain_view(),
    )
    got = build_policy("max_batch", candidates)(queue, view, NOW)
    assert (got.variant, len(got.requests)) == brute_max_batch(queue, candidates, view)


@given(deadlines, st.sampled_from([1, 5, 13, 64]))
def test_slackfit_matches_its_definition(deadlines_ms: list[float], count: int) -> None:
    queue, candidates, view = (
        in_deadline_order(requests_due(deadlines_ms)),
        make_candidates(),
        plain_view(),
    )
    got = build_policy("slackfit", candidates, slackfit_buckets=count)(queue, view, NOW)
    assert (got.variant, len(got.requests)) == brute_slackfit(queue, candidates, view, count)


def test_slackfit_scales_with_the_slowdown() -> None:
    """Half the speed with twice the slack gives the same choice, so the table stays the same."""
    candidates = make_candidates()
    decide = build_policy("slackfit", candidates)
    for ms in (1.5, 4.0, 11.0, 30.0):
        normal = decide(in_deadline_order(requests_due([ms] * 9)), plain_view(), NOW)
        slow = decide(in_deadline_order(requests_due([2 * ms] * 9)), plain_view(slowdown=2.0), NOW)
        assert (normal.variant, len(normal.requests)) == (slow.variant, len(slow.requests))


def test_slackfit_buckets_ascend_to_the_slowest_variant() -> None:
    buckets = slackfit_buckets(make_candidates().frontier, plain_view(), 32)
    assert [b.upper_s for b in buckets] == sorted({b.upper_s for b in buckets})
    assert (buckets[-1].variant, buckets[-1].batch_size) == (2, 8)


@pytest.mark.parametrize("name", ["max_quality", "max_batch", "slackfit", "adaptive"])
def test_late_first_request_does_not_delay_relaxed_ones(name: str) -> None:
    late, relaxed = make_request(NOW - 1), make_request(NOW + 10)
    got = build_policy(name, make_candidates())(
        in_deadline_order([relaxed, late]), plain_view(), NOW
    )
    assert got == Decision((late,), 0)


@pytest.mark.parametrize("name", ["max_quality", "max_batch", "slackfit", "adaptive"])
def test_late_requests_run_together(name: str) -> None:
    late = [make_request(NOW - 1 + i / 100) for i in range(20)]
    got = build_policy(name, make_candidates())(in_deadline_order(late), plain_view(), NOW)
    assert got == Decision(tuple(late[:8]), 0)


@pytest.mark.parametrize("name", NAMES)
def test_request_without_deadline_gets_the_best_variant(name: str) -> None:
    got = build_policy(name, make_candidates())([make_request()], plain_view(), NOW)
    assert got.variant == (1 if name == "fixed" else 2)


@pytest.mark.parametrize("name", ["max_quality", "max_batch", "slackfit", "adaptive"])
def test_aged_first_request_does_not_delay_a_tight_one(name: str) -> None:
    """The aged request has no deadline and is first; the batch is planned for the tight one."""
    aged, tight = make_request(arrival=NOW - 2), make_request(NOW + 0.005)
    queue = in_deadline_order([tight, aged])
    assert list(queue) == [aged, tight]
    got = build_policy(name, make_candidates())(queue, plain_view(), NOW)
    assert got.requests == (aged, tight)
    assert NOW + plain_view().seconds(got.variant, 2) <= tight.deadlines.soft


@pytest.mark.parametrize("name", ["max_quality", "max_batch", "slackfit", "adaptive"])
def test_tight_request_that_is_late_does_not_lower_quality(name: str) -> None:
    aged, late = make_request(arrival=NOW - 2), make_request(NOW + 0.0012)
    got = build_policy(name, make_candidates())(in_deadline_order([late, aged]), plain_view(), NOW)
    assert got.variant == 2


def test_slackfit_large_request_gets_the_highest_bucket() -> None:
    candidates, view = make_candidates(), plain_view()
    buckets = slackfit_buckets(candidates.frontier, view, 16)
    for slack in (0.004, 0.008, 0.013, 0.02, 0.03):
        for num_images in range(1, 9):
            request = make_request(NOW + slack, num_images=num_images)
            got = build_policy("slackfit", candidates)([request], view, NOW)
            fitting = [
                b.variant for b in buckets if b.upper_s <= slack and b.batch_size >= num_images
            ]
            assert got.variant == (fitting[-1] if fitting else candidates.frontier[0])


@pytest.mark.parametrize("name", NAMES)
def test_pin_applies_unless_the_request_needs_more(name: str) -> None:
    candidates = make_candidates(pinned_variant=3)
    for fields, variant in (({}, 3), ({"variant": 4}, 4), ({"min_quality": 0.85}, 2)):
        got = build_policy(name, candidates)([make_request(NOW + 5, **fields)], plain_view(), NOW)
        assert got.variant == variant


@pytest.mark.parametrize("name", NAMES)
def test_operator_floor_applies_to_every_decision(name: str) -> None:
    candidates = make_candidates(min_quality=0.78)
    got = build_policy(name, candidates)([make_request(NOW + 0.0035)], plain_view(), NOW)
    assert QUALITY[got.variant] >= 0.78


@pytest.mark.parametrize("name", NAMES)
def test_decision_does_not_scan_a_long_queue(name: str) -> None:
    class Counting(list[Request]):
        touched = 0

        def __getitem__(self, index: object) -> object:  # type: ignore[override] # counts
            found = super().__getitem__(index)  # type: ignore[index] # an index or a slice
            Counting.touched += len(found) if isinstance(found, list) else 1
            return found

    queue = Counting(requests_due([9.0 + i / 1000 for i in range(1000)]))
    build_policy(name, make_candidates())(queue, plain_view(), NOW)
    assert Counting.touched < 100
