"""The rule by which requests find their replica: pure, so that it can be asked anything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladderstitch.gateway.routing import GRAIN_S, ReplicaLoad, choose
from ladderstitch.scheduling.load_report import HORIZONS_S, LoadReport


def view(
    waits_s: float | tuple[float, ...],
    request_s: float = 0.001,
    at: float = 0.0,
    batch_s: float = 0.0,
) -> ReplicaLoad:
    if isinstance(waits_s, float):
        waits_s = (waits_s,) * len(HORIZONS_S)
    return ReplicaLoad(LoadReport(waits_s, request_s, batch_s), reported_at=at)


def test_the_shortest_wait_wins() -> None:
    assert choose([view(0.03), view(0.01), view(0.02)], 1.0, now=0.0, turn=0) == 1


def test_what_is_less_urgent_is_not_in_the_way() -> None:
    """Two rows of a second each wait at one replica, half a second's urgent work at the other."""
    relaxed = view((0.0,) * 8 + (2.0, 2.0))
    urgent = view((0.5,) * 10)
    assert choose([relaxed, urgent], 0.005, now=0.0, turn=0) == 0
    assert choose([relaxed, urgent], 30.0, now=0.0, turn=0) == 1


def test_time_works_off_what_was_told() -> None:
    old, new = view(0.10, at=0.0), view(0.08, at=0.09)
    assert choose([old, new], 1.0, now=0.09, turn=0) == 0


def test_what_was_sent_since_counts_until_it_is_answered_or_told() -> None:
    first, second = view(0.0), view(0.0)
    marks = [first.on_sent(1.0) for _ in range(3)]
    assert choose([first, second], 1.0, now=0.0, turn=0) == 1
    first.on_ended(marks[0])
    assert (first.outstanding, first.unreported) == (2, [1.0, 1.0])
    first.on_report(LoadReport((0.0,) * 10, 0.001), now=0.0)  # it has seen the others
    assert (first.outstanding, first.unreported) == (2, [])
    for mark in marks[1:]:
        first.on_ended(mark)
    assert (first.outstanding, first.unreported) == (0, [])


def test_relaxed_requests_sent_since_may_run_but_are_not_ahead() -> None:
    """Some of ten relaxed ones may have been started; three urgent ones are all ahead."""
    relaxed, urgent = view(0.0, batch_s=0.002), view(0.0, batch_s=0.002)
    for _ in range(10):
        relaxed.on_sent(1.0)
    for _ in range(3):
        urgent.on_sent(0.005)
    assert choose([relaxed, urgent], 0.01, now=0.0, turn=0) == 0
    assert choose([relaxed, urgent], 2.0, now=0.0, turn=0) == 1


def test_a_slow_machine_is_asked_when_the_quick_one_is_busier_than_that() -> None:
    slow, quick = view(0.0, request_s=0.02), view(0.0, request_s=0.005)
    assert choose([slow, quick], 1.0, now=0.0, turn=0) == 1
    for _ in range(4):
        quick.on_sent(0.5)
    assert choose([slow, quick], 1.0, now=0.0, turn=0) == 0


def test_equals_take_turns() -> None:
    views = [view(0.0), view(GRAIN_S / 10), view(0.0)]
    assert [choose(views, 1.0, now=0.0, turn=turn) for turn in range(4)] == [0, 1, 2, 0]


def test_among_equals_the_one_with_less_under_way() -> None:
    views = [view(0.0), view(0.0)]
    views[0].outstanding = 1  # told of, but not answered
    assert [choose(views, 1.0, now=0.0, turn=turn) for turn in range(2)] == [1, 1]


def test_nobody_to_choose() -> None:
    with pytest.raises(IndexError, match="no replica"):
        choose([], 1.0, now=0.0, turn=0)


waits = st.lists(st.floats(0, 5), min_size=10, max_size=10).map(lambda w: tuple(sorted(w)))


@given(
    st.lists(st.tuples(waits, st.integers(0, 5)), min_size=1, max_size=6),
    st.floats(0, 10),
    st.integers(0, 100),
)
def test_nobody_else_would_leave_more_slack(
    told: list[tuple[tuple[float, ...], int]], budget_s: float, turn: int
) -> None:
    views = [view(waits_s) for waits_s, _ in told]
    for each, (_, unreported) in zip(views, told, strict=True):
        for _ in range(unreported):
            each.on_sent(0.0)
    chosen = choose(views, budget_s, now=0.0, turn=turn)
    place = next((i for i, due in enumerate(HORIZONS_S) if budget_s <= due), len(HORIZONS_S) - 1)
    delays = [waits_s[place] + (1 + unreported) * 0.001 for waits_s, unreported in told]
    assert delays[chosen] <= min(delays) + GRAIN_S
