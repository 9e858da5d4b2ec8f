"""Tests of the deadline queue: order, priority as a bounded shift, expiry."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladderstitch.vision.scheduler.queue import DeadlineQueue
from tests.support.image_scheduling import make_request


@given(st.lists(st.tuples(st.sampled_from([1.0, 2.0, 3.0, math.inf]), st.integers(0, 255))))
def test_order_is_by_soft_deadline_priority_and_arrival(
    entries: list[tuple[float, int]],
) -> None:
    queue = DeadlineQueue(priority_window_s=0.5)
    requests = [make_request(t, arrival=0.25, priority=p) for t, p in entries]
    for request in requests:
        queue.add(request)

    def key(index: int) -> tuple[float, int]:
        deadline, priority = entries[index]
        shift = ((priority or 128) - 128) / 127 * 0.5
        return (1.25 if deadline == math.inf else deadline) + shift, index

    wanted = [requests[i] for i in sorted(range(len(requests)), key=key)]
    assert [id(r) for r in queue.view] == [id(r) for r in wanted]


def test_priority_never_starves_the_lowest() -> None:
    """The lowest priority precedes every request that is due a window or more after it."""
    queue = DeadlineQueue(priority_window_s=0.1)
    low = make_request(10.0, priority=255)
    urgent = [make_request(10.0 + i / 50, priority=1) for i in range(100)]
    for request in [*urgent, low]:
        queue.add(request)
    assert list(queue.view).index(low) <= 12


def test_remove_updates_order_and_num_images() -> None:
    queue = DeadlineQueue(0.1)
    requests = [make_request(5.0, num_images=2), make_request(5.0, num_images=3), make_request(4.0)]
    for request in requests:
        queue.add(request)
    assert (len(queue), queue.num_images) == (3, 6)
    queue.remove(requests[0])
    assert list(queue.view) == [requests[2], requests[1]]
    assert queue.num_images == 4
    with pytest.raises(ValueError, match="not in list"):
        queue.remove(requests[0])


def test_remove_expired_returns_only_passed_hard_deadlines() -> None:
    queue = DeadlineQueue(0.1)
    soft = make_request(1.0)
    early, late = make_request(1.0, hard=2.0), make_request(1.0, hard=3.0)
    for request in (soft, early, late):
        queue.add(request)
    assert queue.remove_expired(1.9) == []
    assert queue.remove_expired(2.5) == [early]
    assert list(queue.view) == [soft, late]


def test_images_before_counts_earlier_deadlines() -> None:
    queue = DeadlineQueue(0.0)
    assert queue.images_before(make_request(5.0)) == 0
    for soft in (1.0, 2.0, 3.0, 4.0):
        queue.add(make_request(soft, num_images=2))
    assert queue.images_before(make_request(2.5)) == 4
    assert queue.images_before(make_request(9.0)) == 8
