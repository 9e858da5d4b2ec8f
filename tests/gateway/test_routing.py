"""The routing rule: which replica a request goes to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladderstitch.gateway.routing import DELAY_RESOLUTION_S, ReplicaLoad, pick_replica
from ladderstitch.scheduling.load_report import HORIZONS_S, LoadReport


def make_load(
    waits_s: float | tuple[float, ...],
    request_s: float = 0.001,
    at: float = 0.0,
    batch_s: float = 0.0,
) -> ReplicaLoad:
    if isinstance(waits_s, float):
        waits_s = (waits_s,) * len(HORIZONS_S)
    return ReplicaLoad(LoadReport(waits_s, request_s, batch_s), reported_at=at)


def test_pick_replica_prefers_the_shortest_wait() -> None:
    loads = [make_load(0.03), make_load(0.01), make_load(0.02)]
    assert pick_replica(loads, 1.0, now=0.0, turn=0) == 1


def test_pick_replica_ignores_less_urgent_work() -> None:
    """One replica has 2 s of relaxed work queued, the other 0.5 s of urgent work."""
    relaxed = make_load((0.0,) * 8 + (2.0, 2.0))
    urgent = make_load((0.5,) * 10)
    assert pick_replica([relaxed, urgent], 0.005, now=0.0, turn=0) == 0
    assert pick_replica([relaxed, urgent], 30.0, now=0.0, turn=0) == 1


def test_pick_replica_subtracts_the_age_of_a_report() -> None:
    old, new = make_load(0.10, at=0.0), make_load(0.08, at=0.09)
    assert pick_replica([old, new], 1.0, now=0.09, turn=0) == 0


def test_replica_load_counts_requests_until_reported() -> None:
    first, second = make_load(0.0), make_load(0.0)
    tickets = [first.on_sent(1.0) for _ in range(3)]
    assert pick_replica([first, second], 1.0, now=0.0, turn=0) == 1
    first.on_ended(tickets[0])
    assert (first.outstanding, first.unreported) == (2, [1.0, 1.0])
    first.on_report(LoadReport((0.0,) * 10, 0.001), now=0.0)  # the report includes the others
    assert (first.outstanding, first.unreported) == (2, [])
    for ticket in tickets[1:]:
        first.on_ended(ticket)
    assert (first.outstanding, first.unreported) == (0, [])


def test_pick_replica_counts_only_earlier_deadlines_ahead() -> None:
    """Some of ten relaxed requests may have started; three urgent ones are all ahead."""
    relaxed, urgent = make_load(0.0, batch_s=0.002), make_load(0.0, batch_s=0.002)
    for _ in range(10):
        relaxed.on_sent(1.0)
    for _ in range(3):
        urgent.on_sent(0.005)
    assert pick_replica([relaxed, urgent], 0.01, now=0.0, turn=0) == 0
    assert pick_replica([relaxed, urgent], 2.0, now=0.0, turn=0) == 1


def test_pick_replica_uses_a_slow_one_if_the_fast_is_busy() -> None:
    slow, quick = make_load(0.0, request_s=0.02), make_load(0.0, request_s=0.005)
    assert pick_replica([slow, quick], 1.0, now=0.0, turn=0) == 1
    for _ in range(4):
        quick.on_sent(0.5)
    assert pick_replica([slow, quick], 1.0, now=0.0, turn=0) == 0


def test_pick_replica_equal_delays_take_turns() -> None:
    loads = [make_load(0.0), make_load(DELAY_RESOLUTION_S / 10), make_load(0.0)]
    assert [pick_replica(loads, 1.0, now=0.0, turn=turn) for turn in range(4)] == [0, 1, 2, 0]


def test_pick_replica_equal_delays_prefers_fewer_in_flight() -> None:
    loads = [make_load(0.0), make_load(0.0)]
    loads[0].outstanding = 1  # reported, but not answered
    assert [pick_replica(loads, 1.0, now=0.0, turn=turn) for turn in range(2)] == [1, 1]


def test_pick_replica_without_replicas_raises() -> None:
    with pytest.raises(IndexError, match="no replica"):
        pick_replica([], 1.0, now=0.0, turn=0)


waits = st.lists(st.floats(0, 5), min_size=10, max_size=10).map(lambda w: tuple(sorted(w)))


@given(
    st.lists(st.tuples(waits, st.integers(0, 5)), min_size=1, max_size=6),
    st.floats(0, 10),
    st.integers(0, 100),
)
def test_pick_replica_maximises_slack(
    replicas: list[tuple[tuple[float, ...], int]], budget_s: float, turn: int
) -> None:
    loads = [make_load(waits_s) for waits_s, _ in replicas]
    for each, (_, unreported) in zip(loads, replicas, strict=True):
        for _ in range(unreported):
            each.on_sent(0.0)
    chosen = pick_replica(loads, budget_s, now=0.0, turn=turn)
    place = next((i for i, due in enumerate(HORIZONS_S) if budget_s <= due), len(HORIZONS_S) - 1)
    delays = [waits_s[place] + (1 + unreported) * 0.001 for waits_s, unreported in replicas]
    assert delays[chosen] <= min(delays) + DELAY_RESOLUTION_S
