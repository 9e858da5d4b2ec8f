"""The deadline queue: order, priority as a bounded head start, expiry."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladderstitch.vision.scheduler.queue import DeadlineQueue
from tests.support.image_scheduling import make_request


@given(st.lists(st.tuples(st.sampled_from([1.0, 2.0, 3.0, math.inf]), st.integers(0, 255))))
def test_order_is_by_target_shifted_by_priority_and_ties_by_arrival(
    entries: list[tuple[float, int]],
) -> None:
    queue = DeadlineQueue(priority_window_s=0.5)
    requests = [make_request(t, arrival=0.25, priority=p) for t, p in entries]
    for request in requests:
        queue.add(request)

    def key(index: int) -> tuple[float, int]:
        target, priority = entries[index]
        shift = ((priority or 128) - 128) / 127 * 0.5
        return (1.25 if target == math.inf else target) + shift, index

    wanted = [requests[i] for i in sorted(range(len(requests)), key=key)]
    assert [id(r) for r in queue.view] == [id(r) for r in wanted]


def test_priority_cannot_starve() -> None:
    """The lowest priority still precedes everything due a window and more after it."""
    queue = DeadlineQueue(priority_window_s=0.1)
    low = make_request(10.0, priority=255)
    urgent = [make_request(10.0 + i / 50, priority=1) for i in range(100)]
    for request in [*urgent, low]:
        queue.add(request)
    assert list(queue.view).index(low) <= 12


def test_rows_and_removal() -> None:
    queue = DeadlineQueue(0.1)
    requests = [make_request(5.0, rows=2), make_request(5.0, rows=3), make_request(4.0)]
    for request in requests:
        queue.add(request)
    assert (len(queue), queue.num_images) == (3, 6)
    queue.remove(requests[0])
    assert list(queue.view) == [requests[2], requests[1]]
    assert queue.num_images == 4
    with pytest.raises(ValueError, match="not in list"):
        queue.remove(requests[0])


def test_only_what_is_past_its_limit_expires() -> None:
    queue = DeadlineQueue(0.1)
    soft = make_request(1.0)
    early, late = make_request(1.0, limit=2.0), make_request(1.0, limit=3.0)
    for request in (soft, early, late):
        queue.add(request)
    assert queue.take_expired(1.9) == []
    assert queue.take_expired(2.5) == [early]
    assert list(queue.view) == [soft, late]


def test_rows_before_counts_what_is_due_earlier() -> None:
    queue = DeadlineQueue(0.0)
    assert queue.images_before(make_request(5.0)) == 0
    for target in (1.0, 2.0, 3.0, 4.0):
        queue.add(make_request(target, rows=2))
    assert queue.images_before(make_request(2.5)) == 4
    assert queue.images_before(make_request(9.0)) == 8
