"""Policies against brute-force restatements of their definitions, and what holds for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladderstitch.scheduling.candidates import Menu
from ladderstitch.scheduling.latency_model import LatencyView
from ladderstitch.scheduling.requests import Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.vision.scheduler.policies import make_policy
from ladderstitch.vision.scheduler.policies.base import Decision, Policy
from ladderstitch.vision.scheduler.policies.baselines import slackfit_buckets
from ladderstitch.vision.scheduler.policies.demand import Forecast
from ladderstitch.vision.scheduler.queue import DeadlineQueue
from tests.support.image_scheduling import QUALITY, make_menu, make_prices, make_request, plain_view

NOW = 50.0
NAMES = ("fixed", "max_quality", "max_batch", "slackfit", "adaptive")


def policy(name: str, menu: Menu, **fields: object) -> Policy:
    stitch = {"stitch": 1} if name == "fixed" else {}
    if name == "fixed":
        menu = replace(menu, fixed=1)
    chosen = SchedulerSettings.model_validate(
        {"policy": name, "overhead_s": 0.0, "slackfit_buckets": 16} | stitch | fields
    )
    return make_policy(chosen, menu, Forecast(), make_prices())


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
            stitch=draw(st.sampled_from([None, None, None, 4, 0])),
        )
        for _ in range(draw(st.integers(1, 14)))
    ]


@pytest.mark.parametrize("name", NAMES)
@given(requests=queues(), tail=st.sampled_from([1.0, 1.5]), pinned=st.sampled_from([None, 3]))
@settings(max_examples=60, deadline=None)
def test_what_holds_for_every_decision(
    name: str, requests: list[Request], tail: float, pinned: int | None
) -> None:
    menu, view = make_menu(pinned_stitch=pinned), plain_view(tail)
    queue, before = ordered(requests), list(ordered(requests))
    decide = policy(name, menu)
    got = decide(queue, view, NOW)
    assert got == decide(queue, view, NOW)
    assert list(queue) == before
    if name != "adaptive":  # which may let those that are late anyway wait
        assert got.requests[0] is queue[0]
    positions = [before.index(request) for request in got.requests]
    assert positions == sorted(set(positions))
    assert sum(request.rows for request in got.requests) <= view.max_rows
    for request in got.requests:
        if request.stitch is not None:
            assert got.stitch == request.stitch
        else:
            assert QUALITY[got.stitch] >= request.min_quality


@pytest.mark.parametrize("name", ["max_quality", "max_batch", "slackfit", "adaptive"])
@given(requests=queues())
@settings(max_examples=60, deadline=None)
def test_the_head_is_on_time_whenever_it_can_be(name: str, requests: list[Request]) -> None:
    menu, view, queue = make_menu(), plain_view(), ordered(requests)
    got = policy(name, menu)(queue, view, NOW)
    head, rows = queue[0], sum(request.rows for request in got.requests)
    possible = NOW + view.seconds(menu.candidates(head)[0], head.rows) <= head.budget.target
    if name == "adaptive":  # where not all can be in time, it may give up the head for others
        possible = one_by_one(queue, menu, view)
    if possible:
        assert NOW + view.seconds(got.stitch, rows) <= head.budget.target + 1e-12


def one_by_one(queue: Sequence[Request], menu: Menu, view: LatencyView) -> bool:
    """Whether even without batches all are in time, each on the fastest stitch that it takes."""
    now = NOW
    for request in queue:
        now += view.seconds(menu.candidates(request)[0], request.rows)
        if now > request.budget.target:
            return False
    return True


def plain_queue(targets_ms: list[float]) -> list[Request]:
    return [make_request(NOW + ms / 1e3) for ms in targets_ms]


targets = st.lists(st.floats(1.01, 60), min_size=1, max_size=12)


def brute_max_quality(queue: Sequence[Request], menu: Menu, view: LatencyView) -> tuple[int, int]:
    slack = queue[0].budget.target - NOW
    stitch = max((s for s in menu.frontier if view.seconds(s, 1) <= slack), key=QUALITY.__getitem__)
    rows = max(b for b in range(1, 9) if view.seconds(stitch, b) <= slack)
    return stitch, min(rows, len(queue))


def brute_max_batch(queue: Sequence[Request], menu: Menu, view: LatencyView) -> tuple[int, int]:
    slack = queue[0].budget.target - NOW
    rows = max(b for b in range(1, 9) if view.seconds(menu.frontier[0], b) <= slack)
    rows = min(rows, len(queue))
    fitting = [s for s in menu.frontier if view.seconds(s, rows) <= slack]
    return max(fitting, key=QUALITY.__getitem__), rows


def brute_slackfit(
    queue: Sequence[Request], menu: Menu, view: LatencyView, count: int
) -> tuple[int, int]:
    """The definition, without a table: enumerate every pair for every bucket."""
    slack = queue[0].budget.target - NOW
    low = view.expected(menu.frontier[0], 1)
    high = max(view.expected(s, 8) for s in menu.frontier)
    edges = [low + (high - low) * i / count for i in range(count + 1)]
    for index in reversed(range(count)):
        inside = [
            (b, QUALITY[s], s)
            for s in menu.frontier
            for b in range(1, 9)
            if edges[index] <= view.expected(s, b) < edges[index + 1]
            or (index == count - 1 and view.expected(s, b) == high)
        ]
        if inside and edges[index + 1] <= slack:
            rows, _, stitch = max(inside)
            return stitch, min(rows, len(queue))
    fitting = [b for b in range(1, 9) if view.expected(menu.frontier[0], b) <= slack]
    return menu.frontier[0], min(max(fitting), len(queue))


@given(targets)
def test_max_quality_is_its_definition(targets_ms: list[float]) -> None:
    queue, menu, view = ordered(plain_queue(targets_ms)), make_menu(), plain_view()
    got = policy("max_quality", menu)(queue, view, NOW)
    assert (got.stitch, len(got.requests)) == brute_max_quality(queue, menu, view)


@given(targets)
def test_max_batch_is_its_definition(targets_ms: list[float]) -> None:
    queue, menu, view = ordered(plain_queue(targets_ms)), make_menu(), plain_view()
    got = policy("max_batch", menu)(queue, view, NOW)
    assert (got.stitch, len(got.requests)) == brute_max_batch(queue, menu, view)


@given(targets, st.sampled_from([1, 5, 13, 64]))
def test_slackfit_is_its_definition(targets_ms: list[float], count: int) -> None:
    queue, menu, view = ordered(plain_queue(targets_ms)), make_menu(), plain_view()
    got = policy("slackfit", menu, slackfit_buckets=count)(queue, view, NOW)
    assert (got.stitch, len(got.requests)) == brute_slackfit(queue, menu, view, count)


def test_slackfit_scales_with_the_machine() -> None:
    """Twice as slow with twice the slack is the same choice: the table need not be rebuilt."""
    menu = make_menu()
    decide = policy("slackfit", menu)
    for ms in (1.5, 4.0, 11.0, 30.0):
        normal = decide(ordered(plain_queue([ms] * 9)), plain_view(), NOW)
        slow = decide(ordered(plain_queue([2 * ms] * 9)), plain_view(slowdown=2.0), NOW)
        assert (normal.stitch, len(normal.requests)) == (slow.stitch, len(slow.requests))


def test_slackfit_buckets_ascend_and_end_at_the_slowest() -> None:
    buckets = slackfit_buckets(make_menu().frontier, plain_view(), 32)
    assert [b.upper_s for b in buckets] == sorted({b.upper_s for b in buckets})
    assert (buckets[-1].stitch, buckets[-1].rows) == (2, 8)


@pytest.mark.parametrize("name", ["max_quality", "max_batch", "slackfit", "adaptive"])
def test_a_hopeless_head_does_not_drag_relaxed_requests_down(name: str) -> None:
    late, relaxed = make_request(NOW - 1), make_request(NOW + 10)
    got = policy(name, make_menu())(ordered([relaxed, late]), plain_view(), NOW)
    assert got == Decision((late,), 0)


@pytest.mark.parametrize("name", ["max_quality", "max_batch", "slackfit", "adaptive"])
def test_the_late_run_together(name: str) -> None:
    late = [make_request(NOW - 1 + i / 100) for i in range(20)]
    got = policy(name, make_menu())(ordered(late), plain_view(), NOW)
    assert got == Decision(tuple(late[:8]), 0)


@pytest.mark.parametrize("name", NAMES)
def test_no_deadline_means_the_best(name: str) -> None:
    got = policy(name, make_menu())([make_request()], plain_view(), NOW)
    assert got.stitch == (1 if name == "fixed" else 2)


@pytest.mark.parametrize("name", ["max_quality", "max_batch", "slackfit", "adaptive"])
def test_a_head_that_waited_long_does_not_make_a_tight_request_late(name: str) -> None:
    """Without a deadline it comes first by age, but the batch is planned for the tighter one."""
    aged, tight = make_request(arrival=NOW - 2), make_request(NOW + 0.005)
    queue = ordered([tight, aged])
    assert list(queue) == [aged, tight]
    got = policy(name, make_menu())(queue, plain_view(), NOW)
    assert got.requests == (aged, tight)
    assert NOW + plain_view().seconds(got.stitch, 2) <= tight.budget.target


@pytest.mark.parametrize("name", ["max_quality", "max_batch", "slackfit", "adaptive"])
def test_a_tight_request_that_cannot_join_in_time_does_not_hurt_the_head(name: str) -> None:
    aged, hopeless = make_request(arrival=NOW - 2), make_request(NOW + 0.0012)
    got = policy(name, make_menu())(ordered([hopeless, aged]), plain_view(), NOW)
    assert got.stitch == 2


def test_slackfit_gives_a_large_request_the_highest_bucket_that_holds_it() -> None:
    menu, view = make_menu(), plain_view()
    buckets = slackfit_buckets(menu.frontier, view, 16)
    for slack in (0.004, 0.008, 0.013, 0.02, 0.03):
        for rows in range(1, 9):
            got = policy("slackfit", menu)([make_request(NOW + slack, rows=rows)], view, NOW)
            fitting = [b.stitch for b in buckets if b.upper_s <= slack and b.rows >= rows]
            assert got.stitch == (fitting[-1] if fitting else menu.frontier[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_pin_holds_for_all_but_those_it_would_wrong(name: str) -> None:
    menu = make_menu(pinned_stitch=3)
    for wishes, stitch in (({}, 3), ({"stitch": 4}, 4), ({"min_quality": 0.85}, 2)):
        got = policy(name, menu)([make_request(NOW + 5, **wishes)], plain_view(), NOW)
        assert got.stitch == stitch


@pytest.mark.parametrize("name", NAMES)
def test_the_operators_floor_holds(name: str) -> None:
    menu = make_menu(min_quality=0.78)
    got = policy(name, menu)([make_request(NOW + 0.0035)], plain_view(), NOW)
    assert QUALITY[got.stitch] >= 0.78


@pytest.mark.parametrize("name", NAMES)
def test_a_long_queue_is_not_scanned(name: str) -> None:
    class Counting(list[Request]):
        touched = 0

        def __getitem__(self, index: object) -> object:  # type: ignore[override] # counts
            found = super().__getitem__(index)  # type: ignore[index] # either kind
            Counting.touched += len(found) if isinstance(found, list) else 1
            return found

    queue = Counting(plain_queue([9.0 + i / 1000 for i in range(1000)]))
    policy(name, make_menu())(queue, plain_view(), NOW)
    assert Counting.touched < 100
